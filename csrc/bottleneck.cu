// bottleneck: relu(x + expand(relu(conv(relu(reduce(x)))))), batch normalisation folded, in one kernel.
//
// A block makes 8 x 16 pixels. The reduced map of these pixels and of a margin of one is made first, to shared memory,
// where the 3x3 convolution reads it at nine shifts; what that makes goes to shared memory too, and through `expand`
// with x to the result. Global memory sees x (1.4 times, the margin included, and once more as the residual, from the
// cache) and y. The margin, 192 rows of products for 128 pixels, makes half of `reduce` twice: 12 % of all products.
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
constexpr int kExpandColumns = 64;  // output channels of a step of `expand`

template <int kMiddle>
struct Layout {
    static constexpr int kChunks = kMiddle / kChunk;
    static constexpr int kReduced = 0;
    static constexpr int kConvolved = kReduced + kChunks * kMarginRows * kRowBytes;
    static constexpr int kRing = kConvolved + kChunks * kPixels * kRowBytes;
    static constexpr int kStageBytes = (kMarginRows + kMiddle) * kRowBytes;
    static constexpr int kSharedBytes = kRing + kStages * kStageBytes;
    static_assert(kStageBytes >= kChunks * kExpandColumns * kRowBytes);
};

struct Problem {
    Bottleneck arguments;
    int tiles_down, tiles_across;
};

// relu(sums + bias) of a lane to the chunks of a map of kRows pixels in shared memory; zeros where not `inside(row)`.
template <typename T, int kRows, int kBlocksDown, int kBlocksAcross, typename Inside>
__device__ __forceinline__ void store_map(const float (&sums)[kBlocksDown][kBlocksAcross][4], unsigned char* map,
                                          int first_row, int first_column, const T* bias, int lane, Inside inside) {
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
                    const float2 added = unpack<T>(*reinterpret_cast<const uint32_t*>(bias + column));
                    value = make_float2(value.x + added.x, value.y + added.y);
                }
                const uint32_t pair = there ? pack<T>(rectify(value.x), rectify(value.y)) : 0;
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

    // Places of pixels in the image, which are 32 bits wide (elements are 64); -1 outside.
    const auto margin_pixel = [&](int row) {
        const int y = top - 1 + row / kMarginColumns, x = left - 1 + row % kMarginColumns;
        const bool inside = row < kMarginPixels && y >= 0 && y < p.height && x >= 0 && x < p.width;
        return inside ? y * p.width + x : -1;
    };
    const int part = thread % 4;
    constexpr int kCopyRows = kThreads / 4;
    int pixels[kMarginRows / kCopyRows];
