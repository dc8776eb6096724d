// head: out o cat(conv0, up3) plus the image, from the last feature map and the padded input.
//
// Rows of the product are positions of the feature map. Columns are the values that a position makes: 2 x 2 pixels in
// each channel, 8 columns for each row of pixels. A warp makes 8 lines of 16 positions. It reads a line of features
// from shared memory at one of four shifts, and multiplies it for every line of positions that needs it. The weights of
// this shift are in registers. So three reads of shared memory serve ten products. The 7x7 convolution of the input is
// one more step; it reads its windows without unfolding them (see patch.cuh). The result goes through shared memory,
// line by line.
#include "fastden.h"
#include "patch.cuh"

namespace fastden {
namespace {

constexpr int kWarpRows = 8;
constexpr int kWarpsDown = 2, kWarpsAcross = 2;
constexpr int kThreads = kWarp * kWarpsDown * kWarpsAcross;
constexpr int kTileRows = kWarpRows * kWarpsDown;  // positions
constexpr int kTileColumns = 16 * kWarpsAcross;
constexpr int kTaps = 4;  // down and across
constexpr int kColumns = 16;
constexpr int kMaps = 16;  // maps in a step
constexpr int kMapBytes = 2 * kMaps;
constexpr int kMarginRows = kTileRows + kTaps - 1, kMarginColumns = kTileColumns + kTaps - 1;
constexpr int kMarginPixels = kMarginRows * kMarginColumns;
constexpr int kWindow = 8;  // side of a position's window in the input
constexpr int kPatchRows = 2 * kTileRows + kWindow - 2, kPatchColumns = 2 * kTileColumns + kWindow - 2;
constexpr int kPatchBytes = kPatchRows * kPatchColumns * kPixelBytes;
constexpr int kFeatureBytes = kMarginPixels * kMapBytes;
// A stage holds the features and weights of a step, or a patch of the input and its weights. Both have the same sizes.
constexpr int kLeftBytes = divide_up(kFeatureBytes > kPatchBytes ? kFeatureBytes : kPatchBytes, 128) * 128;
constexpr int kRightBytes = kTaps * kTaps * kColumns * kMapBytes;
static_assert(kRightBytes == kWindow * kColumns * kRowBytes);
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kStages = 3;
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kPasses = divide_up(2 * kMarginPixels, kThreads);
constexpr int kLine = 2 * kTileColumns + 2;  // floats between the result's lines
static_assert(4 * 2 * kTileRows * kLine * 4 <= kSharedBytes);

struct Problem {
    Head arguments;
    ImageView x;
    int tiles_down, tiles_across;
};

// For rows of 32 bytes: part p of row r lies at position p ^ (r / 4 % 2), so that eight consecutive rows use each bank
// once.
__device__ __forceinline__ uint32_t half_offset(int row, int part) {
    return row * kMapBytes + ((part ^ ((row >> 2) & 1)) << 4);
}

// Weights of the input: 16 columns x (8 taps x 4 positions) for each row of a window. A thread has one column and one
// position of a row in all rows.
template <bool kFour>
__device__ __forceinline__ void load_image_weights(unsigned char* shared, const Head& p, int thread) {
    constexpr int kPixels = kChunk / 4, kTapsAcross = 7;  // pixels in a row of a window; taps of the 7x7 convolution
    static_assert(kThreads == kColumns * kPixels);
    const int pixel = thread % kPixels, column = thread / kPixels;
    const int output = column % 8 % p.outputs, phase_column = column % 8 / p.outputs, phase_row = column / 8;
    const int tap = pixel - phase_column;
    const bool in_row = phase_column < 2 && tap >= 0 && tap < kTapsAcross;
    const int channels = kFour ? 4 : p.channels;
    // Of the window's first row, which the second phase row does not have.
    const int64_t first = static_cast<int64_t>((output * kTapsAcross - phase_row) * kTapsAcross + tap) * channels;
    const uint16_t* const weight = static_cast<const uint16_t*>(p.image_weight);
    unsigned char* const target = shared + part_offset(column, pixel / 2) + pixel % 2 * kPixelBytes;
#pragma unroll
    for (int row = 0; row < kWindow; ++row) {
        const int tap_row = row - phase_row;
        const bool exists = in_row && tap_row >= 0 && tap_row < kTapsAcross;
        *reinterpret_cast<uint2*>(target + row * kColumns * kRowBytes) =
            tap_values<kFour>(weight + (first + row * kTapsAcross * channels), channels, exists);
    }
}

// kComposed: phase row 0 has no weight on the last row of its taps, and phase row 1 has none on the first.
template <typename T, bool kComposed>
__global__ void __launch_bounds__(kThreads) head_kernel(const __grid_constant__ Problem problem) {
    const Head& p = problem.arguments;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    const int warp_row = warp / kWarpsAcross * kWarpRows, warp_column = warp % kWarpsAcross * 16;
    const int line = blockIdx.x / problem.tiles_across, n = line / problem.tiles_down;
    const int top = line % problem.tiles_down * kTileRows, left = blockIdx.x % problem.tiles_across * kTileColumns;
    const T* features = static_cast<const T*>(p.features) + static_cast<int64_t>(n) * p.height * p.width * p.maps;
    const T* weight = static_cast<const T*>(p.weight);
    unsigned char* shared = shared_memory();
    const uint32_t base = shared_address(shared);

    const int part = thread % 2;
    int pixels[kPasses];  // indices of positions in the feature map, 32 bits (elements: 64 bits); -1 outside
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = (pass * kThreads + thread) / 2;
        const int y = top - 1 + row / kMarginColumns, x = left - 1 + row % kMarginColumns;
        const bool inside = row < kMarginPixels && y >= 0 && y < p.height && x >= 0 && x < p.width;
        pixels[pass] = inside ? y * p.width + x : -1;
    }
    // This thread copies these weights: a part of 16 bytes of one column, for every fourth tap.
    static_assert(kThreads / 2 % kColumns == 0);
    const int column = thread / 2 % kColumns;
    const bool has_weights = column % 8 < 2 * p.outputs;
    const int of_output = 4 * (column % 8 % p.outputs) + 2 * (column / 8) + column % 8 / p.outputs;
    const T* const column_weights =
        weight + (has_weights ? static_cast<int64_t>(of_output) * (kTaps * kTaps) * p.maps : 0);
    const int steps = p.maps / kMaps;
    const auto copy_step = [&](int step) {
        if (step < steps) {
            const uint32_t stage = base + step % kStages * kStageBytes;
            const int map = step * kMaps + part * 8;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int row = (pass * kThreads + thread) / 2;
                if (row >= kMarginPixels) continue;
                const bool inside = pixels[pass] >= 0;
                copy_async(stage + half_offset(row, part),
                           inside ? features + static_cast<int64_t>(pixels[pass]) * p.maps + map : features, inside);
            }
#pragma unroll
            for (int row = thread / 2; row < kTaps * kTaps * kColumns; row += kThreads / 2) {
                copy_async(stage + kLeftBytes + half_offset(row, part), column_weights + row / kColumns * p.maps + map,
                           has_weights);
            }
        }
        copy_commit();  // also if the group is empty, because copy_wait counts groups
    };
    for (int ahead = 0; ahead < kStages - 1; ++ahead) copy_step(ahead);

