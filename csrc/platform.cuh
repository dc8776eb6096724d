// The instructions that the kernels are built from, each as a function with one meaning.
//
// With FASTDEN_EMULATED the same functions are C++ on the CPU (tests/emulator), so that the kernels' own code can be
// tested where there is no GPU.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "fastden.h"

#ifdef FASTDEN_EMULATED

#include "emulator.h"

#else

namespace fastden {

// The address in the multiprocessor's shared memory, as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies sixteen bytes from global to shared memory, asynchronously; zeros if not valid. Both are 16-byte aligned.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// Makes one group of all copies that this thread has started since the last group.
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the last kPending groups of this thread are still running. Other threads see the data after a
// barrier.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit values. Lane i passes the address of row i % 8 of matrix i / 8. From each matrix, a
// lane gets two values of row lane / 4, from column 2 (lane % 4) on.
__device__ __forceinline__ void load_matrices(uint32_t (&values)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(address)
                 : "memory");
}

// sums (16x8) += a (16x16) b (16x8): float32 sums of 16-bit values, distributed over the warp as in mma.m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

__device__ __forceinline__ unsigned char* shared_memory() {
    return dynamic_shared_memory;
}

// Returns an error of the runtime and clears it. The runtime stores its last error: otherwise the next caller would
// take it for its own.
inline cudaError_t taken(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

// The launch configuration of a kernel; it points to `attribute`.
inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, int shared_bytes, int cluster, cudaStream_t stream,
                                        cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = cluster;
    attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return config;
}

// What the runtime was asked of a kernel on a device: once, because the host waits for the answers, at small images
// longer than the device works.
struct Prepared {
    int shared_bytes = 0, clusters = 0;
};

struct PreparedKernels {
    std::mutex mutex;
    std::map<std::pair<const void*, int>, Prepared> known;  // by kernel and device
};

// Never destroyed: other threads may still launch while the process ends.
inline PreparedKernels& prepared_kernels() {
    static PreparedKernels& kernels = *new PreparedKernels;
    return kernels;
}

// Returns what `ask` says of a kernel on the current device, one thread at a time.
template <typename Ask>
cudaError_t prepare(const void* kernel, Ask ask) {
    PreparedKernels& kernels = prepared_kernels();
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return taken(error);
    const std::lock_guard<std::mutex> lock(kernels.mutex);
    return taken(ask(kernels.known[{kernel, device}]));
}

// Allows a kernel more than 48 KiB of dynamic shared memory.
template <typename... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), int shared_bytes) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    return prepare(function, [&](Prepared& known) {
        if (shared_bytes <= known.shared_bytes) return cudaSuccess;
        const cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error == cudaSuccess) known.shared_bytes = shared_bytes;
        return error;
    });
}

// Runs a kernel with dynamic shared memory; `kernel` is the same function at every call with these types.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int cluster,
                   cudaStream_t stream, Arguments... arguments) {
    const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = launch_config(grid, threads, shared_bytes, cluster, stream, &attribute);
    return taken(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// The number of clusters of a kernel that the current device runs at once; a kernel has the same configuration at every
// call.
template <typename... Parameters>
cudaError_t active_clusters(int* count, void (*kernel)(Parameters...), int threads, int shared_bytes, int cluster) {
    const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = launch_config(dim3(cluster), threads, shared_bytes, cluster, nullptr, &attribute);
    return prepare(reinterpret_cast<const void*>(kernel), [&](Prepared& known) {
        cudaError_t asked = cudaSuccess;
        if (known.clusters == 0) asked = cudaOccupancyMaxActiveClusters(&known.clusters, kernel, &config);
        *count = known.clusters;
        return asked;
    });
}

// An attribute of the current device.
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return taken(error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device));
}

}  // namespace fastden

#endif

namespace fastden {

// Packs two values as in memory, rounded to nearest.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ float to_float(__half value) {
    return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

// Both halves of a packed pair.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    const T* values = reinterpret_cast<const T*>(&pair);
    return make_float2(to_float(values[0]), to_float(values[1]));
}

// The maximum of each half of a pair and 0; a NaN stays a NaN.
template <typename T>
__device__ __forceinline__ uint32_t rectify(uint32_t pair) {
#ifdef FASTDEN_EMULATED
    const float2 values = unpack<T>(pair);
    return pack<T>(values.x < 0.0f ? 0.0f : values.x, values.y < 0.0f ? 0.0f : values.y);
#else
    // This is one instruction for two values; float32 needs two instructions for each value.
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 values = __hmax2_nan(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(0.0f));
        return *reinterpret_cast<const uint32_t*>(&values);
    } else {
        const __nv_bfloat162 values =
            __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&pair), __float2bfloat162_rn(0.0f));
        return *reinterpret_cast<const uint32_t*>(&values);
    }
#endif
}

// A compile-time number that can be passed as an argument.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// Calls `run` with a value of the kernels' type for a dtype.
template <typename Run>
Status for_dtype(DType dtype, Run run) {
    switch (dtype) {
        case DType::kFloat16:
            return run(__half());
        case DType::kBFloat16:
            return run(__nv_bfloat16());
        default:
            return cudaErrorInvalidValue;
    }
}

__host__ __device__ constexpr int divide_up(int value, int by) {
    return (value + by - 1) / by;
}

}  // namespace fastden
