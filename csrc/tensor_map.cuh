// Descriptions of tensors for tensor memory access, which the driver makes on the host.
#pragma once

#include <cuda_fp8.h>

#include "fastden.h"
#include "platform.cuh"

namespace fastden {

#ifdef FASTDEN_EMULATED

using emulator::make_context_current;

template <typename T>
Status encode_tensor_map(CUtensorMap* map, int rank, const void* base, const uint64_t* sizes, const uint64_t* strides,
                         const uint32_t* box) {
    const char* error = emulator::encode_tensor_map(map, sizeof(T), rank, base, sizes, strides, box);
    return error == nullptr ? Status() : Status(cudaErrorInvalidValue, error);
}

#else

// The runtime's context of the current device, for functions of the driver.
inline cudaError_t make_context_current() {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    // cudaGetDevice makes no context. cudaSetDevice makes one from CUDA 12 on; the function below also needs CUDA 12.
    return taken(error != cudaSuccess ? error : cudaSetDevice(device));
}

// A function of the driver; null if the driver does not have it.
template <typename Function>
Function driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    const bool usable = taken(error) == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Function>(function) : nullptr;
}

// The driver has no type of e4m3: to it, these are bytes.
template <typename T>
constexpr CUtensorMapDataType kTensorType = std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : std::is_same_v<T, __half>      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;

// Describes a tensor. Only `strides` (bytes, from the second dimension on) may leave gaps. Rows of a box have 32, 64 or
// 128 bytes.
template <typename T>
Status encode_tensor_map(CUtensorMap* map, int rank, const void* base, const uint64_t* sizes, const uint64_t* strides,
                         const uint32_t* box) {
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    static const auto name_of = driver_function<decltype(&cuGetErrorName)>("cuGetErrorName");
    if (encode == nullptr) return {cudaErrorNotSupported, "the driver has no cuTensorMapEncodeTiled"};
    const uint32_t steps[] = {1, 1, 1, 1};
    const size_t row = box[0] * sizeof(T);
    const CUresult result = encode(map, kTensorType<T>, rank, const_cast<void*>(base), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   row == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                                   : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                               : CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return {};
    const char* name = nullptr;
    if (name_of != nullptr) name_of(result, &name);
    return {cudaErrorInvalidValue, name != nullptr ? name : "cuTensorMapEncodeTiled"};
}

#endif

// Describes an image (batch, height, width, channels). A box has one image's rows x columns pixels.
template <typename T>
Status encode_image(CUtensorMap* map, const void* base, int batch, int height, int width, int channels, int rows,
                    int columns, int box_channels) {
    const uint64_t sizes[] = {static_cast<uint64_t>(channels), static_cast<uint64_t>(width),
                              static_cast<uint64_t>(height), static_cast<uint64_t>(batch)};
    const uint64_t pixel = sizeof(T) * sizes[0];
    const uint64_t strides[] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
    const uint32_t box[] = {static_cast<uint32_t>(box_channels), static_cast<uint32_t>(columns),
                            static_cast<uint32_t>(rows), 1};
    return encode_tensor_map<T>(map, 4, base, sizes, strides, box);
}

}  // namespace fastden
