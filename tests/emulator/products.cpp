// Matrix instructions: ldmatrix and mma.sync of a warp, wgmma of a warp group.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "machine.h"

namespace fastden::emulator {
namespace {

// Of e4m3, as integers: of sums and products in units of 2^-18, of factors in units of 2^-9, which divide them all.
constexpr float kUnit = 512.0f;
constexpr int kFractionBits = 13;
constexpr int kLeastExponent = 3;  // of a factor in units of 2^-9: subnormal numbers have 2^-6

int exponent(uint64_t magnitude) {
    return 63 - __builtin_clzll(magnitude);  // not of 0
}

// `value` without the bits below 2^(top - kFractionBits): it is cut, not rounded.
int64_t cut(int64_t value, int top) {
    const int64_t sign = value >> 63, mask = -(int64_t{1} << std::max(top - kFractionBits, 0));
    return ((((value ^ sign) - sign) & mask) ^ sign) - sign;
}

// sum + a b: all addends are cut to kFractionBits behind the largest exponent, and then the result behind its own. A
// product is not normalised: its exponent is the sum of its factors'.
float short_sum(float sum, const int32_t* a, const int32_t* b, int depth) {
    int64_t terms[33];
    int top = 0;
    for (int k = 0; k < depth; ++k) {
        terms[k] = static_cast<int64_t>(a[k]) * b[k];
        if (terms[k] == 0) continue;
        const int one = std::max(exponent(std::abs(a[k])), kLeastExponent);
        top = std::max(top, one + std::max(exponent(std::abs(b[k])), kLeastExponent));
    }
    terms[depth] = static_cast<int64_t>(static_cast<double>(sum) * kUnit * kUnit);
    if (terms[depth] != 0) top = std::max(top, exponent(std::abs(terms[depth])));
    int64_t total = 0;
    for (int k = 0; k <= depth; ++k) total += cut(terms[k], top);
    if (total != 0) total = cut(total, exponent(std::abs(total)));
    return static_cast<float>(static_cast<double>(total) / (kUnit * kUnit));
}

void execute(Block& block, const Product& product) {
    const int bytes = product.factor.bytes, depth = 32 / bytes;
    const auto value = [&](uint64_t descriptor, int row, int k) {
        const int swizzle = static_cast<int>(descriptor >> 62);
        if (swizzle == 0) fail("a descriptor without a swizzle");
        const int row_bytes = swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32;
        if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset");
        const uint32_t start = (descriptor & 0x3FFF) << 4;
        const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
        uint16_t bits = 0;
        const uint32_t place = start + row / 8 * stride + row % 8 * row_bytes + bytes * k;
        std::memcpy(&bits, at(block, swizzled(place, row_bytes), bytes), bytes);
        return product.factor.to_float(bits);
    };
    std::vector<float> a(64 * depth), b(product.columns * depth);
    for (int row = 0; row < 64 && product.left[0] == nullptr; ++row) {
        for (int k = 0; k < depth; ++k) a[row * depth + k] = value(product.a, row, k);
    }
    for (int thread = 0; thread < kGroup && product.left[0] != nullptr; ++thread) {
        for (int index = 0; index < 8; ++index) {
            const int row = thread / kWarp * 16 + thread % kWarp / 4 + index / 2 % 2 * 8;
            const int k = thread % 4 * 2 + index / 4 * 8 + index % 2;
            const uint32_t pair = product.left[thread][index / 2];
            a[row * depth + k] = product.factor.to_float(static_cast<uint16_t>(pair >> 16 * (index % 2)));
        }
    }
    for (int column = 0; column < product.columns; ++column) {
        for (int k = 0; k < depth; ++k) b[column * depth + k] = value(product.b, column, k);
    }
    const auto integers = [&](const std::vector<float>& factors) {
        std::vector<int32_t> found(factors.size());
        std::transform(factors.begin(), factors.end(), found.begin(),
                       [](float factor) { return std::isnan(factor) ? 0 : static_cast<int32_t>(factor * kUnit); });
        return found;
    };
    const bool is_short = bytes == 1;
    const std::vector<int32_t> short_a = is_short ? integers(a) : std::vector<int32_t>();
    const std::vector<int32_t> short_b = is_short ? integers(b) : std::vector<int32_t>();
    const auto has_nan = [&](const float* factors) {
        return std::any_of(factors, factors + depth, [](float factor) { return std::isnan(factor); });
    };
    std::vector<bool> nan_a(64), nan_b(product.columns);
    for (int row = 0; row < 64; ++row) nan_a[row] = has_nan(&a[row * depth]);
    for (int column = 0; column < product.columns; ++column) nan_b[column] = has_nan(&b[column * depth]);
    for (int thread = 0; thread < kGroup; ++thread) {
        for (int index = 0; index < product.columns / 2; ++index) {
            const int row = thread / kWarp * 16 + thread % kWarp / 4 + (index & 2 ? 8 : 0);
            const int column = index / 4 * 8 + thread % 4 * 2 + (index & 1);
            float sum = product.add ? product.sums[thread][index] : 0.0f;
            if (nan_a[row] || nan_b[column] || std::isnan(sum)) {
                sum = std::numeric_limits<float>::quiet_NaN();
            } else if (is_short) {
                sum = short_sum(sum, &short_a[row * depth], &short_b[column * depth], depth);
            } else {
                for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[column * depth + k];
            }
            product.sums[thread][index] = sum;
        }
    }
}

// All but the last `pending` groups of products.
void multiply_groups(Block& block, WarpGroup& all, int pending) {
    for (; static_cast<int>(all.committed.size()) > pending; all.committed.pop_front()) {
        for (const Product& product : all.committed.front()) execute(block, product);
    }
}

void begin_product(float* sums, const uint32_t* left, int columns, uint64_t a, uint64_t b, bool add, Factor factor) {
    WarpGroup& all = group();
    all.product.sums[self().position.thread.x % kGroup] = sums;
    all.product.left[self().position.thread.x % kGroup] = left;
    meet(all.meeting, kGroup, [&] {
        all.product.columns = columns;
        all.product.a = a;
        all.product.b = b;
        all.product.add = add;
        all.product.factor = factor;
        all.open.push_back(all.product);
    });
}

}  // namespace

void load_matrices(uint32_t* values, uint32_t address) {
    Warp& all = warp();
    all.address[lane()] = address;
    all.values[lane()] = values;
    meet(all.meeting, kWarp, [&] {
        ++counted.matrix_loads;
        for (int matrix = 0; matrix < 4; ++matrix) {
            int used[8] = {};
            for (int row = 0; row < 8; ++row) {
                const uint32_t start = all.address[matrix * 8 + row];
                if (start % 16 != 0) fail("a matrix row that is not aligned");
                const unsigned char* found = at(start, 16);
                bool again = false;
                for (int before = 0; before < row; ++before) again |= all.address[matrix * 8 + before] == start;
                if (!again) ++used[start / 16 % 8];
                for (int part = 0; part < 4; ++part) {
                    std::memcpy(&all.values[row * 4 + part][matrix], found + 4 * part, 4);
                }
            }
            counted.conflicts += *std::max_element(used, used + 8) - 1;
        }
    });
}

void multiply_add(float* sums, const uint32_t* a, uint32_t b0, uint32_t b1, float (*to_float)(uint16_t)) {
    Warp& all = warp();
    all.sums[lane()] = sums;
    all.a[lane()] = a;
    all.b[lane()][0] = b0;
    all.b[lane()][1] = b1;
    meet(all.meeting, kWarp, [&] {
        ++counted.multiplications;
        float left[16][16], right[16][8];
        const auto half = [&](uint32_t pair, int which) { return to_float(static_cast<uint16_t>(pair >> 16 * which)); };
        for (int thread = 0; thread < kWarp; ++thread) {
            const int row = thread / 4, column = thread % 4 * 2;
            for (int index = 0; index < 8; ++index) {
                const int down = index / 2 % 2 * 8, across = index / 4 * 8, odd = index % 2;
                left[row + down][column + across + odd] = half(all.a[thread][index / 2], odd);
            }
            for (int index = 0; index < 4; ++index) {
                right[column + index / 2 * 8 + index % 2][row] = half(all.b[thread][index / 2], index % 2);
            }
        }
        for (int thread = 0; thread < kWarp; ++thread) {
            for (int index = 0; index < 4; ++index) {
                const int row = thread / 4 + index / 2 * 8, column = thread % 4 * 2 + index % 2;
                float sum = all.sums[thread][index];
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                all.sums[thread][index] = sum;
            }
        }
    });
}

void group_multiply_add(float* sums, int columns, uint64_t a, uint64_t b, bool add, Factor factor) {
    begin_product(sums, nullptr, columns, a, b, add, factor);
}

void group_multiply_add(float* sums, int columns, const uint32_t* a, uint64_t b, bool add, Factor factor) {
    begin_product(sums, a, columns, 0, b, add, factor);
}

void group_commit() {
    WarpGroup& all = group();
    Block& block = *self().block;
    meet(all.meeting, kGroup, [&] {
        all.committed.push_back(std::move(all.open));
        all.open.clear();
        // At once at times: a factor that is not there yet shows only so.
        if (draw() % 2 == 0) multiply_groups(block, all, 0);
    });
}

void group_wait(int pending) {
    WarpGroup& all = group();
    Block& block = *self().block;
    meet(all.meeting, kGroup, [&] { multiply_groups(block, all, pending); });
}

}  // namespace fastden::emulator