#pragma unroll
    for (int pass = 0; pass < kMarginRows / kCopyRows; ++pass)
        pixels[pass] = margin_pixel(pass * kCopyRows + thread / 4);

    // The three convolutions' steps follow each other in one pipeline.
    const int reduce_steps = p.channels / kChunk;
    constexpr int kConvSteps = 9 * L::kChunks;
    const int expand_begin = reduce_steps + kConvSteps;
    const int steps = expand_begin + divide_up(p.channels, kExpandColumns);
    const auto copy_step = [&](int step) {
        const uint32_t stage = base + L::kRing + step % kStages * L::kStageBytes;
        if (step < reduce_steps) {
            const int channel = step * kChunk + part * 8;
#pragma unroll
            for (int pass = 0; pass < kMarginRows / kCopyRows; ++pass) {
                const bool inside = pixels[pass] >= 0;
                copy_async(stage + part_offset(pass * kCopyRows + thread / 4, part),
                           inside ? x + static_cast<int64_t>(pixels[pass]) * p.channels + channel : x, inside);
            }
            if (thread / 4 < kMiddle) {
                copy_async(stage + kMarginRows * kRowBytes + part_offset(thread / 4, part),
                           reduce + thread / 4 * p.channels + channel, true);
            }
        } else if (step < expand_begin) {
            const int index = step - reduce_steps, tap = index / L::kChunks, chunk = index % L::kChunks;
            if (thread / 4 < kMiddle) {
                copy_async(stage + part_offset(thread / 4, part),
                           conv + (thread / 4 * 9 + tap) * kMiddle + chunk * kChunk + part * 8, true);
            }
        } else if (step < steps) {
            const int row = thread / 4;
            const int output = (step - expand_begin) * kExpandColumns + channel_of_column(row);
            const bool exists = output < p.channels;
#pragma unroll
            for (int chunk = 0; chunk < L::kChunks; ++chunk) {
                copy_async(stage + chunk * kExpandColumns * kRowBytes + part_offset(row, part),
                           exists ? expand + output * kMiddle + chunk * kChunk + part * 8 : expand, exists);
            }
        }
        copy_commit();  // an empty group too: groups are what is counted
    };
    static_assert(kCopyRows == kExpandColumns && kCopyRows >= kMiddle);

    int step = 0;
    const auto next_stage = [&] {
        copy_wait<kStages - 2>();
        // Everyone's part of this step is there, everyone is done with the stage that is overwritten next, and what
        // was stored to shared memory is seen by all.
        __syncthreads();
        copy_step(step + kStages - 1);
        return base + L::kRing + step++ % kStages * L::kStageBytes;
    };
    for (int ahead = 0; ahead < kStages - 1; ++ahead) copy_step(ahead);

    {
        constexpr int kDown = kMarginRows / kWarpsDown / 16;
        float sums[kDown][kAcross][4];
        clear(sums);
        for (int index = 0; index < reduce_steps; ++index) {
            const uint32_t stage = next_stage();
            multiply_step<T>(sums, stage, warp_down * (16 * kDown), stage + kMarginRows * kRowBytes,
                             warp_across * (8 * kAcross), lane);
        }
        // Outside the image the reduced map is 0, not relu(bias): the convolution pads it.
        store_map<T, kMarginRows>(sums, shared + L::kReduced, warp_down * (16 * kDown), warp_across * (8 * kAcross),
                                  static_cast<const T*>(p.reduce_bias), lane,
                                  [&](int row) { return margin_pixel(row) >= 0; });
    }
    constexpr int kDown = kPixels / kWarpsDown / 16;
    static_assert(kTileColumns == 16);  // a block of 16 rows is a line of the tile
    {
        float sums[kDown][kAcross][4];
        clear(sums);
        for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
            for (int chunk = 0; chunk < L::kChunks; ++chunk) {
                const uint32_t stage = next_stage();
                const uint32_t map = base + L::kReduced + chunk * (kMarginRows * kRowBytes);
                const int shift = tap / 3 * kMarginColumns + tap % 3;
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    uint32_t b[kAcross / 2][4];
#pragma unroll
                    for (int j = 0; j < kAcross / 2; ++j) {
                        load_matrices(b[j], right_address(stage, warp_across * (8 * kAcross) + 16 * j, half, lane));
                    }
#pragma unroll
                    for (int i = 0; i < kDown; ++i) {
                        uint32_t a[4];
                        load_matrices(a,
                                      left_address(map, (warp_down * kDown + i) * kMarginColumns + shift, half, lane));
#pragma unroll
                        for (int j = 0; j < kAcross; ++j) {
                            multiply_add<T>(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                        }
                    }
                }
            }
        }
        store_map<T, kPixels>(sums, shared + L::kConvolved, warp_down * (16 * kDown), warp_across * (8 * kAcross),
                              static_cast<const T*>(p.conv_bias), lane, [](int) { return true; });
    }
    const T* bias = static_cast<const T*>(p.expand_bias);
    T* y = static_cast<T*>(p.y) + (x - static_cast<const T*>(p.x));
    while (step < steps) {
        const int first_output = (step - expand_begin) * kExpandColumns + warp_across * 32;
        const uint32_t stage = next_stage();
        float sums[kDown][4][4];
        clear(sums);
#pragma unroll
        for (int chunk = 0; chunk < L::kChunks; ++chunk) {
            multiply_step<T>(sums, base + L::kConvolved + chunk * (kPixels * kRowBytes), warp_down * (16 * kDown),
                             stage + chunk * (kExpandColumns * kRowBytes), warp_across * 32, lane);
        }
        const int output = first_output + 8 * (lane & 3);  // the first of eight, see channel_of_column
        if (output >= p.channels) continue;
        uint32_t added[4] = {};
        if (bias != nullptr) *reinterpret_cast<uint4*>(added) = *reinterpret_cast<const uint4*>(bias + output);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = top + warp_down * kDown + i, column = left + 8 * half + sums_row(lane);
                if (row >= p.height || column >= p.width) continue;
                const int64_t place = (static_cast<int64_t>(row) * p.width + column) * p.channels + output;
                uint32_t values[4];
                *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + place);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 residual = unpack<T>(values[j]), offset = unpack<T>(added[j]);
                    values[j] = pack<T>(rectify(sums[i][j][2 * half] + offset.x + residual.x),
                                        rectify(sums[i][j][2 * half + 1] + offset.y + residual.y));
                }
                *reinterpret_cast<uint4*>(y + place) = *reinterpret_cast<const uint4*>(values);
            }
        }
    }
    copy_wait<0>();
}

template <typename T>
cudaError_t launch_for(const Problem& problem, int blocks, cudaStream_t stream) {
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

cudaError_t bottleneck(const Bottleneck& arguments, cudaStream_t stream) {
    Problem problem = {};
    problem.arguments = arguments;
    problem.tiles_down = divide_up(arguments.height, kTileRows);
    problem.tiles_across = divide_up(arguments.width, kTileColumns);
    const int64_t blocks = static_cast<int64_t>(arguments.batch) * problem.tiles_down * problem.tiles_across;
    if (blocks == 0) return cudaSuccess;
    const int64_t pixels = static_cast<int64_t>(arguments.height) * arguments.width;
    if (blocks > INT32_MAX || pixels > INT32_MAX || arguments.channels % kChunk != 0) return cudaErrorInvalidValue;
    switch (arguments.dtype) {
        case DType::kFloat16:
            return launch_for<__half>(problem, static_cast<int>(blocks), stream);
        case DType::kBFloat16:
            return launch_for<__nv_bfloat16>(problem, static_cast<int>(blocks), stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace fastden