    // The last stage is free until then, and holds the input.
    unsigned char* patch = shared + (kStages - 1) * kStageBytes;
    load_patch(patch, problem.x, n, 2 * top, 2 * left, kPatchRows, kPatchColumns, thread, kThreads);
    if (p.channels == 4) {
        load_image_weights<true>(patch + kLeftBytes, p, thread);
    } else {
        load_image_weights<false>(patch + kLeftBytes, p, thread);
    }
    __syncthreads();
    float sums[kWarpRows][2][4];
    clear(sums);
    const uint32_t window = shared_address(patch) +
                            (2 * warp_row * kPatchColumns + 2 * (warp_column + (lane & 15))) * kPixelBytes +
                            (lane >> 4) * 16;
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        uint32_t b[kWindow][4];
#pragma unroll
        for (int row = 0; row < kWindow; ++row) {
            load_matrices(b[row], ((shared_address(patch) + kLeftBytes + right_offset(0, lane)) ^ (half << 4)) +
                                      row * kColumns * kRowBytes);
        }
#pragma unroll
        for (int row = 0; row < 2 * kWarpRows + kWindow - 2; ++row) {
            uint32_t a[4];
            load_matrices(a, window + row * kPatchColumns * kPixelBytes + half * 16);
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                const int tap = row - 2 * i;
                if (tap < 0 || tap >= kWindow) continue;
                multiply_add<T>(sums[i][0], a, b[tap][0], b[tap][1]);
                multiply_add<T>(sums[i][1], a, b[tap][2], b[tap][3]);
            }
        }
    }

    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        // After this barrier, each thread's part of this step is there, and no thread reads the stage overwritten next.
        __syncthreads();
        copy_step(step + kStages - 1);
        const uint32_t stage = base + step % kStages * kStageBytes;
#pragma unroll 1
        for (int shift = 0; shift < kTaps; ++shift) {
            uint32_t b[kTaps][4];
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                const int row = (tap * kTaps + shift) * kColumns + (lane & 7) + ((lane >> 4) << 3);
                load_matrices(b[tap], stage + kLeftBytes + half_offset(row, (lane >> 3) & 1));
            }
