// The operators as plain functions: raw pointers, sizes, a stream. Nothing here knows of PyTorch.
//
// Activations are NHWC: (batch, height, width, channels), channels innermost, without gaps, 16-byte aligned. Storage is
// float16 or bfloat16, sums and biases are float32. Every function launches on the given stream of the current device,
// does not synchronise, and can be captured in a CUDA graph. It returns the first error and leaves none behind in the
// CUDA runtime, where PyTorch would take it for that of its own next call. Sizes are of the tensors; addresses are
// computed in 64 bits. A batch of zero images launches nothing. Weights lie as PyTorch's do in channels-last memory, so
// that nothing is rearranged for a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastden {

enum class DType { kFloat16, kBFloat16, kFloat32 };

// How a launch went.
struct Status {
    cudaError_t error = cudaSuccess;
    // What the error does not say: a function of the driver and its result by name, or a limit of the kernel.
    const char* detail = nullptr;

    Status() = default;
    Status(cudaError_t error, const char* detail = nullptr) : error(error), detail(detail) {}
    explicit operator bool() const { return error == cudaSuccess; }
};

// relu(conv2d(cat(a, b), weight) + bias + residual), batch normalisation folded into weight and bias.
// channels_a, channels_b and outputs are multiples of 8, kernel is at most 5; less than 2^31 pixels, padding included.
struct Convolution {
    const void* a;         // (batch, height, width, channels_a)
    const void* b;         // (batch, height, width, channels_b), or null
    const void* weight;    // (outputs, kernel, kernel, channels_a + channels_b)
    const float* bias;     // (outputs), or null
    const void* residual;  // of the shape of y, or null
    void* y;               // (batch, out_height, out_width, outputs)
    DType dtype;           // of all but the bias
    int batch, height, width;
    int channels_a, channels_b, outputs;
    int kernel, stride, padding;
    bool relu;
};

Status conv_bn_relu(const Convolution& arguments, cudaStream_t stream);         // b is null
Status concat_conv_bn_relu(const Convolution& arguments, cudaStream_t stream);  // stride 1, no residual

// relu(conv2d(cat(a, b), weight) + bias), kernel 3, padding 1, on compute capability 9.0: both factors of the products
// are rounded to e4m3 (8-bit floating point), a channel of a or b in steps that make its range 448, e4m3's largest
// number; what lies beyond becomes 448. Each output's weights are rounded in steps of their own.
// channels_a is 128, channels_b 32, outputs a multiple of 256; less than 2^31 pixels, padding included.
struct Fp8Convolution {
    const void* a;        // (batch, height, width, channels_a)
    const void* b;        // (batch, height, width, channels_b)
    const void* weight;   // (outputs, 3, 3, channels_a + channels_b)
    const float* ranges;  // (channels_a + channels_b): the largest magnitude that is expected
    const float* bias;    // (outputs), or null
    void* y;              // (batch, height, width, outputs)
    void* workspace;      // workspace_bytes(), overwritten
    DType dtype;          // of all but the ranges and the bias
    int batch, height, width;
    int channels_a, channels_b, outputs;
    bool relu;
};

int64_t workspace_bytes(const Fp8Convolution& arguments);
Status concat_conv_fp8(const Fp8Convolution& arguments, cudaStream_t stream);

// Transposed convolution of kernel 4, stride 2, padding 1. channels and outputs are multiples of 8.
struct Upsampling {
    const void* x;       // (batch, height, width, channels)
    const void* weight;  // (outputs, 4, 4, channels)
    const float* bias;   // (outputs), or null
    void* y;             // (batch, 2 height, 2 width, outputs)
    DType dtype;
    int batch, height, width;
    int channels, outputs;
};

Status upsample(const Upsampling& arguments, cudaStream_t stream);

// relu(x + expand(relu(conv(relu(reduce(x)))))), batch normalisation folded.
// middle is 32 or 64, channels a multiple of 32.
struct Bottleneck {
    const void* x;             // (batch, height, width, channels)
    const void* reduce;        // (middle, channels)
    const void* conv;          // (middle, 3, 3, middle)
    const void* expand;        // (channels, middle)
    const float* reduce_bias;  // (middle), or null
    const float* conv_bias;    // (middle), or null
    const float* expand_bias;  // (channels), or null
    void* y;                   // of the shape of x
    DType dtype;
    int batch, height, width;
    int channels, middle;
};

Status bottleneck(const Bottleneck& arguments, cudaStream_t stream);

// conv1 o conv0 on the padded image, see fastden::algebra.compose_stem. channels is at most 4, outputs a multiple of 8
// and at most 128.
struct Stem {
    const void* x;         // (batch, channels, height, width), elements x_strides apart
    int64_t x_strides[4];  // elements
    const void* weight;    // (4, outputs, 7, 7, channels): inside, first row, first column, corner
    const float* bias;     // (4, outputs)
    void* y;               // (batch, (height - 4) / 2, (width - 4) / 2, outputs)
    DType dtype;
    int batch, channels, height, width;  // height and width even, at least 8
    int outputs;
    bool relu;
};

Status stem(const Stem& arguments, cudaStream_t stream);

// out o cat(conv0, up3), plus the image. channels is at most 4, outputs at most 4, maps a multiple of 16.
struct Head {
    const void* features;      // (batch, height, width, maps)
    const void* x;             // (batch, channels, 2 height + 4, 2 width + 4), elements x_strides apart
    int64_t x_strides[4];      // elements
    const void* image;         // what is added, of the size of x with at least outputs channels; null for nothing
    int64_t image_strides[4];  // elements
    DType image_dtype;         // of image and y: dtype or float32
    const void* weight;        // (4 outputs, 4, 4, maps): row 4 k + 2 p + q is output k of phase row p and column q
    const void* image_weight;  // (outputs, 7, 7, channels)
    const float* bias;         // (outputs)
    void* y;                   // (batch, outputs, 2 height - 2, 2 width - 2), contiguous
    DType dtype;               // of features, x and the weights
    int batch, height, width;  // of the features
    int maps, channels, outputs;
    bool clamp;     // to [0, 1]
    bool composed;  // phase row 0 has no weight on the last row of its taps, phase row 1 none on the first
};

Status head(const Head& arguments, cudaStream_t stream);

}  // namespace fastden
