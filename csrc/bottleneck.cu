// bottleneck: relu(x + expand(relu(conv(relu(reduce(x)))))), batch normalisation folded, in one kernel.
//
// A block makes 8 x 16 pixels. First it computes the reduced map of these pixels and of a margin of one pixel, and
// stores it in shared memory. The 3x3 convolution reads it there at nine shifts, and stores its own result in shared
// memory too. `expand` reads this result, adds x, and writes y. Global memory transfers are y and x: x is read 1.4
// times because of the margin, and once more as the residual, from the cache. The margin makes 192 rows of products for
// 128 pixels: half of `reduce` is computed twice, which is 12 % of all products.
//
// For 64 reduced channels, compute capability 9.0 has another kernel (bottleneck_hopper.cuh).
#include "bottleneck_hopper.cuh"
#include "fastden.h"
#include "tile.cuh"

namespace fastden {
namespace {

constexpr int kTileRows = 8, kTileColumns = 16;
constexpr int kPixels = kTileRows * kTileColumns;
constexpr int kMarginColumns = kTileColumns + 2;
constexpr int kMarginPixels = (kTileRows + 2) * kMarginColumns;
constexpr int kMarginRows = divide_up(kMarginPixels, 64) * 64;  // whole blocks of 16 for four warps
constexpr int kWarpsDown = 4, kWarpsAcross = 2;
constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
constexpr int kStages = 3;
constexpr int kUnits = 3;           // in a step of `conv`; a unit is one tap with kChunk channels
constexpr int kExpandColumns = 64;  // output channels in a step of `expand`

template <int kMiddle>
struct Layout {
    static constexpr int kChunks = kMiddle / kChunk;
    static constexpr int kReduced = 0;
    // It replaces the reduced map. So two blocks of 64 reduced channels fit into the 164 KiB of compute capability 8.0.
    static constexpr int kConvolved = kReduced;
    static constexpr int kRing = kReduced + kChunks * kMarginRows * kRowBytes;
    static constexpr int kStageBytes = (kMarginRows + kMiddle) * kRowBytes;
    static constexpr int kSharedBytes = kRing + kStages * kStageBytes;
    static_assert(kStageBytes >= kChunks * kExpandColumns * kRowBytes && kStageBytes >= kUnits * kMiddle * kRowBytes);
};

struct Problem {
    Bottleneck arguments;
    int tiles_down, tiles_across;
};

// Stores a lane's relu(sums + bias) in the chunks of a map of kRows pixels in shared memory; zeros if not
// `inside(row)`.
template <typename T, int kRows, int kBlocksDown, int kBlocksAcross, typename Inside>
__device__ __forceinline__ void store_map(const float (&sums)[kBlocksDown][kBlocksAcross][4], unsigned char* map,
                                          int first_row, int first_column, const float* bias, int lane, Inside inside) {
#pragma unroll
    for (int i = 0; i < kBlocksDown; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * i + 8 * half + sums_row(lane);
            const bool there = inside(row);
#pragma unroll
            for (int j = 0; j < kBlocksAcross; ++j) {
                const int column = first_column + 8 * j + sums_column(lane);
                float2 value = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                if (bias != nullptr) {
                    const float2 added = *reinterpret_cast<const float2*>(bias + column);
                    value = make_float2(value.x + added.x, value.y + added.y);
                }
                const uint32_t pair = there ? rectify<T>(pack<T>(value.x, value.y)) : 0;
                const int at = column / kChunk * (kRows * kRowBytes) + part_offset(row, column % kChunk / 8);
                *reinterpret_cast<uint32_t*>(map + at + 2 * (column % 8)) = pair;
            }
        }
    }
}

template <typename T, int kMiddle>
__global__ void __launch_bounds__(kThreads, 2) bottleneck_kernel(const __grid_constant__ Problem problem) {
    using L = Layout<kMiddle>;
    constexpr int kAcross = kMiddle / kWarpsAcross / 8;
    const Bottleneck& p = problem.arguments;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    const int warp_down = warp % kWarpsDown, warp_across = warp / kWarpsDown;
    const int line = blockIdx.x / problem.tiles_across;
    const int image = line / problem.tiles_down;
    const int top = line % problem.tiles_down * kTileRows, left = blockIdx.x % problem.tiles_across * kTileColumns;
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(image) * p.height * p.width * p.channels;
    const T* reduce = static_cast<const T*>(p.reduce);
    const T* conv = static_cast<const T*>(p.conv);
    const T* expand = static_cast<const T*>(p.expand);
    unsigned char* shared = shared_memory();
    const uint32_t base = shared_address(shared);

    // Indices of pixels in the image, which have 32 bits (indices of elements have 64); -1 outside.
    const auto margin_pixel = [&](int row) {
        const int y = top - 1 + row / kMarginColumns, x = left - 1 + row % kMarginColumns;
        const bool inside = row < kMarginPixels && y >= 0 && y < p.height && x >= 0 && x < p.width;
        return inside ? y * p.width + x : -1;
    };
    const int part = thread % 4;
    constexpr int kCopyRows = kThreads / 4, kPasses = kMarginRows / kCopyRows;
    static_assert(kCopyRows == kExpandColumns && kCopyRows >= kMiddle);
    // Outside the image nothing is read, but an address must exist: it is that of the image's first pixel.
    const T* source[kPasses];
    bool inside[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int pixel = margin_pixel(pass * kCopyRows + thread / 4);
        inside[pass] = pixel >= 0;
        source[pass] = x + (inside[pass] ? static_cast<int64_t>(pixel) * p.channels : 0) + part * 8;
    }

    // The steps of the three convolutions form one pipeline.
    const int reduce_steps = p.channels / kChunk;
    constexpr int kConvSteps = 9 * L::kChunks / kUnits;
    const int expand_begin = reduce_steps + kConvSteps;
    const int steps = expand_begin + divide_up(p.channels, kExpandColumns);
    const uint32_t ring = base + L::kRing, copy_offset = part_offset(thread / 4, part);
    int copied = 0, stage_copied = 0;
    const auto copy_step = [&] {
        const uint32_t stage = ring + stage_copied * L::kStageBytes + copy_offset;
        if (copied < reduce_steps) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                copy_async(stage + pass * kCopyRows * kRowBytes, source[pass] + copied * kChunk, inside[pass]);
            }
            if (thread / 4 < kMiddle) {
                copy_async(stage + kMarginRows * kRowBytes,
                           reduce + thread / 4 * p.channels + copied * kChunk + part * 8, true);
            }
        } else if (copied < expand_begin) {
            // A row of `conv` is 9 taps of kMiddle channels, so its chunks are contiguous.
            const int unit = (copied - reduce_steps) * kUnits;
            if (thread / 4 < kMiddle) {
                const T* row = conv + thread / 4 * (9 * kMiddle) + unit * kChunk + part * 8;
#pragma unroll
                for (int next = 0; next < kUnits; ++next) {
                    copy_async(stage + next * kMiddle * kRowBytes, row + next * kChunk, true);
                }
            }
        } else if (copied < steps) {
            const int output = (copied - expand_begin) * kExpandColumns + channel_of_column(thread / 4);
            const T* row = expand + output * kMiddle + part * 8;
#pragma unroll
            for (int chunk = 0; chunk < L::kChunks; ++chunk) {
                copy_async(stage + chunk * kExpandColumns * kRowBytes, row + chunk * kChunk, output < p.channels);
            }
        }
        ++copied;
        stage_copied = stage_copied + 1 == kStages ? 0 : stage_copied + 1;
        copy_commit();  // also if the group is empty, because copy_wait counts groups
    };

    int stage_used = 0;
    const auto next_stage = [&] {
        copy_wait<kStages - 2>();
        // After this barrier, all threads' parts of this step are in shared memory, no thread still reads the stage
        // that is overwritten next, and all threads see what others stored to shared memory.
        __syncthreads();
        copy_step();
        const uint32_t stage = ring + stage_used * L::kStageBytes;
        stage_used = stage_used + 1 == kStages ? 0 : stage_used + 1;
        return stage;
    };
    for (int ahead = 0; ahead < kStages - 1; ++ahead) copy_step();

    const uint32_t right = right_offset(warp_across * (8 * kAcross), lane);
    {
        constexpr int kDown = kMarginRows / kWarpsDown / 16;
        const uint32_t left = left_offset(warp_down * (16 * kDown), lane);
        float sums[kDown][kAcross][4];
        clear(sums);
        for (int index = 0; index < reduce_steps; ++index) {
            const uint32_t stage = next_stage();
            multiply_step<T>(sums, stage + left, stage + kMarginRows * kRowBytes + right);
        }
        // Outside the image, the reduced map is 0, not relu(bias): the convolution pads it.
        store_map<T, kMarginRows>(sums, shared + L::kReduced, warp_down * (16 * kDown), warp_across * (8 * kAcross),
                                  p.reduce_bias, lane, [&](int row) { return margin_pixel(row) >= 0; });
    }
    constexpr int kDown = kPixels / kWarpsDown / 16;
    static_assert(kTileColumns == 16);  // a block of 16 rows is a line of the tile
    {
        float sums[kDown][kAcross][4];
        clear(sums);
        for (int index = 0; index < kConvSteps; ++index) {
            const uint32_t stage = next_stage();
#pragma unroll
            for (int next = 0; next < kUnits; ++next) {
                const int unit = index * kUnits + next, tap = unit / L::kChunks, chunk = unit % L::kChunks;
                const uint32_t map = base + L::kReduced + chunk * (kMarginRows * kRowBytes);
                const int row = warp_down * kDown * kMarginColumns + tap / 3 * kMarginColumns + tap % 3;
                uint32_t left[kDown];
#pragma unroll
                for (int i = 0; i < kDown; ++i) left[i] = map + left_offset(row + i * kMarginColumns, lane);
                multiply_rows<T>(sums, left, stage + next * kMiddle * kRowBytes + right);
            }
        }
        __syncthreads();  // all warps have read the reduced map
        store_map<T, kPixels>(sums, shared + L::kConvolved, warp_down * (16 * kDown), warp_across * (8 * kAcross),
                              p.conv_bias, lane, [](int) { return true; });
    }
    const float* bias = p.expand_bias;
    T* y = static_cast<T*>(p.y) + (x - static_cast<const T*>(p.x));
    const uint32_t convolved = base + L::kConvolved + left_offset(warp_down * (16 * kDown), lane);
    const uint32_t expand_right = right_offset(warp_across * 32, lane);
    for (int first = 0; first < p.channels; first += kExpandColumns) {
        const uint32_t stage = next_stage();
        // The first of eight channels; see channel_of_column.
        const int output = first + warp_across * 32 + 8 * (lane & 3);
        if (output >= p.channels) continue;  // the same for a whole warp: channels come in blocks of 32
        float sums[kDown][4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 start =
                bias == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(bias + output + 2 * j);
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
                sums[i][j][0] = sums[i][j][2] = start.x;
                sums[i][j][1] = sums[i][j][3] = start.y;
            }
        }
