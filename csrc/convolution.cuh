// Convolution as an implicit matrix product for sm_80 and later: cp.async and mma.sync.
//
// Rows of the product are output pixels, columns output channels; the inner dimension runs over taps and, within a tap,
// over the channels of both sources, kChunk at a time. A block makes kRows pixels of kColumns channels. A transposed
// convolution of kernel 4 and stride 2 is four such products, one for each parity of the output's row and column.
#pragma once

#include "fastden.h"
#include "tile.cuh"

namespace fastden {

struct ConvolutionProblem {
    Convolution arguments;
    int out_height, out_width;  // of one phase
    int64_t pixels;             // of one phase, in all images
    int column_blocks;
    bool phases;  // four, of a transposed convolution
};

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
struct ConvolutionTile {
    static constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
    static constexpr int kBlocksDown = kRows / kWarpsDown / 16;        // of 16 rows, a warp
    static constexpr int kBlocksAcross = kColumns / kWarpsAcross / 8;  // of 8 columns, a warp
    static constexpr int kPasses = kRows * 4 / kThreads;  // a thread's parts of 16 bytes of the left factor
    static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
    static constexpr int kPitch =
        2 * kColumns + 16;  // bytes between the result's rows: off the banks of the one before
    static constexpr int kRing = kStages * kStageBytes;
    static constexpr int kResult = kRows * kPitch;
    static constexpr int kSharedBytes = kRing > kResult ? kRing : kResult;
    static_assert(kRows * 4 % kThreads == 0 && kBlocksDown * 16 * kWarpsDown == kRows);
    static_assert(kBlocksAcross * 8 * kWarpsAcross == kColumns && kBlocksAcross % 2 == 0);
};

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
__global__ void __launch_bounds__(kWarp * kWarpsDown * kWarpsAcross)
    convolution_kernel(const __grid_constant__ ConvolutionProblem problem) {
    using Tile = ConvolutionTile<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>;
    const Convolution& p = problem.arguments;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    // Blocks that make other channels of the same pixels follow each other, and find the pixels in the cache.
    const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / problem.column_blocks) * kRows;
    const int first_column = blockIdx.x % problem.column_blocks * kColumns;
    const int phase = blockIdx.z, phase_row = phase >> 1, phase_column = phase & 1;
    const int channels = p.channels_a + p.channels_b;
    const int taps = p.kernel * p.kernel;
    const T* a = static_cast<const T*>(p.a);
    const T* b = static_cast<const T*>(p.b);
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(phase) * p.outputs * taps * channels;

    // What this thread copies: one part of 16 bytes of several pixels, and of several output channels' weights.
    const int part = thread % 4;
    int corner[Tile::kPasses];  // the pixel under the first tap, as its place in the source
    int top[Tile::kPasses], left[Tile::kPasses];
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
        const int64_t pixel = first_pixel + pass * (Tile::kThreads / 4) + thread / 4;
        const int64_t line = pixel / problem.out_width;
        const int64_t image = line / problem.out_height;
        top[pass] = static_cast<int>(line - image * problem.out_height) * p.stride - p.padding + phase_row;
        left[pass] = static_cast<int>(pixel - line * problem.out_width) * p.stride - p.padding + phase_column;
        corner[pass] = (static_cast<int>(image) * p.height + top[pass]) * p.width + left[pass];
        if (pixel >= problem.pixels) top[pass] = p.height + p.kernel;  // outside, whatever the tap
    }

    const uint32_t ring = shared_address(shared_memory());
    const int chunks_a = divide_up(p.channels_a, kChunk);
    const int chunks = chunks_a + divide_up(p.channels_b, kChunk);
    const int steps = taps * chunks;
    int tap_row = 0, tap_column = 0, chunk = 0;  // of the step that is copied next

    const auto copy_step = [&](int step) {
        if (step < steps) {
            const uint32_t stage = ring + step % kStages * Tile::kStageBytes;
            const bool second = chunk >= chunks_a;
            const int source_channels = second ? p.channels_b : p.channels_a;
            const int channel = (second ? chunk - chunks_a : chunk) * kChunk + part * 8;
            const bool exists = channel < source_channels;
            const T* source = second ? b : a;
#pragma unroll
            for (int pass = 0; pass < Tile::kPasses; ++pass) {
                const int y = top[pass] + tap_row, x = left[pass] + tap_column;
                const bool inside = exists && y >= 0 && y < p.height && x >= 0 && x < p.width;
                const int64_t pixel = corner[pass] + tap_row * p.width + tap_column;
                const int row = pass * (Tile::kThreads / 4) + thread / 4;
                copy_async(stage + part_offset(row, part), inside ? source + pixel * source_channels + channel : source,
                           inside);
            }
            const int tap = tap_row * p.kernel + tap_column;
            const int in_weight = tap * channels + (second ? p.channels_a : 0) + channel;
#pragma unroll
            for (int row = thread / 4; row < kColumns; row += Tile::kThreads / 4) {
                const int output = first_column + row;
                const bool valid = exists && output < p.outputs;
                copy_async(stage + kRows * kRowBytes + part_offset(row, part),
                           valid ? weight + static_cast<int64_t>(output) * taps * channels + in_weight : weight, valid);
            }
            if (++chunk == chunks) {
                chunk = 0;
                if (++tap_column == p.kernel) {
                    tap_column = 0;
                    ++tap_row;
                }
            }
        }
        copy_commit();  // an empty group too: groups are what is counted
    };

    float sums[Tile::kBlocksDown][Tile::kBlocksAcross][4];
    clear(sums);
    const int warp_row = warp % kWarpsDown * (kRows / kWarpsDown);
    const int warp_column = warp / kWarpsDown * (kColumns / kWarpsAcross);
    for (int step = 0; step < kStages - 1; ++step) copy_step(step);
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        // Everyone's part of this step is there, and everyone is done with the stage that is overwritten next.
        __syncthreads();
        copy_step(step + kStages - 1);
        const uint32_t stage = ring + step % kStages * Tile::kStageBytes;
        multiply_step<T>(sums, stage, warp_row, stage + kRows * kRowBytes, warp_column, lane);
    }
    copy_wait<0>();
    __syncthreads();

    const auto place = [&](int64_t pixel) {  // of an output pixel, in pixels
        if (!problem.phases) return pixel;
        const int64_t line = pixel / problem.out_width;
        return (2 * line + phase_row) * (2 * problem.out_width) + 2 * (pixel - line * problem.out_width) + phase_column;
    };
    unsigned char* result = shared_memory();
    const T* bias = static_cast<const T*>(p.bias);
    const T* residual = static_cast<const T*>(p.residual);
