// The convolution of two sources on compute capability 9.0: relu(conv2d(cat(a, b), weight) + bias), factors of 16 bits
// or e4m3.
//
// A block of three warp groups is persistent. It does one tile after the other, each of 8 x 16 pixels and 256 output
// channels. One thread of the first group loads. For each column of taps and 128 bytes of channels, it loads one box of
// a or b. This box is two rows higher than the tile, and the three taps of the column read it at shifts of one row. For
// each of these taps, it also loads one box of the weights. Elements outside the image arrive as zeros, which are the
// padding. The other two groups multiply, 64 pixels each, and also store their results as boxes. The two blocks of a
// cluster do neighbouring tiles with the same weights: each loads half of the weights for both. If b has 32 channels,
// its boxes are 32 channels wide. So for conv3 with 16 bits, a block reads 57 KiB per tap from the level-2 cache (17 of
// inputs, 40 of weights). It would be 88 KiB with a box of 64 channels for each tap, and 112 KiB if every block loaded
// all its weights. With e4m3 it reads half of that, and needs half as many products.
#pragma once

#include "hopper.cuh"
#include "tile.cuh"

namespace fastden {
namespace hopper {

using namespace warp_groups;

constexpr int kTileOutputs = 256;
constexpr int kStepChannels = 64;  // of 16 bits, or 128 of 8 bits
constexpr int kStepBytes = 128;
constexpr int kGroupRows = kTileRows / kConsumers;
constexpr int kLargestKernel = 3;
constexpr int kCluster = 2;
constexpr int kBoxRow = kTileColumns * kStepBytes;  // 2 KiB, or less for rows of 64 or 32 bytes: whole groups of
                                                    // swizzled rows, so that a tap may begin at each of them
constexpr int kLeftBytes = (kTileRows + kLargestKernel - 1) * kBoxRow;  // 20 KiB
constexpr int kRightBytes = kTileOutputs * kStepBytes;                  // 32 KiB
constexpr int kLeftStages = 3, kRightStages = 4;
constexpr int kPiece = kGroupRows * kBoxRow;  // 8 KiB: a group's pixels, 64 channels
constexpr int kPieces = 2;                    // pieces of a group's result in shared memory
constexpr int kRight = kLeftStages * kLeftBytes;
constexpr int kStore = kRight + kRightStages * kRightBytes;
constexpr int kBarriers = kStore + kConsumers * kPieces * kPiece;
// The last 1024 bytes are for the alignment of the beginning.
constexpr int kSharedBytes = kBarriers + 2 * (kLeftStages + kRightStages) * 8 + 1024;
static_assert(kBoxRow % 1024 == 0 && kSharedBytes <= 227 * 1024);

struct Problem {
    CUtensorMap a, b, weight_a, weight_b, y;
    const float* bias;
    const float* scale;  // of each output channel; read where factors are e4m3
    int tiles_down, tiles_across;
    int output_blocks;
    int pairs;  // pairs of tiles, for all blocks of output channels
    int kernel, padding;
    int channels_a, channels_b;
    bool relu;
};

struct Origin {
    int n, y, x, output;
};

__device__ __forceinline__ Origin origin_of(const Problem& problem, int pair, int rank) {
    const int tile = pair / problem.output_blocks * kCluster + rank;
    const int line = tile / problem.tiles_across;
    Origin origin;
    // The last pair may have no second tile. Then the second tile lies after the last image: it reads zeros and stores
    // nothing.
    origin.n = line / problem.tiles_down;
    origin.y = line % problem.tiles_down * kTileRows;
    origin.x = tile % problem.tiles_across * kTileColumns;
    origin.output = pair % problem.output_blocks * kTileOutputs;
    return origin;
}

// Number of taps of a column whose weights share a stage. A row of 32 bytes has one product for each tap: too little
// work between two waits. So the kernel is 3 where rows have 32 bytes.
template <int kRow>
constexpr int kTapsOfStage = kRow == 32 ? kLargestKernel : 1;

// Whether products of T are summed with few bits. Those of e4m3 are: Hopper keeps about 14 bits of such a sum
// (DeepSeek-V3's technical report, section 3.3.2; bit for bit in MMA-Sim, https://arxiv.org/abs/2511.10909). The larger
// a sum is already, the more bits of an addend are lost.
template <typename T>
constexpr bool kSumsAreShort = sizeof(T) == 1;

// Adds the products of a stage to `sums` in float32, as soon as there are 96 or 128 of them. The registers hold sums
// and half of a stage's sums, so one half of the outputs follows the other. Meanwhile, the other warp group multiplies.
template <typename T, int kParts, int kTaps>
__device__ __forceinline__ void add_products(float (&sums)[kTileOutputs / 2], uint64_t pixels, uint64_t weights) {
    constexpr int kHalf = kTileOutputs / 4;
    constexpr int kRow = 32 * kParts;
    constexpr int kUnit = 16;  // bytes, of a descriptor
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float products[kHalf];
        group_fence(products);
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int row = (2 * tap + half) * kTileOutputs / 2;
                group_multiply_add<T>(products, pixels + (tap * kTileColumns * kRow) / kUnit + 2 * part,
                                      weights + row * kRow / kUnit + 2 * part, tap + part > 0);
            }
        }
        group_commit();
        group_wait<0>(products);
#pragma unroll
        for (int index = 0; index < kHalf; ++index) sums[half * kHalf + index] += products[index];
    }
}