#pragma unroll
            for (int row = 0; row < kWarpRows + kTaps - 1; ++row) {
                uint32_t a[4];
                const int first = (warp_row + row) * kMarginColumns + warp_column + shift;
                load_matrices(a, stage + half_offset(first + (lane & 15), lane >> 4));
#pragma unroll
                for (int i = 0; i < kWarpRows; ++i) {
                    const int tap = row - i;
                    if (tap < 0 || tap >= kTaps) continue;
                    if (!kComposed || tap < kTaps - 1) multiply_add<T>(sums[i][0], a, b[tap][0], b[tap][1]);
                    if (!kComposed || tap > 0) multiply_add<T>(sums[i][1], a, b[tap][2], b[tap][3]);
                }
            }
        }
    }
    copy_wait<0>();
    __syncthreads();

    float* result = reinterpret_cast<float*>(shared);  // (outputs, 2 kTileRows, kLine)
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
        for (int phase_row = 0; phase_row < 2; ++phase_row) {
#pragma unroll
            for (int index = 0; index < 4; ++index) {
                const int column = sums_column(lane) + index % 2,
                          position = warp_column + index / 2 * 8 + sums_row(lane);
                const int output = column % p.outputs, phase_column = column / p.outputs;
                if (phase_column >= 2) continue;
                const int at = (output * 2 * kTileRows + 2 * (warp_row + i) + phase_row) * kLine + 2 * position;
                result[at + phase_column] = sums[i][phase_row][index];
            }
        }
    }
    __syncthreads();
    const int out_height = 2 * p.height - 2, out_width = 2 * p.width - 2;
    const bool wide = p.image_dtype == DType::kFloat32;
    constexpr int kLines = 2 * kTileRows, kAcross = 2 * kTileColumns;
    for (int index = thread; index < p.outputs * kLines * kAcross; index += kThreads) {
        const int across = index % kAcross, down = index / kAcross % kLines, output = index / kAcross / kLines;
        const int y = 2 * top + down, x = 2 * left + across;
        if (y >= out_height || x >= out_width) continue;
        float value = result[(output * kLines + down) * kLine + across] + p.bias[output];
        if (p.image != nullptr) {
            // The image has three more pixels than the result on each side.
            const int64_t offset = n * p.image_strides[0] + output * p.image_strides[1] + (y + 3) * p.image_strides[2] +
                                   (x + 3) * p.image_strides[3];
            value +=
                wide ? static_cast<const float*>(p.image)[offset] : to_float(static_cast<const T*>(p.image)[offset]);
        }
        // These are comparisons, because fminf and fmaxf would hide a NaN.
        if (p.clamp) value = value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value;
        const int64_t offset = ((static_cast<int64_t>(n) * p.outputs + output) * out_height + y) * out_width + x;
        if (wide) {
            static_cast<float*>(p.y)[offset] = value;
        } else {
            static_cast<T*>(p.y)[offset] = static_cast<T>(value);
        }
    }
}

template <typename T>
Status launch_for(const Problem& problem, int blocks, cudaStream_t stream) {
    const auto kernel = problem.arguments.composed ? head_kernel<T, true> : head_kernel<T, false>;
    return launch(kernel, dim3(blocks), kThreads, kSharedBytes, 1, stream, problem);
}

}  // namespace

Status head(const Head& arguments, cudaStream_t stream) {
    const int64_t pixels = static_cast<int64_t>(arguments.height) * arguments.width;
    if (arguments.channels > 4 || arguments.outputs > 4 || arguments.maps % kMaps != 0 || pixels > INT32_MAX ||
        (arguments.image_dtype != arguments.dtype && arguments.image_dtype != DType::kFloat32)) {
        return cudaErrorInvalidValue;
    }
    Problem problem = {};
    problem.arguments = arguments;
    problem.x.data = arguments.x;
    for (int index = 0; index < 4; ++index) problem.x.strides[index] = arguments.x_strides[index];
    problem.x.channels = arguments.channels;
    problem.x.height = 2 * arguments.height + 4;
    problem.x.width = 2 * arguments.width + 4;
    problem.tiles_down = divide_up(arguments.height - 1, kTileRows);
    problem.tiles_across = divide_up(arguments.width - 1, kTileColumns);
    const int64_t blocks = static_cast<int64_t>(arguments.batch) * problem.tiles_down * problem.tiles_across;
    if (blocks <= 0) return cudaSuccess;
    if (blocks > INT32_MAX) return {cudaErrorInvalidValue, "pixels: accepted up to 2^31"};
    return for_dtype(arguments.dtype,
                     [&](auto zero) { return launch_for<decltype(zero)>(problem, static_cast<int>(blocks), stream); });
}

}  // namespace fastden
