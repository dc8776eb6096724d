// The bottleneck of 64 reduced channels on Hopper's matrix instructions (compute capability 9.0a).
//
// One persistent block of three warp groups on each multiprocessor keeps all weights in its shared memory. So a tile of
// 8 x 16 pixels reads only x. One thread of the first group loads the tile's pixels and a margin of one pixel, 32
// channels at a time. The other two groups do every second tile each: one multiplies while the other waits for memory.
// A group computes the reduced map of 192 pixels (180 are needed) and stores it in shared memory. The 3x3 convolution
// reads it there at nine shifts into registers. Its result stays in registers: sums of one product are laid out as the
// first factor of the next. `expand` adds x, which it reads from the level-2 cache, and writes y.
#pragma once

#include "fastden.h"
#include "hopper.cuh"
#include "tile.cuh"

namespace fastden {
namespace hopper_bottleneck {

using namespace warp_groups;

constexpr int kMarginColumns = kTileColumns + 2;
constexpr int kMarginPixels = (kTileRows + 2) * kMarginColumns;
constexpr int kGroupRows = 64;  // rows of a product of a warp group: here pixels
constexpr int kMarginBlocks = divide_up(kMarginPixels, kGroupRows);
constexpr int kTileBlocks = kTileRows * kTileColumns / kGroupRows;
constexpr int kMiddle = 64;
constexpr int kMostChannels = 256;
constexpr int kStepChannels = 32;
constexpr int kGroupWarps = kGroupThreads / kWarp;
constexpr int kStages = 3;
constexpr int kTaps = 9;
constexpr int kParts = kMiddle / 16;                                // of 16 channels, for a product of kMiddle
constexpr int kRow = 2 * kMiddle;                                   // bytes
constexpr int kWeights = kMiddle * kRow;                            // 8 KiB: 64 outputs x 64 channels
constexpr int kStepRow = 2 * kStepChannels;                         // bytes
constexpr int kBox = kMarginPixels * kStepRow;                      // bytes that a load writes
constexpr int kStageBytes = kMarginBlocks * kGroupRows * kStepRow;  // products read 12 rows more
constexpr int kConv = kMostChannels / kMiddle * kWeights;           // the weights of `reduce` come first
constexpr int kExpand = kConv + kTaps * kWeights;
constexpr int kRing = kExpand + kMostChannels / kMiddle * kWeights;
constexpr int kMaps = kRing + kStages * kStageBytes;
constexpr int kMapBytes = kMarginPixels * kRow;
constexpr int kBarriers = kMaps + kConsumers * kMapBytes;
constexpr int kTurns = kBarriers + 2 * kStages * 8;
// The last 1024 bytes are for the alignment of the beginning.
constexpr int kSharedBytes = kTurns + kConsumers * 8 + 1024;
static_assert(kStageBytes % 1024 == 0 && kRing % 1024 == 0 && kMapBytes % kRow == 0 && kSharedBytes <= 227 * 1024);
static_assert(kTileColumns == 16);  // the 16 rows of a warp are a line of the tile

struct Problem {
    CUtensorMap x;
    Bottleneck arguments;
    int tiles_down, tiles_across, tiles;
};

struct Origin {
    int n, y, x;
};

__device__ __forceinline__ Origin origin_of(const Problem& problem, int tile) {
    const int line = tile / problem.tiles_across;
    return {line / problem.tiles_down, line % problem.tiles_down * kTileRows,
            tile % problem.tiles_across * kTileColumns};
}

// Copies all weights to shared memory in the layout of boxes: blocks of 64 rows, one for each output, of 64 channels.
// Rows of `expand` are in the order of channel_of_column.
template <typename T>
__device__ __forceinline__ void load_weights(const Bottleneck& p, uint32_t base, int thread) {
    const T* reduce = static_cast<const T*>(p.reduce);
    const T* conv = static_cast<const T*>(p.conv);
    const T* expand = static_cast<const T*>(p.expand);
    const int chunks = p.channels / kMiddle;
    for (int index = thread; index < (2 * chunks + kTaps) * kMiddle * 8; index += kThreads) {
        const int part = index % 8, row = index / 8 % kMiddle;
        int block = index / 8 / kMiddle, target = block * kWeights;
        const T* source = reduce + row * p.channels + block * kMiddle;
        if (block >= chunks + kTaps) {
            block -= chunks + kTaps;
            target = kExpand + block * kWeights;
            source = expand + (block * kMiddle + channel_of_column(row)) * kMiddle;
        } else if (block >= chunks) {
            block -= chunks;
            target = kConv + block * kWeights;
            source = conv + (row * kTaps + block) * kMiddle;
        }
        copy_async(base + target + row * kRow + ((part ^ (row & 7)) << 4), source + part * 8, true);
    }
    copy_commit();
    copy_wait<0>();
    make_writes_visible();
}

// Makes a lane's sums of 64 columns the biases of these columns: sums of products are added to them. So they are
// written before each use, and the compiler keeps no registers for them in between. `column(block)` is the number of
// the first of the lane's two columns in a block of 8.
template <typename Column>
__device__ __forceinline__ void start_sums(float (&sums)[kMiddle / 2], const float* bias, Column column) {
#pragma unroll
    for (int block = 0; block < kMiddle / 8; ++block) {
        const float2 start =
            bias == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(bias + column(block));
        sums[4 * block] = sums[4 * block + 2] = start.x;
        sums[4 * block + 1] = sums[4 * block + 3] = start.y;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) bottleneck_kernel(const __grid_constant__ Problem problem) {
// Other architectures do not have these instructions, and launch another kernel.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Bottleneck& p = problem.arguments;
    const uint32_t unaligned = shared_address(shared_memory());
    const uint32_t base = aligned(unaligned);
    Ring<kStages, kStageBytes> ring{base + kRing, base + kBarriers};
    const int thread = threadIdx.x, steps = p.channels / kStepChannels, blocks = gridDim.x;
    if (thread == 0) {
        ring.initialise(kGroupWarps);
        for (int group = 0; group < kConsumers; ++group) barrier_init(base + kTurns + 8 * group, kGroupWarps);
        barrier_init_done();
    }
    load_weights<T>(p, base, thread);
    __syncthreads();

    const int warp = uniform_warp();
    if (warp < kGroupWarps) {
        registers_give<40>();
        // All threads of the warp run this code, so that the compiler knows that they have the same addresses.
        if (warp == 0) {
            for (int tile = blockIdx.x; tile < problem.tiles; tile += blocks) {
                const Origin origin = origin_of(problem, tile);
                for (int step = 0; step < steps; ++step) {
                    barrier_wait(ring.empty(), ring.parity ^ 1);
                    if (elected()) {
                        barrier_expect(ring.full(), kBox);
                        tensor_load_4d(ring.address(), problem.x, ring.full(), step * kStepChannels, origin.x - 1,
                                       origin.y - 1, origin.n);
                    }
                    ring.advance();
                }
            }
        }
    } else {
        registers_take<232>();
        const int group = warp / kGroupWarps - 1, lane = thread % kWarp;
        const int line = warp % kGroupWarps;  // of a block of 64 pixels
        const int first_column = sums_column(lane);
        const auto own_columns = [&](int block) { return 8 * block + first_column; };
        const uint32_t map = base + kMaps + group * kMapBytes;
        unsigned char* const stored_map = shared_memory() + (map - unaligned);
        const uint32_t turn = base + kTurns + 8 * group, next_turn = base + kTurns + 8 * (kConsumers - 1 - group);
        uint32_t turn_parity = group == 0;  // the first turn is group 0's
        // Both groups read the ring, which has the tiles in their order.
        const auto skip_tile = [&] {
            for (int step = 0; step < steps; ++step) ring.advance();
        };
        if (group == 1) skip_tile();
        for (int tile = blockIdx.x + group * blocks; tile < problem.tiles; tile += kConsumers * blocks) {
            const Origin origin = origin_of(problem, tile);
            {
                float sums[kMarginBlocks][kMiddle / 2];
#pragma unroll
                for (int block = 0; block < kMarginBlocks; ++block) {
                    start_sums(sums[block], p.reduce_bias, own_columns);
                }
                auto done = ring;  // the stage that becomes empty next
                const auto give_back = [&] {
                    if (lane == 0) barrier_arrive(done.empty(), 0);
                    done.advance();
                };
                // A barrier has only two parities: a group may look at one only after the other group has seen all
                // earlier phases.
                barrier_wait(turn, turn_parity);
                turn_parity ^= 1;
#pragma unroll 1
                for (int step = 0; step < steps; ++step) {
                    barrier_wait(ring.full(), ring.parity);
                    const uint64_t pixels = factor_descriptor<kStepRow>(ring.address());
                    // 16 bytes are one unit of a descriptor.
                    const uint64_t weights = factor_descriptor<kRow>(base + step * kStepChannels / kMiddle * kWeights) +
                                             step * kStepChannels % kMiddle / 8;
#pragma unroll
                    for (int block = 0; block < kMarginBlocks; ++block) {
                        group_fence(sums[block]);
#pragma unroll
                        for (int part = 0; part < kStepChannels / 16; ++part) {
                            group_multiply_add<T>(sums[block], pixels + block * (kGroupRows * kStepRow / 16) + 2 * part,
                                                  weights + 2 * part, true);
                        }
                    }
                    group_commit();
                    ring.advance();
                    if (step > 0) {
                        group_wait<1>(sums[0]);
                        give_back();
                    }
                }
                if (lane == 0) barrier_arrive(next_turn, 0);
#pragma unroll
                for (int block = 0; block < kMarginBlocks; ++block) group_wait<0>(sums[block]);
                give_back();

                // Until no warp of the group reads the last tile's map.
                meet_at(1 + group, kGroupThreads);
#pragma unroll
                for (int block = 0; block < kMarginBlocks; ++block) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int row = block * kGroupRows + line * 16 + half * 8 + sums_row(lane);
                        if (row >= kMarginPixels) continue;
                        const int y = origin.y - 1 + row / kMarginColumns, x = origin.x - 1 + row % kMarginColumns;
                        // Outside the image, the reduced map is 0, not relu(bias): the convolution pads it.
                        const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
                        unsigned char* const pixel = stored_map + row * kRow + 2 * first_column;
#pragma unroll
                        for (int part = 0; part < 8; ++part) {
                            const int index = part * 4 + 2 * half;
                            const uint32_t pair = pack<T>(sums[block][index], sums[block][index + 1]);
                            *reinterpret_cast<uint32_t*>(pixel + ((part ^ (row & 7)) << 4)) =
                                inside ? rectify<T>(pair) : 0;
                        }
                    }
                }
                meet_at(1 + group, kGroupThreads);
            }

            // The first factor of the products that follow: of `conv` and then of `expand`.
            uint32_t left[kTileBlocks][kParts][4];
            const auto keep_left = [&](int block) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) keep_in_place(left[block][part]);
            };
            {
                float sums[kTileBlocks][kMiddle / 2];
#pragma unroll
                for (int block = 0; block < kTileBlocks; ++block) start_sums(sums[block], p.conv_bias, own_columns);
#pragma unroll
                for (int tap = 0; tap < kTaps; ++tap) {
                    const uint64_t weights = factor_descriptor<kRow>(base + kConv + tap * kWeights);
#pragma unroll
                    for (int block = 0; block < kTileBlocks; ++block) {
                        if (tap > 0) {
                            // The products of the other block of pixels may be running.
                            group_wait<kTileBlocks - 1>(sums[block]);
                            keep_left(block);
                        }
                        const int row = (block * kGroupWarps + line + tap / 3) * kMarginColumns + tap % 3 + lane % 16;
                        const uint32_t address = map + row * kRow + ((lane / 16 ^ (row & 7)) << 4);
#pragma unroll
                        for (int part = 0; part < kParts; ++part) load_matrices(left[block][part], address ^ part << 5);
                        keep_left(block);
                        group_fence(sums[block]);
#pragma unroll
                        for (int part = 0; part < kParts; ++part) {
                            group_multiply_add<T>(sums[block], left[block][part], weights + 2 * part, true);
                        }
                        group_commit();
                    }
                }
#pragma unroll
                for (int block = 0; block < kTileBlocks; ++block) {
                    group_wait<0>(sums[block]);
                    keep_left(block);
#pragma unroll
                    for (int part = 0; part < 8; ++part) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int index = part * 4 + 2 * half;
                            left[block][part / 2][part % 2 * 2 + half] =
                                rectify<T>(pack<T>(sums[block][index], sums[block][index + 1]));
                        }
                    }
                    keep_left(block);
                }
            }

            const T* const x = static_cast<const T*>(p.x);
            T* const y = static_cast<T*>(p.y);
            int64_t offset[kTileBlocks][2];  // of a lane's pixels, from its first channel on; -1 outside the image
