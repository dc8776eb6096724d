// A patch of the image in shared memory, with four positions for each pixel. So a row of taps is contiguous, and the
// inner dimension of a product runs along it. A row of a window begins at a multiple of 16 bytes if its first pixel is
// even.
#pragma once

#include "tile.cuh"

namespace fastden {

constexpr int kPixelBytes = 8;

struct ImageView {
    const void* data;
    int64_t strides[4];  // elements: image, channel, row, column
    int channels, height, width;
};

// Loads rows x columns pixels from (top, left) of image n. Outside the image, and in positions without a channel, it
// stores zeros.
__device__ __forceinline__ void load_patch(unsigned char* patch, const ImageView& view, int n, int top, int left,
                                           int rows, int columns, int thread, int threads) {
    const uint16_t* image = static_cast<const uint16_t*>(view.data) + n * view.strides[0];
    for (int index = thread; index < rows * columns; index += threads) {
        const int y = top + index / columns, x = left + index % columns;
        uint16_t values[4] = {};
        if (y >= 0 && y < view.height && x >= 0 && x < view.width) {
            const uint16_t* pixel = image + y * view.strides[2] + x * view.strides[3];
#pragma unroll
            for (int channel = 0; channel < 4; ++channel) {
                if (channel < view.channels) values[channel] = pixel[channel * view.strides[1]];
            }
        }
        *reinterpret_cast<uint2*>(patch + index * kPixelBytes) = make_uint2(
            values[0] | static_cast<uint32_t>(values[1]) << 16, values[2] | static_cast<uint32_t>(values[3]) << 16);
    }
}

// The weights of a tap, for up to four channels, as the four values of a pixel; zeros if there is no tap. `weight`
// points to the tap's first channel; with four channels (kFour) it is 8-byte aligned.
template <bool kFour>
__device__ __forceinline__ uint2 tap_values(const uint16_t* weight, int channels, bool exists) {
    if (!exists) return make_uint2(0, 0);
    if constexpr (kFour) return *reinterpret_cast<const uint2*>(weight);
    uint16_t values[3] = {};
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
        if (channel < channels) values[channel] = weight[channel];
    }
    return make_uint2(values[0] | static_cast<uint32_t>(values[1]) << 16, values[2]);
}

}  // namespace fastden
