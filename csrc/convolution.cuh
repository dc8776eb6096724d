// Convolution as an implicit matrix product for sm_80 and later: cp.async and mma.sync.
//
// Rows of the product are output pixels, and columns are output channels. The inner dimension runs over taps and,
// within a tap, over the channels of both sources, kChunk at a time. A block makes kRows pixels of kColumns channels. A
// transposed convolution of kernel 4 and stride 2 is four such products, one for each parity of the output's row and
// column.
#pragma once

#include "fastden.h"
#include "tile.cuh"

namespace fastden {

constexpr int kLargestKernel = 5;  // one bit for each tap fits into 32 bits
constexpr int kPhases = 4;         // of a transposed convolution of stride 2

struct ConvolutionProblem {
    Convolution arguments;
    int out_height, out_width;  // of one phase
    int64_t pixels;             // of one phase, in all images
    int column_blocks;
    bool phases;  // whether this is the four phases of a transposed convolution
};

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
struct ConvolutionTile {
    static constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
    static constexpr int kBlocksDown = kRows / kWarpsDown / 16;        // blocks of 16 rows per warp
    static constexpr int kBlocksAcross = kColumns / kWarpsAcross / 8;  // blocks of 8 columns per warp
    static constexpr int kPasses = kRows * 4 / kThreads;  // a thread's parts of 16 bytes of the left factor
    static constexpr int kWeightPasses = divide_up(kColumns * 4, kThreads);
    static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
    static constexpr int kPitch =
        2 * kColumns + 16;  // bytes between rows of the result; neighbouring rows use different banks
    static constexpr int kRing = kStages * kStageBytes;
    static constexpr int kResult = kRows * kPitch;
    static constexpr int kSharedBytes = kRing > kResult ? kRing : kResult;
    // Bytes that go through shared memory in a step, and its products. Each warp loads its rows and its columns.
    static constexpr int kLoadedBytes = kThreads / kWarp * (16 * kBlocksDown + 8 * kBlocksAcross) * kRowBytes;
    static constexpr int kMovedBytes = kStageBytes + kLoadedBytes;
    static constexpr int kProducts = kRows * kColumns * kChunk;
    // The rows of a pass come a multiple of 8 after those of the previous pass, so positions are equal (see
    // part_offset).
    static_assert(kThreads / 4 % 8 == 0 && kColumns * 4 % kThreads == 0);
    static_assert(kRows * 4 % kThreads == 0 && kBlocksDown * 16 * kWarpsDown == kRows);
    static_assert(kBlocksAcross * 8 * kWarpsAcross == kColumns && kBlocksAcross % 2 == 0);
};

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
__global__ void __launch_bounds__(kWarp * kWarpsDown * kWarpsAcross)
    convolution_kernel(const __grid_constant__ ConvolutionProblem problem) {
    using Tile = ConvolutionTile<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>;
    const Convolution& p = problem.arguments;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    // Blocks that make different channels or phases of the same pixels have consecutive numbers, and find the pixels in
    // the cache.
    const int blocks_of_pixels = problem.column_blocks * (problem.phases ? kPhases : 1);
    const int64_t first_pixel = static_cast<int64_t>(blockIdx.x / blocks_of_pixels) * kRows;
    const int block = blockIdx.x % blocks_of_pixels;
    const int first_column = block % problem.column_blocks * kColumns;
    const int phase = block / problem.column_blocks, phase_row = phase >> 1, phase_column = phase & 1;
    const int channels = p.channels_a + p.channels_b;
    const int taps = p.kernel * p.kernel;
    // This thread copies one part of 16 bytes for several pixels, and for the weights of several output channels.
    constexpr int kCopyRows = Tile::kThreads / 4;
    const int part = thread % 4;
    int corner[Tile::kPasses];       // index in the source of the pixel under the first tap
    uint32_t inside[Tile::kPasses];  // whether each tap lies in the image, one bit per tap
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
        const int64_t pixel = first_pixel + pass * kCopyRows + thread / 4;
        const int64_t line = pixel / problem.out_width;
        const int image = static_cast<int>(line / problem.out_height);
        const int top = static_cast<int>(line % problem.out_height) * p.stride - p.padding + phase_row;
        const int left = static_cast<int>(pixel - line * problem.out_width) * p.stride - p.padding + phase_column;
        corner[pass] = (image * p.height + top) * p.width + left;
        inside[pass] = 0;
        for (int tap = 0; tap < taps; ++tap) {
            const int y = top + tap / p.kernel, x = left + tap % p.kernel;
            const bool is_inside = y >= 0 && y < p.height && x >= 0 && x < p.width && pixel < problem.pixels;
            inside[pass] |= static_cast<uint32_t>(is_inside) << tap;
        }
    }
    const char* source[Tile::kPasses];
    const char* weight[Tile::kWeightPasses];
#pragma unroll
    for (int pass = 0; pass < Tile::kWeightPasses; ++pass) {
        // The weights of an output. In a phase, the first tap is the last tap of its parity in the 4 x 4 kernel.
        const int64_t output = first_column + pass * kCopyRows + thread / 4;
        const int64_t first = problem.phases ? (4 * output + 3 - phase_row) * 4 + 3 - phase_column : output * taps;
        weight[pass] = static_cast<const char*>(p.weight) + (first * channels + part * 8) * 2;
    }
    // Starts to read a source.
    const auto begin_source = [&](const void* data, int source_channels) {
#pragma unroll
        for (int pass = 0; pass < Tile::kPasses; ++pass) {
            source[pass] =
                static_cast<const char*>(data) + (static_cast<int64_t>(corner[pass]) * source_channels + part * 8) * 2;
        }
    };
    begin_source(p.a, p.channels_a);
    const int missing = p.outputs - first_column - thread / 4;  // output channels left from the first pass on