#pragma unroll
        for (int chunk = 0; chunk < L::kChunks; ++chunk) {
            multiply_step<T>(sums, convolved + chunk * (kPixels * kRowBytes),
                             stage + chunk * (kExpandColumns * kRowBytes) + expand_right);
        }
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = top + warp_down * kDown + i, column = left + 8 * half + sums_row(lane);
                if (row >= p.height || column >= p.width) continue;
                const int64_t offset = (static_cast<int64_t>(row) * p.width + column) * p.channels + output;
                uint32_t values[4];
                *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + offset);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 residual = unpack<T>(values[j]);
                    values[j] =
                        rectify<T>(pack<T>(sums[i][j][2 * half] + residual.x, sums[i][j][2 * half + 1] + residual.y));
                }
                *reinterpret_cast<uint4*>(y + offset) = *reinterpret_cast<const uint4*>(values);
            }
        }
    }
    copy_wait<0>();
}

template <typename T>
Status launch_for(const Problem& problem, int blocks, cudaStream_t stream) {
    switch (problem.arguments.middle) {
        case 32:
            return launch(bottleneck_kernel<T, 32>, dim3(blocks), kThreads, Layout<32>::kSharedBytes, 1, stream,
                          problem);
        case 64:
            return launch(bottleneck_kernel<T, 64>, dim3(blocks), kThreads, Layout<64>::kSharedBytes, 1, stream,
                          problem);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

Status bottleneck(const Bottleneck& arguments, cudaStream_t stream) {
    Problem problem = {};
    problem.arguments = arguments;
    problem.tiles_down = divide_up(arguments.height, kTileRows);
    problem.tiles_across = divide_up(arguments.width, kTileColumns);
    const int64_t blocks = static_cast<int64_t>(arguments.batch) * problem.tiles_down * problem.tiles_across;
    if (blocks == 0) return cudaSuccess;
    const int64_t pixels = static_cast<int64_t>(arguments.height) * arguments.width;
    if (blocks > INT32_MAX || pixels > INT32_MAX) return {cudaErrorInvalidValue, "pixels: accepted up to 2^31"};
    if (arguments.channels % kChunk != 0) return {cudaErrorInvalidValue, "channels: accepted multiples of 32"};
// The build defines this if 9.0a is one of the architectures.
#ifdef FASTDEN_HOPPER
    static_assert(kTileRows == hopper_bottleneck::kTileRows && kTileColumns == hopper_bottleneck::kTileColumns);
    int major = 0;
    const cudaError_t error = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
    if (error != cudaSuccess) return error;
    if (major == 9 && hopper_bottleneck::fits(arguments)) {
        return for_dtype(arguments.dtype, [&](auto zero) {
            return hopper_bottleneck::launch_for<decltype(zero)>(arguments, blocks, stream);
        });
    }
#endif
    return for_dtype(arguments.dtype,
                     [&](auto zero) { return launch_for<decltype(zero)>(problem, static_cast<int>(blocks), stream); });
}

}  // namespace fastden