#pragma unroll
            for (int block = 0; block < kTileBlocks; ++block) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = origin.y + block * kGroupWarps + line,
                              column = origin.x + 8 * half + sums_row(lane);
                    const int64_t pixel = (static_cast<int64_t>(origin.n) * p.height + row) * p.width + column;
                    offset[block][half] = row < p.height && column < p.width ? pixel * p.channels + 8 * (lane & 3) : -1;
                }
            }
#pragma unroll 1
            for (int first = 0; first < p.channels; first += kMiddle) {
                const uint64_t weights = factor_descriptor<kRow>(base + kExpand + first / kMiddle * kWeights);
                float sums[kTileBlocks][kMiddle / 2];
                uint4 added[kTileBlocks][2][2];
#pragma unroll
                for (int block = 0; block < kTileBlocks; ++block) {
                    start_sums(sums[block], p.expand_bias, [&](int part) {  // see channel_of_column
                        return first + part / 4 * 32 + 8 * (lane & 3) + part % 4 * 2;
                    });
                    group_fence(sums[block]);
#pragma unroll
                    for (int part = 0; part < kParts; ++part) {
                        group_multiply_add<T>(sums[block], left[block][part], weights + 2 * part, true);
                    }
                    group_commit();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
#pragma unroll
                        for (int quarter = 0; quarter < 2; ++quarter) {
                            added[block][half][quarter] = make_uint4(0, 0, 0, 0);
                            if (offset[block][half] >= 0) {
                                added[block][half][quarter] =
                                    *reinterpret_cast<const uint4*>(x + offset[block][half] + first + 32 * quarter);
                            }
                        }
                    }
                }