    const uint32_t ring = shared_address(shared_memory());
    const uint32_t copy_offset = part_offset(thread / 4, part);
    const int steps = taps * (divide_up(p.channels_a, kChunk) + divide_up(p.channels_b, kChunk));
    // State of the step that is copied next. Offsets are bytes.
    int source_channels = p.channels_a, of_source = 0, tap_row = 0, tap_column = 0, channel = 0;
    int tap = 0, first_in_weight = 0;  // offset of the tap in the weights, in elements
    int64_t tap_offset = 0;
    int stage_copied = 0, to_copy = steps;

    const auto copy_step = [&] {
        if (to_copy > 0) {
            --to_copy;
            const uint32_t stage = ring + stage_copied * Tile::kStageBytes + copy_offset;
            const bool exists = channel + part * 8 < source_channels;
            const int64_t in_source = tap_offset + 2 * channel;
#pragma unroll
            for (int pass = 0; pass < Tile::kPasses; ++pass) {
                copy_async(stage + pass * kCopyRows * kRowBytes, source[pass] + in_source,
                           exists && (inside[pass] >> tap & 1));
            }
            const int64_t in_weight = 2 * (first_in_weight + channel);
#pragma unroll
            for (int pass = 0; pass < Tile::kWeightPasses; ++pass) {
                copy_async(stage + (kRows + pass * kCopyRows) * kRowBytes, weight[pass] + in_weight,
                           exists && pass * kCopyRows < missing);
            }
            channel += kChunk;
            if (channel >= source_channels) {
                channel = 0;
                if (++tap_column == p.kernel) {
                    tap_column = 0;
                    if (++tap_row == p.kernel) {
                        tap_row = 0;
                        source_channels = p.channels_b;
                        begin_source(p.b, p.channels_b);
                        of_source = p.channels_a;
                    }
                }
                tap = tap_row * p.kernel + tap_column;
                // The taps of a phase are every second tap of the kernel, in reverse order.
                first_in_weight = (problem.phases ? -(8 * tap_row + 2 * tap_column) : tap) * channels + of_source;
                tap_offset = (static_cast<int64_t>(tap_row) * p.width + tap_column) * source_channels * 2;
            }
        }
        stage_copied = stage_copied + 1 == kStages ? 0 : stage_copied + 1;
        copy_commit();  // also if the group is empty, because copy_wait counts groups
    };

    float sums[Tile::kBlocksDown][Tile::kBlocksAcross][4];
    clear(sums);
    const int warp_row = warp % kWarpsDown * (kRows / kWarpsDown);
    const int warp_column = warp / kWarpsDown * (kColumns / kWarpsAcross);
    const uint32_t left = ring + left_offset(warp_row, lane);
    const uint32_t right = ring + kRows * kRowBytes + right_offset(warp_column, lane);
    for (int step = 0; step < kStages - 1; ++step) copy_step();
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        // After this barrier, each thread's part of this step is there, and no thread reads the stage overwritten next.
        __syncthreads();
        copy_step();
        multiply_step<T>(sums, left + stage * Tile::kStageBytes, right + stage * Tile::kStageBytes);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncthreads();

