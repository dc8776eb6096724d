// CUDA kernels on the CPU, to test them where there is no GPU: every thread of a block (or a cluster) is a fibre, and
// the instructions of csrc/platform.cuh are functions that follow their definitions in the PTX manual.
//
// Nothing is faster or later than it has to be: what runs in the background takes effect as late as allowed or, drawn
// from a seed, early; threads that could go on do so in random order; shared memory begins as NaN; a kernel that waits
// for what never comes ends with an error. So a missing wait or barrier shows as a wrong result. No maintained library
// does this for mma.sync, cp.async and Hopper's instructions.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastden::emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs.
struct Position {
    Index thread, block, threads, blocks;
};
Position& position();

// Runs `body` as every thread of every block; throws std::runtime_error where it cannot end.
void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& body);

// Until every thread has come that takes part: of the warp, the block, or `count` at the numbered barrier.
void meet_warp();
void meet_block();
void meet_cluster();
void meet_at(int barrier, int count);

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

void copy_async(uint32_t target, const void* source, bool valid);
void copy_commit();
void copy_wait(int pending);

void load_matrices(uint32_t* values, uint32_t address);
// `to_float` of the 16-bit values.
void multiply_add(float* sums, const uint32_t* a, uint32_t b0, uint32_t b1, float (*to_float)(uint16_t));

void barrier_init(uint32_t barrier, int count);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_arrive(uint32_t barrier, int rank);  // of the cluster's block `rank`
void barrier_wait(uint32_t barrier, uint32_t parity);

int cluster_rank();
bool elected();

// `element`: bytes of the tensor's elements. The name of the driver's error, or null. Like the driver's functions it
// needs a context, which a thread has from its first launch on, or from make_context_current() on.
const char* encode_tensor_map(CUtensorMap* map, int element, int rank, const void* base, const uint64_t* sizes,
                              const uint64_t* strides, const uint32_t* box);
cudaError_t make_context_current();
void tensor_load(uint32_t target, const CUtensorMap& map, uint32_t barrier, const int* place, unsigned ranks);
void tensor_store(const CUtensorMap& map, uint32_t source, const int* place);
void tensor_store_commit();
void tensor_store_wait(int pending);

// Type of the factors of a product: bytes of an element, and `to_float` of its bits.
struct Factor {
    int bytes;
    float (*to_float)(uint16_t);
};

// 32 bytes of the inner dimension. Elements of 16 bits are summed in float32. Those of 8 bits, e4m3, are summed with 13
// bits behind the largest addend's exponent, as MMA-Sim has it (https://arxiv.org/abs/2511.10909), which was compared
// with GPUs bit for bit. An H200 gave the values that this gives (tests/cuda/test_fp8.py).
void group_multiply_add(float* sums, int columns, uint64_t a, uint64_t b, bool add, Factor factor);
// The first factor in registers, of 16 bits, which must keep their values until the product is waited for.
void group_multiply_add(float* sums, int columns, const uint32_t* a, uint64_t b, bool add, Factor factor);
void group_commit();
void group_wait(int pending);

// What was counted since the program began.
struct Counters {
    int64_t multiplications;  // mma.sync instructions
    int64_t matrix_loads;     // ldmatrix instructions
    int64_t conflicts;        // times that one of the four matrices' rows met a busy bank, beyond the first access
};
Counters& counters();

template <typename T>
float widen(uint16_t bits) {
    if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
        const auto value = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bits), __NV_E4M3);
        return __half2float(__half(value));
    } else if constexpr (std::is_same_v<T, __half>) {
        return __half2float(__ushort_as_half(bits));
    } else {
        return __bfloat162float(__ushort_as_bfloat16(bits));
    }
}

template <typename T>
Factor factor() {
    return {sizeof(T), widen<T>};
}

}  // namespace fastden::emulator

#define threadIdx (::fastden::emulator::position().thread)
#define blockIdx (::fastden::emulator::position().block)
#define blockDim (::fastden::emulator::position().threads)
#define gridDim (::fastden::emulator::position().blocks)

inline void __syncthreads() {
    fastden::emulator::meet_block();
}
inline void __syncwarp() {
    fastden::emulator::meet_warp();
}

namespace fastden {

using emulator::shared_address;
using emulator::shared_memory;

inline void copy_async(uint32_t target, const void* source, bool valid) {
    emulator::copy_async(target, source, valid);
}
inline void copy_commit() {
    emulator::copy_commit();
}
template <int kPending>
void copy_wait() {
    emulator::copy_wait(kPending);
}
inline void load_matrices(uint32_t (&values)[4], uint32_t address) {
    emulator::load_matrices(values, address);
}
template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_add(sums, a, b0, b1, emulator::widen<T>);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int cluster, cudaStream_t,
                   Arguments... arguments) {
    emulator::run(grid, threads, shared_bytes, cluster, [&] { kernel(arguments...); });
    return cudaSuccess;
}

// Two multiprocessors of compute capability 9.0, so that persistent kernels have several tiles to do; the environment
// variables FASTDEN_EMULATED_MAJOR and FASTDEN_EMULATED_MULTIPROCESSORS say otherwise, and FASTDEN_EMULATED_SHARED_KIB
// how much shared memory each has.
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute);

// Blocks of a cluster share a group of multiprocessors: here each group has one more than whole clusters fill.
template <typename... Parameters>
cudaError_t active_clusters(int* count, void (*)(Parameters...), int, int, int cluster) {
    int multiprocessors = 0;
    const cudaError_t error = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    *count = multiprocessors > cluster ? (multiprocessors - 1) / cluster : multiprocessors / cluster;
    return error;
}

}  // namespace fastden