#pragma unroll
    for (int i = 0; i < Tile::kBlocksDown; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * i + 8 * half + sums_row(lane);
            const int64_t pixel = first_pixel + row;
#pragma unroll
            for (int j = 0; j < Tile::kBlocksAcross; ++j) {
                const int column = warp_column + 8 * j + sums_column(lane);
                const int output = first_column + column;
                float2 value = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                if (output < p.outputs && pixel < problem.pixels) {
                    if (bias != nullptr) {
                        value.x += to_float(bias[output]);
                        value.y += to_float(bias[output + 1]);
                    }
                    if (residual != nullptr) {
                        const float2 added =
                            unpack<T>(*reinterpret_cast<const uint32_t*>(residual + pixel * p.outputs + output));
                        value.x += added.x;
                        value.y += added.y;
                    }
                    if (p.relu) value = make_float2(rectify(value.x), rectify(value.y));
                }
                *reinterpret_cast<uint32_t*>(result + row * Tile::kPitch + 2 * column) = pack<T>(value.x, value.y);
            }
        }
    }
    __syncthreads();
    T* y = static_cast<T*>(p.y);
    constexpr int kParts = kColumns / 8;
    for (int index = thread; index < kRows * kParts; index += Tile::kThreads) {
        const int row = index / kParts, output = first_column + index % kParts * 8;
        const int64_t pixel = first_pixel + row;
        if (pixel < problem.pixels && output < p.outputs) {
            *reinterpret_cast<uint4*>(y + place(pixel) * p.outputs + output) =
                *reinterpret_cast<const uint4*>(result + row * Tile::kPitch + index % kParts * 16);
        }
    }
}

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
cudaError_t launch_convolution(ConvolutionProblem problem, cudaStream_t stream) {
    using Tile = ConvolutionTile<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>;
    problem.column_blocks = divide_up(problem.arguments.outputs, kColumns);
    const int64_t blocks = (problem.pixels + kRows - 1) / kRows * problem.column_blocks;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks), 1, problem.phases ? 4 : 1);
    return launch(convolution_kernel<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>, grid, Tile::kThreads,
                  Tile::kSharedBytes, 1, stream, problem);
}

// Few output channels take narrower tiles, so that no products are made for channels that are not there.
template <typename T>
cudaError_t launch_convolution_for(const ConvolutionProblem& problem, cudaStream_t stream) {
    if (problem.arguments.outputs <= 32) return launch_convolution<T, 128, 32, 4, 1, 4>(problem, stream);
    if (problem.arguments.outputs <= 64) return launch_convolution<T, 128, 64, 4, 2, 4>(problem, stream);
    return launch_convolution<T, 128, 128, 2, 4, 4>(problem, stream);
}

inline cudaError_t run_convolution(const Convolution& arguments, cudaStream_t stream, bool phases) {
    ConvolutionProblem problem = {};
    problem.arguments = arguments;
    problem.phases = phases;
    const int kernel = arguments.kernel, padding = arguments.padding, stride = arguments.stride;
    problem.out_height = phases ? arguments.height : (arguments.height + 2 * padding - kernel) / stride + 1;
    problem.out_width = phases ? arguments.width : (arguments.width + 2 * padding - kernel) / stride + 1;
    problem.pixels = static_cast<int64_t>(arguments.batch) * problem.out_height * problem.out_width;
    // Places of pixels are 32 bits wide in the kernel, which spares registers; those of elements are 64.
    const int64_t rows = static_cast<int64_t>(arguments.batch) * (arguments.height + kernel) + kernel;
    if (rows * (arguments.width + kernel) > INT32_MAX) return cudaErrorInvalidValue;
    switch (arguments.dtype) {
        case DType::kFloat16:
            return launch_convolution_for<__half>(problem, stream);
        case DType::kBFloat16:
            return launch_convolution_for<__nv_bfloat16>(problem, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace fastden