#pragma unroll
                for (int block = 0; block < kTileBlocks; ++block) {
                    if (block == 0) {
                        group_wait<kTileBlocks - 1>(sums[block]);
                    } else {
                        group_wait<0>(sums[block]);
                    }
                    keep_left(block);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
#pragma unroll
                        for (int quarter = 0; quarter < 2; ++quarter) {
                            if (offset[block][half] < 0) continue;
                            uint32_t values[4];
                            *reinterpret_cast<uint4*>(values) = added[block][half][quarter];
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                const float2 residual = unpack<T>(values[j]);
                                const int index = (quarter * 4 + j) * 4 + 2 * half;
                                values[j] = rectify<T>(
                                    pack<T>(sums[block][index] + residual.x, sums[block][index + 1] + residual.y));
                            }
                            *reinterpret_cast<uint4*>(y + offset[block][half] + first + 32 * quarter) =
                                *reinterpret_cast<const uint4*>(values);
                        }
                    }
                }
            }
            skip_tile();
        }
    }
#else
    __trap();  // raises an error at once: otherwise an unwritten result would look valid
#endif
}

inline bool fits(const Bottleneck& arguments) {
    return arguments.middle == kMiddle && arguments.channels % kMiddle == 0 && arguments.channels <= kMostChannels &&
           arguments.dtype != DType::kFloat32;
}

template <typename T>
Status launch_for(const Bottleneck& arguments, int64_t tiles, cudaStream_t stream) {
    Problem problem = {};
    problem.arguments = arguments;
    problem.tiles_down = divide_up(arguments.height, kTileRows);
    problem.tiles_across = divide_up(arguments.width, kTileColumns);
    problem.tiles = static_cast<int>(tiles);
    // The driver's functions need a context. A thread has one only after it has used the runtime.
    cudaError_t error = make_context_current();
    if (error != cudaSuccess) return error;
    const Status status = encode_image<T>(&problem.x, arguments.x, arguments.batch, arguments.height, arguments.width,
                                          arguments.channels, kTileRows + 2, kMarginColumns, kStepChannels);
    if (!status) return status;
    int multiprocessors = 0;
    error = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (error != cudaSuccess) return error;
    const int blocks = problem.tiles < multiprocessors ? problem.tiles : multiprocessors;
    return launch(bottleneck_kernel<T>, dim3(blocks), kThreads, kSharedBytes, 1, stream, problem);
}

}  // namespace hopper_bottleneck
}  // namespace fastden