// T: type of the factors, Y: of the result. kParts: number of parts of 32 bytes in a step of b.
template <typename T, typename Y, int kParts>
__global__ void __launch_bounds__(kThreads, 1) concat_kernel(const __grid_constant__ Problem problem) {
// Other architectures do not have these instructions, and launch another kernel.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint32_t unaligned = shared_address(shared_memory());
    const uint32_t base = aligned(unaligned);
    unsigned char* const shared = shared_memory() + (base - unaligned);
    Ring<kLeftStages, kLeftBytes> left{base, base + kBarriers};
    Ring<kRightStages, kRightBytes> right{base + kRight, base + kBarriers + 2 * kLeftStages * 8};
    constexpr int kSecondRow = 32 * kParts;  // bytes of a row of b's channels, and of its weights
    const int thread = threadIdx.x, rank = cluster_rank();
    const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
    constexpr int kStep = kStepBytes / sizeof(T);  // channels
    const int chunks_a = problem.channels_a / kStep;
    const int channels = problem.channels_a + problem.channels_b;

    if (thread == 0) {
        // Every multiplying warp arrives at the barriers of its own block. For the weights, it also arrives at those of
        // the other block, because each block loads half of the weights for both.
        constexpr int kWarps = kConsumers * kGroupThreads / kWarp;
        left.initialise(kWarps);
        right.initialise(kCluster * kWarps);
        barrier_init_done();
    }
    meet_cluster();

    const int warp = uniform_warp();
    if (warp < kGroupThreads / kWarp) {
        registers_give<40>();
        // All threads of the warp run this code, so that the compiler knows that they have the same addresses.
        if (warp == 0) {
            constexpr int kShare = kTileOutputs / kCluster;
            for (int pair = cluster; pair < problem.pairs; pair += clusters) {
                const Origin origin = origin_of(problem, pair, rank);
                for (int chunk = 0; chunk <= chunks_a; ++chunk) {
                    const bool second = chunk == chunks_a;
                    const int row_bytes = second ? kSecondRow : kStepBytes;
                    const int taps = second ? kTapsOfStage<kSecondRow> : 1;
                    for (int tap_column = 0; tap_column < problem.kernel; ++tap_column) {
                        barrier_wait(left.empty(), left.parity ^ 1);
                        if (elected()) {
                            const int rows = kTileRows + problem.kernel - 1;
                            barrier_expect(left.full(), rows * kTileColumns * row_bytes);
                            tensor_load_4d(left.address(), second ? problem.b : problem.a, left.full(),
                                           second ? 0 : chunk * kStep, origin.x + tap_column - problem.padding,
                                           origin.y - problem.padding, origin.n);
                        }
                        left.advance();
                        for (int tap_row = 0; tap_row < problem.kernel; tap_row += taps) {
                            barrier_wait(right.empty(), right.parity ^ 1);
                            if (elected()) {
                                barrier_expect(right.full(), taps * kTileOutputs * row_bytes);
                                for (int more = 0; more < taps; ++more) {
                                    const int tap = (tap_row + more) * problem.kernel + tap_column;
                                    tensor_load_2d(right.address() + (more * kTileOutputs + rank * kShare) * row_bytes,
                                                   second ? problem.weight_b : problem.weight_a, right.full(),
                                                   tap * channels + chunk * kStep, origin.output + rank * kShare,
                                                   (1u << kCluster) - 1);
                                }
                            }
                            right.advance();
                        }
                    }
                }
            }
        }
    } else {
        registers_take<232>();
        const int group = warp / (kGroupThreads / kWarp) - 1, lane = thread % kWarp, member = thread % kGroupThreads;
        const float* bias = problem.bias;
        float sums[kTileOutputs / 2];
        constexpr bool kAddsUp = kSumsAreShort<T>;
        auto done_left = left;  // the stages that become empty next
        auto done_right = right;
        const auto give_back = [&](bool box) {
            if (lane < kCluster) barrier_arrive(done_right.empty(), lane);
            done_right.advance();
            if (!box) return;
            if (lane == 0) barrier_arrive(done_left.empty(), rank);
            done_left.advance();
        };
        for (int pair = cluster; pair < problem.pairs; pair += clusters) {
            const Origin origin = origin_of(problem, pair, rank);
            bool add = false;
            if constexpr (kAddsUp) {
#pragma unroll
                for (float& sum : sums) sum = 0.0f;
            }
            const auto multiply_chunk = [&](auto parts) {
                constexpr int kRow = 32 * decltype(parts)::value;  // bytes of its channels
                constexpr int kTaps = kTapsOfStage<kRow>;
                for (int tap_column = 0; tap_column < problem.kernel; ++tap_column) {
                    barrier_wait(left.full(), left.parity);
                    for (int tap_row = 0; tap_row < problem.kernel; tap_row += kTaps) {
                        barrier_wait(right.full(), right.parity);
                        const int first_row = group * kGroupRows + tap_row;
                        const uint64_t pixels =
                            factor_descriptor<kRow>(left.address() + first_row * kTileColumns * kRow);
                        const uint64_t weights = factor_descriptor<kRow>(right.address());
                        if constexpr (kAddsUp) {
                            add_products<T, decltype(parts)::value, kTaps>(sums, pixels, weights);
                            right.advance();
                            give_back(tap_row + kTaps == problem.kernel);
                        } else {
                            const bool first = !add;
                            group_fence(sums);
#pragma unroll
                            for (int part = 0; part < decltype(parts)::value; ++part) {
                                // A part is 32 bytes, or 2 of a descriptor's units of 16 bytes.
                                group_multiply_add<T>(sums, pixels + 2 * part, weights + 2 * part, add);
                                add = true;
                            }
                            group_commit();
                            right.advance();
                            // The products of one step are still running when the next step starts. Before the first
                            // step of a box, these are the last products of the previous box.
                            group_wait<1>(sums);
                            if (!first) give_back(tap_row == 0);
                        }
                    }
                    left.advance();
                }
            };
            for (int chunk = 0; chunk < chunks_a; ++chunk) multiply_chunk(Constant<kStepBytes / 32>{});
            multiply_chunk(Constant<kParts>{});
            if constexpr (!kAddsUp) {
                group_wait<0>(sums);
                give_back(true);
            }

            // 64 channels at a time go through shared memory, in the layout of a box.
            const int row = member / kWarp * 16 + sums_row(lane);
#pragma unroll
            for (int piece = 0; piece < kTileOutputs / kStepChannels; ++piece) {
                const int offset = kStore + (group * kPieces + piece % kPieces) * kPiece;
                if (member == 0) tensor_store_wait_read<kPieces - 1>();
                meet_at(1 + group, kGroupThreads);
#pragma unroll
                for (int part = 0; part < 8; ++part) {
                    const int output = piece * kStepChannels + part * 8 + sums_column(lane);
                    float2 added = make_float2(0.0f, 0.0f);
                    if (bias != nullptr) {
                        added = *reinterpret_cast<const float2*>(bias + origin.output + output);
                    }
                    float2 scale = make_float2(1.0f, 1.0f);
                    if constexpr (kAddsUp) {
                        scale = *reinterpret_cast<const float2*>(problem.scale + origin.output + output);
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int index = (piece * 8 + part) * 4 + 2 * half;
                        const uint32_t pair =
                            pack<Y>(sums[index] * scale.x + added.x, sums[index + 1] * scale.y + added.y);
                        const int pixel = row + 8 * half;
                        const int at =
                            offset + pixel * kStepBytes + ((part ^ (pixel & 7)) << 4) + 2 * sums_column(lane);
                        *reinterpret_cast<uint32_t*>(shared + at) = problem.relu ? rectify<Y>(pair) : pair;
                    }
                }
                make_writes_visible();
                meet_at(1 + group, kGroupThreads);
                if (member == 0) {
                    tensor_store_4d(problem.y, base + offset, origin.output + piece * kStepChannels, origin.x,
                                    origin.y + group * kGroupRows, origin.n);
                    tensor_store_commit();
                }
            }
        }
        if (member == 0) tensor_store_wait_read<0>();
    }
    // The memory of a block must exist until the other block has loaded into it and arrived at its barriers.
    meet_cluster();
#else
    __trap();  // raises an error at once: otherwise an unwritten result would look valid
#endif
}

