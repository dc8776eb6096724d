// Matrix products of a warp on tiles in shared memory, and the positions of their values.
//
// A row of a tile holds 32 channels of 16 bits: 64 bytes in 4 parts of 16. Part p of row r lies at position p ^ (r / 2
// % 4). So the eight rows that one ldmatrix reads use each of the 32 banks once.
#pragma once

#include "platform.cuh"

namespace fastden {

constexpr int kWarp = 32;
constexpr int kChunk = 32;  // channels in a step of the inner dimension
constexpr int kRowBytes = 2 * kChunk;

__device__ __forceinline__ uint32_t part_offset(int row, int part) {
    return row * kRowBytes + ((part ^ ((row >> 1) & 3)) << 4);
}

// The offset in the tile of a lane's matrix row for load_matrices, for the 16x16 block that begins at `row`. The rows
// of the left half come first, then those of the right half: multiply_add needs its first factor in this order. The
// block two parts further is at ^ 32, and the block 16 rows below is at + 16 kRowBytes, so a step needs only one
// addition for its addresses.
__device__ __forceinline__ uint32_t left_offset(int row, int lane) {
    return part_offset(row + (lane & 15), lane >> 4);
}

// The same for the second factor, which is stored as columns x channels: 16 columns are two of its 16x8 blocks.
__device__ __forceinline__ uint32_t right_offset(int column, int lane) {
    return part_offset(column + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// sums += rows (16 kRows of them) x columns (8 kColumns), over one step of the inner dimension. `left` has an address
// for each block of 16 rows: that of the tile plus left_offset. `right` is that of the tile plus right_offset of the
// first column.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&sums)[kRows][kColumns][4], const uint32_t (&left)[kRows],
                                              uint32_t right) {
    static_assert(kColumns % 2 == 0);
#pragma unroll
    for (int part = 0; part < 4; part += 2) {
        uint32_t b[kColumns / 2][4];
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j) load_matrices(b[j], (right ^ (part << 4)) + 16 * j * kRowBytes);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            uint32_t a[4];
            load_matrices(a, left[i] ^ (part << 4));
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                multiply_add<T>(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// The same for consecutive rows.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void multiply_step(float (&sums)[kRows][kColumns][4], uint32_t left, uint32_t right) {
    uint32_t blocks[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) blocks[i] = left + 16 * i * kRowBytes;
    multiply_rows<T>(sums, blocks, right);
}

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(float (&sums)[kRows][kColumns][4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
            for (int index = 0; index < 4; ++index) sums[i][j][index] = 0.0f;
        }
    }
}

// The output channel of column `column`, for groups of 32 channels. In this order, a lane's values in four neighbouring
// 16x8 blocks of sums belong to eight consecutive channels, from 8 (lane % 4) on. A lane loads or stores these 16 bytes
// at once.
__device__ __forceinline__ int channel_of_column(int column) {
    return (column & ~31) + ((column & 6) << 2) + ((column >> 2) & 6) + (column & 1);
}

// Row and column of a lane's first value in a 16x8 block of sums. The second lies right of it; two more lie 8 rows
// below.
__device__ __forceinline__ int sums_row(int lane) {
    return lane >> 2;
}
__device__ __forceinline__ int sums_column(int lane) {
    return (lane & 3) << 1;
}

}  // namespace fastden