    const auto target_pixel = [&](int64_t pixel) {  // index of an output pixel in y
        if (!problem.phases) return pixel;
        const int64_t line = pixel / problem.out_width;
        return (2 * line + phase_row) * (2 * problem.out_width) + 2 * (pixel - line * problem.out_width) + phase_column;
    };
    unsigned char* result = shared_memory();
    const float* bias = p.bias;
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
                        value.x += bias[output];
                        value.y += bias[output + 1];
                    }
                    if (residual != nullptr) {
                        const float2 added =
                            unpack<T>(*reinterpret_cast<const uint32_t*>(residual + pixel * p.outputs + output));
                        value.x += added.x;
                        value.y += added.y;
                    }
                }
                const uint32_t pair = pack<T>(value.x, value.y);
                *reinterpret_cast<uint32_t*>(result + row * Tile::kPitch + 2 * column) =
                    p.relu ? rectify<T>(pair) : pair;
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
            *reinterpret_cast<uint4*>(y + target_pixel(pixel) * p.outputs + output) =
                *reinterpret_cast<const uint4*>(result + row * Tile::kPitch + index % kParts * 16);
        }
    }
}

template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kStages>
Status launch_convolution(ConvolutionProblem problem, cudaStream_t stream) {
    using Tile = ConvolutionTile<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>;
    problem.column_blocks = divide_up(problem.arguments.outputs, kColumns);
    const int64_t blocks =
        (problem.pixels + kRows - 1) / kRows * problem.column_blocks * (problem.phases ? kPhases : 1);
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks));
    return launch(convolution_kernel<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>, grid, Tile::kThreads,
                  Tile::kSharedBytes, 1, stream, problem);
}

constexpr int kStages = 4, kFewStages = 3;
constexpr int kReservedBytes = 1024;  // of shared memory, for each block

// Launches tiles of the most stages with which kBlocks blocks fit into the shared memory of a multiprocessor. Where it
// has 100 KiB, as on compute capability 8.6 and 8.9, these are three: otherwise, one block of 128 x 128 would be alone.
template <typename T, int kRows, int kColumns, int kWarpsDown, int kWarpsAcross, int kBlocks>
Status launch_stages(const ConvolutionProblem& problem, cudaStream_t stream) {
    using Tile = ConvolutionTile<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>;
    int shared_bytes = 0;
    const cudaError_t error = device_attribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    if (error != cudaSuccess) return error;
    if (kBlocks * (Tile::kSharedBytes + kReservedBytes) > shared_bytes) {
        return launch_convolution<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kFewStages>(problem, stream);
    }
    return launch_convolution<T, kRows, kColumns, kWarpsDown, kWarpsAcross, kStages>(problem, stream);
}

// Few output channels use narrower tiles, so that no products are computed for channels that do not exist. Registers
// bound the number of 128 x 128 blocks to two. Two blocks of 128 x 64 fit everywhere.
//
// Tiles of 256 x 128 need fewer bytes, but leave room for one block: conv2 at 2160 x 3840 took 0.617 ms on an H200 in
// place of 0.523, because nothing multiplies while the warps of a lone block wait (docs/kernel_counts.md).
template <typename T>
Status launch_convolution_for(const ConvolutionProblem& problem, cudaStream_t stream) {
    const int outputs = problem.arguments.outputs;
    if (outputs <= 32) return launch_stages<T, 128, 32, 4, 1, 3>(problem, stream);
    if (outputs <= 64) return launch_convolution<T, 128, 64, 4, 2, kStages>(problem, stream);
    return launch_stages<T, 128, 128, 2, 4, 2>(problem, stream);
}

inline Status run_convolution(const Convolution& arguments, cudaStream_t stream, bool phases) {
    ConvolutionProblem problem = {};
    problem.arguments = arguments;
    problem.phases = phases;
    const int kernel = arguments.kernel, padding = arguments.padding, stride = arguments.stride;
    problem.out_height = phases ? arguments.height : (arguments.height + 2 * padding - kernel) / stride + 1;
    problem.out_width = phases ? arguments.width : (arguments.width + 2 * padding - kernel) / stride + 1;
    problem.pixels = static_cast<int64_t>(arguments.batch) * problem.out_height * problem.out_width;
    if (kernel > kLargestKernel) return {cudaErrorInvalidValue, "kernel: accepted up to 5"};
    // In the kernel, indices of pixels have 32 bits, which saves registers. Indices of elements have 64.
    const int64_t rows = static_cast<int64_t>(arguments.batch) * (arguments.height + kernel) + kernel;
    if (rows * (arguments.width + kernel) > INT32_MAX) return {cudaErrorInvalidValue, "pixels: accepted up to 2^31"};
    return for_dtype(arguments.dtype,
                     [&](auto zero) { return launch_convolution_for<decltype(zero)>(problem, stream); });
}

}  // namespace fastden