// `scale` may be null where factors are of 16 bits.
template <typename T, typename Y, int kParts>
Status launch_tiles(const Convolution& arguments, const float* scale, cudaStream_t stream) {
    const int out_height = arguments.height + 2 * arguments.padding - arguments.kernel + 1;
    const int out_width = arguments.width + 2 * arguments.padding - arguments.kernel + 1;
    const int channels = arguments.channels_a + arguments.channels_b;
    Problem problem = {};
    // The driver's functions need a context. A thread has one only after it has used the runtime.
    Status status = make_context_current();
    if (!status) return status;
    const int rows = kTileRows + arguments.kernel - 1;
    constexpr int kStep = kStepBytes / sizeof(T), kSecond = 32 * kParts / sizeof(T);  // channels of a box of a, of b
    status = encode_image<T>(&problem.a, arguments.a, arguments.batch, arguments.height, arguments.width,
                             arguments.channels_a, rows, kTileColumns, kStep);
    if (!status) return status;
    status = encode_image<T>(&problem.b, arguments.b, arguments.batch, arguments.height, arguments.width,
                             arguments.channels_b, rows, kTileColumns, kSecond);
    if (!status) return status;
    status = encode_image<Y>(&problem.y, arguments.y, arguments.batch, out_height, out_width, arguments.outputs,
                             kGroupRows, kTileColumns, kStepChannels);
    if (!status) return status;
    const uint64_t sizes[] = {static_cast<uint64_t>(arguments.kernel) * arguments.kernel * channels,
                              static_cast<uint64_t>(arguments.outputs)};
    const uint64_t strides[] = {sizeof(T) * sizes[0]};
    const auto encode_weight = [&](CUtensorMap* map, uint32_t wide) {
        const uint32_t box[] = {wide, kTileOutputs / kCluster};
        return encode_tensor_map<T>(map, 2, arguments.weight, sizes, strides, box);
    };
    status = encode_weight(&problem.weight_a, kStep);
    if (!status) return status;
    status = encode_weight(&problem.weight_b, kSecond);
    if (!status) return status;

    problem.bias = arguments.bias;
    problem.scale = scale;
    problem.tiles_down = divide_up(out_height, kTileRows);
    problem.tiles_across = divide_up(out_width, kTileColumns);
    problem.output_blocks = arguments.outputs / kTileOutputs;
    const int64_t tiles = static_cast<int64_t>(arguments.batch) * problem.tiles_down * problem.tiles_across;
    const int64_t pairs = (tiles + kCluster - 1) / kCluster * problem.output_blocks;
    if (pairs == 0) return cudaSuccess;
    if (pairs > INT32_MAX / kCluster) return {cudaErrorInvalidValue, "pixels: accepted up to 2^31"};
    problem.pairs = static_cast<int>(pairs);
    problem.kernel = arguments.kernel;
    problem.padding = arguments.padding;
    problem.channels_a = arguments.channels_a;
    problem.channels_b = arguments.channels_b;
    problem.relu = arguments.relu;
    // The number of clusters can be less than half the multiprocessors: both blocks of a cluster run in the same group
    // of multiprocessors, and some groups have an odd number of them.
    int most = 0;
    const cudaError_t error = active_clusters(&most, concat_kernel<T, Y, kParts>, kThreads, kSharedBytes, kCluster);
    if (error != cudaSuccess) return error;
    if (most == 0) return {cudaErrorLaunchOutOfResources, "no cluster fits"};
    const int clusters = problem.pairs < most ? problem.pairs : most;
    return launch(concat_kernel<T, Y, kParts>, dim3(clusters * kCluster), kThreads, kSharedBytes, kCluster, stream,
                  problem);
}

}  // namespace hopper
}  // namespace fastden
