// stem: conv1 o conv0 as one 7x7 convolution of stride 2 on the raw image.
//
// A step of the inner dimension is a row of taps: 7 pixels of 4 positions. These are contiguous in shared memory, so
// the kernel reads windows without unfolding them. The output's first row, first column and corner have their own
// weights and their own tiles. Blocks are persistent: they do one tile after the other, with the weights of a region in
// shared memory.
#include "fastden.h"
#include "patch.cuh"

namespace fastden {
namespace {

constexpr int kTaps = 7;
constexpr int kRows = 128;     // output pixels of a tile
constexpr int kColumns = 128;  // output channels, at most
constexpr int kWarpsDown = 4, kWarpsAcross = 2;
constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
constexpr int kWeightBytes = kTaps * kColumns * kRowBytes;
constexpr int kRegions = 4;  // inside, first row, first column, corner

// A tile is 2^log_rows x 2^log_columns output pixels.
struct Region {
    int log_rows, log_columns;
    int rows, columns;  // size of the region in the output, which begins at (first_row, first_column)
    int first_row, first_column;
    int tiles_down, tiles_across, tiles;  // `tiles` counts all images
};

__host__ __device__ constexpr int patch_rows(int log_rows) {
    return 2 * (1 << log_rows) + kTaps - 2;
}
// One column more than the windows need, because a step takes the positions of eight taps.
__host__ __device__ constexpr int patch_columns(int log_columns) {
    return 2 * (1 << log_columns) + kTaps - 1;
}
__host__ __device__ constexpr int patch_bytes(int log_rows, int log_columns) {
    return patch_rows(log_rows) * patch_columns(log_columns) * kPixelBytes;
}
constexpr int kPatchBytes = patch_bytes(7, 0);  // patch of the first column, which is the largest
static_assert(kPatchBytes >= patch_bytes(0, 7) && kPatchBytes >= patch_bytes(3, 4));
constexpr int kSharedBytes = kWeightBytes + kPatchBytes;

struct Problem {
    ImageView image;
    const void* weight;
    const float* bias;
    void* y;
    Region regions[kRegions];
    int tiles;
    int out_height, out_width, outputs;
    bool relu;
};

// Loads the weights of a region as the product's second factor: 32 positions for each row of taps, 4 for each tap. A
// thread has one tap and every 32nd output in all rows, so offsets between its copies are known when this is compiled.
template <bool kFour>
__device__ __forceinline__ void load_weights(unsigned char* shared, const Problem& problem, int region, int thread) {
    constexpr int kPositions = kChunk / 4;  // taps in a row; the eighth is empty
    constexpr int kPass = kThreads / kPositions;
    // channel_of_column and the swizzle of part_offset are those of the column 32 before.
    static_assert(kPass == 32 && kColumns % kPass == 0);
    const int tap = thread % kPositions, column = thread / kPositions, output = channel_of_column(column);
    const int channels = kFour ? 4 : problem.image.channels;
    const uint16_t* const weight = static_cast<const uint16_t*>(problem.weight) +
                                   ((region * problem.outputs + output) * kTaps * kTaps + tap) * channels;
    unsigned char* const target = shared + part_offset(column, tap / 2) + tap % 2 * kPixelBytes;
#pragma unroll
    for (int first = 0; first < kColumns; first += kPass) {
        const bool exists = tap < kTaps && first + output < problem.outputs;
#pragma unroll
        for (int row = 0; row < kTaps; ++row) {
            *reinterpret_cast<uint2*>(target + (row * kColumns + first) * kRowBytes) =
                tap_values<kFour>(weight + (first * kTaps + row) * kTaps * channels, channels, exists);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) stem_kernel(const __grid_constant__ Problem problem) {
    constexpr int kDown = kRows / kWarpsDown / 16, kAcross = kColumns / kWarpsAcross / 8;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    const int warp_row = warp % kWarpsDown * (16 * kDown), warp_column = warp / kWarpsDown * (8 * kAcross);
    unsigned char* weights = shared_memory();
    unsigned char* patch = weights + kWeightBytes;
    const uint32_t weights_address = shared_address(weights), patch_address = shared_address(patch);

    int loaded = -1;
    for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
        int region = 0, index = tile;
        while (index >= problem.regions[region].tiles) index -= problem.regions[region++].tiles;
        const Region& r = problem.regions[region];
        const int line = index / r.tiles_across, n = line / r.tiles_down;
        const int top = line % r.tiles_down << r.log_rows, left = index % r.tiles_across << r.log_columns;
        const int columns = patch_columns(r.log_columns);
        __syncthreads();  // all threads have finished the previous tile
        if (region != loaded) {
            if (problem.image.channels == 4) {
                load_weights<true>(weights, problem, region, thread);
            } else {
                load_weights<false>(weights, problem, region, thread);
            }
        }
        loaded = region;
        load_patch(patch, problem.image, n, 2 * (r.first_row + top) - 1, 2 * (r.first_column + left) - 1,
                   patch_rows(r.log_rows), columns, thread, kThreads);
        __syncthreads();

        uint32_t window[kDown];
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
            const int row = warp_row + 16 * i + (lane & 15);
            // A row that the tile does not have reads one that exists.
            const int down = (row >> r.log_columns) & ((1 << r.log_rows) - 1);
            const int across = row & ((1 << r.log_columns) - 1);
            window[i] = patch_address + (2 * down * columns + 2 * across) * kPixelBytes + (lane >> 4) * 16;
        }
        const uint32_t right = weights_address + right_offset(warp_column, lane);
        float sums[kDown][kAcross][4];
        clear(sums);
#pragma unroll 1  // otherwise registers spill on sm_80
        for (int step = 0; step < kTaps; ++step) {
#pragma unroll
            for (int part = 0; part < 4; part += 2) {
                uint32_t a[kDown][4];
#pragma unroll
                for (int i = 0; i < kDown; ++i) {
                    load_matrices(a[i], window[i] + step * columns * kPixelBytes + part * 16);
                    // The weights of the eighth tap are 0, but a NaN in the image would still reach the sum.
                    if (part == 2 && (lane & 2)) a[i][2] = a[i][3] = 0;
                }
#pragma unroll
                for (int j = 0; j < kAcross; j += 2) {
                    uint32_t b[4];
                    load_matrices(b, (right ^ (part << 4)) + (step * kColumns + 8 * j) * kRowBytes);
#pragma unroll
                    for (int i = 0; i < kDown; ++i) {
                        multiply_add<T>(sums[i][j], a[i], b[0], b[1]);
                        multiply_add<T>(sums[i][j + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }

        const float* bias = problem.bias + region * problem.outputs;
#pragma unroll
        for (int first = 0; first < kAcross; first += 4) {
            const int output = warp_column + 8 * first + 8 * (lane & 3);  // the first of eight, see channel_of_column
            if (output >= problem.outputs) continue;
            float2 added[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) added[j] = *reinterpret_cast<const float2*>(bias + output + 2 * j);
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + 16 * i + 8 * half + sums_row(lane);
                    const int down = row >> r.log_columns, across = row & ((1 << r.log_columns) - 1);
                    if (down >> r.log_rows || top + down >= r.rows || left + across >= r.columns) continue;
                    uint32_t values[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        values[j] = pack<T>(sums[i][first + j][2 * half] + added[j].x,
                                            sums[i][first + j][2 * half + 1] + added[j].y);
                        if (problem.relu) values[j] = rectify<T>(values[j]);
                    }
                    const int64_t pixel =
                        (static_cast<int64_t>(n) * problem.out_height + r.first_row + top + down) * problem.out_width +
                        r.first_column + left + across;
                    *reinterpret_cast<uint4*>(static_cast<T*>(problem.y) + pixel * problem.outputs + output) =
                        *reinterpret_cast<const uint4*>(values);
                }
            }
        }
    }
}

}  // namespace

Status stem(const Stem& arguments, cudaStream_t stream) {
    if (arguments.channels > 4 || arguments.outputs > kColumns || arguments.outputs % 8 != 0)
        return cudaErrorInvalidValue;
    Problem problem = {};
    problem.image.data = arguments.x;
    for (int index = 0; index < 4; ++index) problem.image.strides[index] = arguments.x_strides[index];
    problem.image.channels = arguments.channels;
    problem.image.height = arguments.height;
    problem.image.width = arguments.width;
    problem.weight = arguments.weight;
    problem.bias = arguments.bias;
    problem.y = arguments.y;
    problem.out_height = (arguments.height - 4) / 2;
    problem.out_width = (arguments.width - 4) / 2;
    problem.outputs = arguments.outputs;
    problem.relu = arguments.relu;
    int64_t tiles = 0;
    for (int region = 0; region < kRegions; ++region) {
        const bool first_row = region % 2 == 1, first_column = region / 2 == 1;
        Region& r = problem.regions[region];
        r.log_rows = first_row ? 0 : first_column ? 7 : 3;
        r.log_columns = first_column ? 0 : first_row ? 7 : 4;
        r.rows = first_row ? 1 : problem.out_height - 1;
        r.columns = first_column ? 1 : problem.out_width - 1;
        r.first_row = first_row ? 0 : 1;
        r.first_column = first_column ? 0 : 1;
        r.tiles_down = divide_up(r.rows, 1 << r.log_rows);
        r.tiles_across = divide_up(r.columns, 1 << r.log_columns);
        const int64_t count = static_cast<int64_t>(arguments.batch) * r.tiles_down * r.tiles_across;
        tiles += count;
        if (tiles > INT32_MAX / 2) return {cudaErrorInvalidValue, "pixels: accepted up to 2^31"};
        r.tiles = static_cast<int>(count);
    }
    if (tiles == 0) return cudaSuccess;
    problem.tiles = static_cast<int>(tiles);
    int multiprocessors = 0;
    const cudaError_t error = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error != cudaSuccess) return error;
    const int blocks = problem.tiles < 2 * multiprocessors ? problem.tiles : 2 * multiprocessors;
    return for_dtype(arguments.dtype, [&](auto zero) {
        return launch(stem_kernel<decltype(zero)>, dim3(blocks), kThreads, kSharedBytes, 1, stream, problem);
    });
}

}  // namespace fastden
