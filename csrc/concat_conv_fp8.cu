// concat_conv_fp8: conv3 with both factors of its products in e4m3, on compute capability 9.0.
//
// A first kernel rounds both sources, and at each call the weights: they are few, and so no copy of them becomes stale.
// It reads 320 bytes of memory for each pixel and writes 160, where the convolution then reads 160 instead of 320. By
// count (benchmarks/kernel_counts.py), both take at least 16,400 cycles for a tile, and the convolution in bfloat16
// 23,000. If the kernels that make the sources rounded them, it would be 13,000; these would need second results.
#include <cmath>

#include "concat_hopper.cuh"

namespace fastden {
namespace fp8 {

constexpr int kChannelsA = 128, kChannelsB = 32, kChannels = kChannelsA + kChannelsB;
constexpr int kTaps = 9;
constexpr int kThreads = 256;
constexpr int kRun = 16;            // channels that a thread rounds at once: it reads 32 bytes and writes 16
constexpr int kBlocks = 8;          // at most, for each multiprocessor
constexpr int kAlignment = 128;     // bytes, of what lies in the workspace
constexpr float kLargest = 448.0f;  // of e4m3
constexpr float kLeastRange = 1e-6f, kLeastWeight = 1e-30f;

struct Rounding {
    Fp8Convolution arguments;
    uint8_t *a, *b, *weight;
    float* scale;
    int64_t pixels;
};

// The value of a channel's code 1.
__device__ __forceinline__ float step_of(const float* ranges, int channel) {
    const float range = ranges[channel];
    return (range < kLeastRange ? kLeastRange : range) / kLargest;  // a NaN stays
}

__device__ __forceinline__ uint32_t codes_of(float first, float second) {
    return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

// This thread rounds the same channels of many pixels.
template <typename T, int kWide>
__device__ __forceinline__ void round_pixels(const void* source, uint8_t* target, const float* ranges, int64_t pixels,
                                             int64_t first, int64_t stride) {
    constexpr int kParts = kWide / kRun;
    static_assert(kThreads % kParts == 0);
    const int channel = static_cast<int>(first % kParts) * kRun;
    float factors[kRun];
#pragma unroll
    for (int index = 0; index < kRun; ++index) factors[index] = 1.0f / step_of(ranges, channel + index);
    for (int64_t run = first; run < pixels * kParts; run += stride) {
        uint32_t values[kRun / 2], codes[kRun / 4];
        const uint4* const from = static_cast<const uint4*>(source) + 2 * run;
        *reinterpret_cast<uint4*>(values) = from[0];
        *reinterpret_cast<uint4*>(values + 4) = from[1];
#pragma unroll
        for (int index = 0; index < kRun / 4; ++index) {
            const float2 one = unpack<T>(values[2 * index]), two = unpack<T>(values[2 * index + 1]);
            const float* const factor = factors + 4 * index;
            codes[index] =
                codes_of(one.x * factor[0], one.y * factor[1]) | codes_of(two.x * factor[2], two.y * factor[3]) << 16;
        }
        reinterpret_cast<uint4*>(target)[run] = *reinterpret_cast<const uint4*>(codes);
    }
}

// The weights of one output channel, each times its channel's step, in steps of the largest.
template <typename T>
__device__ __forceinline__ void round_weights(const Rounding& p, int output, int thread) {
    const int64_t start = static_cast<int64_t>(output) * kTaps * kChannels;
    const T* const weight = static_cast<const T*>(p.arguments.weight) + start;
    const auto value = [&](int index) {
        return to_float(weight[index]) * step_of(p.arguments.ranges, index % kChannels);
    };
    float* const largest = reinterpret_cast<float*>(shared_memory());
    float most = 0.0f;
    for (int index = thread; index < kTaps * kChannels; index += kThreads) most = fmaxf(most, fabsf(value(index)));
    largest[thread] = most;
    __syncthreads();
    for (int index = 0; index < kThreads; ++index) most = fmaxf(most, largest[index]);
    // A NaN has no influence here: its own code makes its output's results NaN.
    const float scale = fmaxf(most, kLeastWeight) / kLargest;
    for (int index = thread; index < kTaps * kChannels; index += kThreads) {
        p.weight[start + index] = static_cast<uint8_t>(codes_of(value(index) / scale, 0.0f));
    }
    if (thread == 0) p.scale[output] = scale;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rounding_kernel(const __grid_constant__ Rounding p) {
    const int outputs = p.arguments.outputs, block = blockIdx.x, thread = threadIdx.x;
    if (block < outputs) {
        round_weights<T>(p, block, thread);
        return;
    }
    const int64_t first = static_cast<int64_t>(block - outputs) * kThreads + thread;
    const int64_t stride = static_cast<int64_t>(gridDim.x - outputs) * kThreads;
    round_pixels<T, kChannelsA>(p.arguments.a, p.a, p.arguments.ranges, p.pixels, first, stride);
    round_pixels<T, kChannelsB>(p.arguments.b, p.b, p.arguments.ranges + kChannelsA, p.pixels, first, stride);
}

inline int64_t aligned(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Where everything lies in the workspace; `end` is its size.
struct Places {
    int64_t b, weight, scale, end;

    explicit Places(const Fp8Convolution& arguments) {
        const int64_t pixels = static_cast<int64_t>(arguments.batch) * arguments.height * arguments.width;
        b = aligned(pixels * kChannelsA);
        weight = b + aligned(pixels * kChannelsB);
        scale = weight + aligned(static_cast<int64_t>(arguments.outputs) * kTaps * kChannels);
        end = scale + aligned(arguments.outputs * static_cast<int64_t>(sizeof(float)));
    }
};

#ifdef FASTDEN_HOPPER
template <typename T>
Status launch_for(const Fp8Convolution& arguments, cudaStream_t stream) {
    const Places places(arguments);
    uint8_t* const workspace = static_cast<uint8_t*>(arguments.workspace);
    Rounding rounding = {};
    rounding.arguments = arguments;
    rounding.a = workspace;
    rounding.b = workspace + places.b;
    rounding.weight = workspace + places.weight;
    rounding.scale = reinterpret_cast<float*>(workspace + places.scale);
    rounding.pixels = static_cast<int64_t>(arguments.batch) * arguments.height * arguments.width;
    if (rounding.pixels == 0) return cudaSuccess;
    int multiprocessors = 0;
    cudaError_t error = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error != cudaSuccess) return error;
    const int64_t wanted = (rounding.pixels * (kChannelsA / kRun) + kThreads - 1) / kThreads;
    const int most = kBlocks * multiprocessors, blocks = wanted < most ? static_cast<int>(wanted) : most;
    error = launch(rounding_kernel<T>, dim3(arguments.outputs + blocks), kThreads, kThreads * sizeof(float), 1, stream,
                   rounding);
    if (error != cudaSuccess) return error;

    Convolution convolution = {};
    convolution.a = rounding.a;
    convolution.b = rounding.b;
    convolution.weight = rounding.weight;
    convolution.bias = arguments.bias;
    convolution.y = arguments.y;
    convolution.dtype = arguments.dtype;
    convolution.batch = arguments.batch;
    convolution.height = arguments.height;
    convolution.width = arguments.width;
    convolution.channels_a = kChannelsA;
    convolution.channels_b = kChannelsB;
    convolution.outputs = arguments.outputs;
    convolution.kernel = 3;
    convolution.stride = convolution.padding = 1;
    convolution.relu = arguments.relu;
    return hopper::launch_tiles<__nv_fp8_e4m3, T, 1>(convolution, rounding.scale, stream);
}
#endif

}  // namespace fp8

int64_t workspace_bytes(const Fp8Convolution& arguments) {
    return fp8::Places(arguments).end;
}

Status concat_conv_fp8(const Fp8Convolution& arguments, cudaStream_t stream) {
#ifdef FASTDEN_HOPPER
    int major = 0;
    const cudaError_t error = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
    if (error != cudaSuccess) return error;
    if (arguments.channels_a != fp8::kChannelsA || arguments.channels_b != fp8::kChannelsB ||
        arguments.outputs % hopper::kTileOutputs != 0 || arguments.dtype == DType::kFloat32) {
        return {cudaErrorInvalidValue, "accepted: 128 and 32 channels, outputs in multiples of 256, float16, bfloat16"};
    }
    if (major == 9) {
        return for_dtype(arguments.dtype,
                         [&](auto zero) { return fp8::launch_for<decltype(zero)>(arguments, stream); });
    }
#endif
    return {cudaErrorNotSupported, "needs compute capability 9.0, and a build for 9.0a"};
}

}  // namespace fastden
