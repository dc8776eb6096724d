// The operators of fastden.h for PyTorch. Only this file includes PyTorch's headers. It checks arguments, brings
// tensors and weights into the layout that kernels read, allocates results, and launches on the current stream of the
// inputs' device.
//
// With FASTDEN_EMULATED the kernels run on the CPU (tests/emulator), and the operators are those of CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "fastden.h"

#ifndef FASTDEN_EMULATED
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

#ifdef FASTDEN_EMULATED
#define FASTDEN_KEY CPU

struct Device {
    explicit Device(const Tensor&) {}

    cudaStream_t stream = nullptr;
};

const char* error_string(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "invalid argument" : "of the emulated runtime";
}
#else
#define FASTDEN_KEY CUDA

// Makes the device of a tensor the current one, and holds its current stream.
struct Device {
    explicit Device(const Tensor& x)
        : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()) {}

    c10::cuda::CUDAGuard guard;
    cudaStream_t stream;
};

const char* error_string(cudaError_t error) {
    return cudaGetErrorString(error);
}
#endif

void check_launch(const char* name, const fastden::Status& status) {
    if (status.detail != nullptr) {
        TORCH_CHECK(status, name, ": CUDA error: ", error_string(status.error), " (", status.detail, ")");
    } else {
        TORCH_CHECK(status, name, ": CUDA error: ", error_string(status.error));
    }
}

// Numbers for messages. A stream would look for them in the facets of a locale, and where a process holds two copies of
// the C++ library that look-up can end in a segmentation fault (suspected on one machine).
std::string text(int64_t number) {
    return std::to_string(number);
}

std::string text(at::IntArrayRef shape) {
    std::string all;
    for (const int64_t size : shape) {
        all += (all.empty() ? "" : ", ") + std::to_string(size);
    }
    return "[" + all + "]";
}

void check_rank(const char* name, const Tensor& x, int64_t rank) {
    TORCH_CHECK_VALUE(x.dim() == rank, name, ": shape ", text(x.sizes()), "; accepted: ", text(rank), " dimensions");
}

void check_shape(const char* name, const Tensor& x, at::IntArrayRef accepted) {
    TORCH_CHECK_VALUE(x.sizes() == accepted, name, ": shape ", text(x.sizes()), "; accepted: ", text(accepted));
}

void check_multiple(const char* name, int64_t value, int64_t of, int64_t most = std::numeric_limits<int>::max()) {
    TORCH_CHECK_VALUE(value > 0 && value % of == 0 && value <= most, name, ": ", text(value),
                      "; accepted: a multiple of ", text(of),
                      most < std::numeric_limits<int>::max() ? " up to " + std::to_string(most) : "");
}

// Checks that x has the device and the dtype of `first`.
void check_like(const char* name, const Tensor& x, const Tensor& first) {
    TORCH_CHECK_VALUE(x.device() == first.device(), name, ": on ", x.device(), "; accepted: ", first.device());
    TORCH_CHECK_TYPE(x.scalar_type() == first.scalar_type(), name, ": dtype ", x.scalar_type(),
                     "; accepted: ", first.scalar_type());
}

fastden::DType half(const char* name, const Tensor& x) {
    const auto type = x.scalar_type();
    TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16, name, ": dtype ", type, "; accepted: Half, BFloat16");
    return type == at::kHalf ? fastden::DType::kFloat16 : fastden::DType::kBFloat16;
}

int narrow(const char* name, int64_t value) {
    TORCH_CHECK_VALUE(value <= std::numeric_limits<int>::max(), name, ": size ", text(value),
                      "; accepted: less than 2^31");
    return static_cast<int>(value);
}

// x in the memory order that kernels read, 16-byte aligned; x itself if it is so already.
Tensor dense(const Tensor& x, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
    const Tensor y = x.contiguous(order);
    return reinterpret_cast<std::uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone(order);
}

Tensor channels_last(const Tensor& x) {
    return dense(x, at::MemoryFormat::ChannelsLast);
}

// A bias: checked, converted to float32 and dense. Its dtype may be float32 or that of `first`.
Tensor biases_of(const char* name, const Tensor& x, at::IntArrayRef accepted, const Tensor& first) {
    TORCH_CHECK_VALUE(x.device() == first.device(), name, ": on ", x.device(), "; accepted: ", first.device());
    TORCH_CHECK_TYPE(x.scalar_type() == first.scalar_type() || x.scalar_type() == at::kFloat, name, ": dtype ",
                     x.scalar_type(), "; accepted: ", first.scalar_type(), ", Float");
    check_shape(name, x, accepted);
    return dense(x.to(at::kFloat));
}

// The same for an optional bias; undefined if there is none.
Tensor optional_biases(const char* name, const Optional& x, int64_t size, const Tensor& first) {
    return x.has_value() ? biases_of(name, *x, at::IntArrayRef{size}, first) : Tensor();
}

// Rounds up to a multiple of 8, the channels that one step of the kernels takes.
int64_t whole(int64_t channels) {
    return (channels + 7) / 8 * 8;
}

// Pads the channels of a feature map, or a vector, with zeros up to `size`; x itself if it has this size already.
Tensor padded(const Tensor& x, int64_t size) {
    if (!x.defined()) return x;
    const int64_t more = size - x.size(x.dim() == 4 ? 1 : 0);
    if (more == 0) return x;
    return x.dim() == 4 ? at::constant_pad_nd(x, {0, 0, 0, 0, 0, more}) : at::constant_pad_nd(x, {0, more});
}

// The first channels of a result.
Tensor cut(const Tensor& y, int64_t channels) {
    return y.size(1) == channels ? y : y.narrow(1, 0, channels).contiguous(at::MemoryFormat::ChannelsLast);
}

const void* pointer(const Tensor& x) {
    return x.defined() ? x.const_data_ptr() : nullptr;
}

const float* floats(const Tensor& x) {
    return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

void copy_strides(const Tensor& x, int64_t (&strides)[4]) {
    std::copy_n(x.strides().begin(), 4, strides);
}

// If a number of channels is not a multiple of 8, zeros fill it up. This costs copies. In the network, only the first
// and the last layer of the plain form need this. `name` is that of the first source.
Tensor convolution(const char* name, const Tensor& a, const Optional& b, const Tensor& weight, const Optional& bias,
                   const Optional& residual, bool relu, int64_t stride, int64_t padding) {
    const fastden::DType dtype = half(name, a);
    check_rank(name, a, 4);
    check_rank("weight", weight, 4);
    check_like("weight", weight, a);
    const int64_t batch = a.size(0), height = a.size(2), width = a.size(3);
    const int64_t outputs = weight.size(0), kernel = weight.size(2);
    int64_t others = 0;
    if (b.has_value()) {
        check_like("b", *b, a);
        check_rank("b", *b, 4);
        others = b->size(1);
        check_shape("b", *b, {batch, others, height, width});
    }
    const int64_t channels = a.size(1);
    check_shape("weight", weight, {outputs, channels + others, kernel, kernel});
    TORCH_CHECK_VALUE(channels >= 1 && outputs >= 1, "weight: shape ", text(weight.sizes()),
                      "; accepted: no empty dimension");
    TORCH_CHECK_VALUE(kernel <= 5, "weight: kernel of ", text(kernel), "; accepted: up to 5");
    TORCH_CHECK_VALUE(stride >= 1, "stride: ", text(stride), "; accepted: at least 1");
    TORCH_CHECK_VALUE(padding >= 0, "padding: ", text(padding), "; accepted: at least 0");
    TORCH_CHECK_VALUE(std::min(height, width) + 2 * padding >= kernel && kernel >= 1, name, ": shape ", text(a.sizes()),
                      "; accepted: height and width of at least ", text(kernel - 2 * padding));
    const Device device(a);
    const int64_t out_height = (height + 2 * padding - kernel) / stride + 1;
    const int64_t out_width = (width + 2 * padding - kernel) / stride + 1;
    const int64_t wide = whole(outputs), wide_a = whole(channels), wide_b = whole(others);
    Tensor y = at::empty({batch, wide, out_height, out_width}, a.options(), at::MemoryFormat::ChannelsLast);
    Tensor added;
    if (residual.has_value()) {
        check_like("residual", *residual, a);
        check_shape("residual", *residual, {batch, outputs, out_height, out_width});
        added = channels_last(padded(*residual, wide));
    }
    const Tensor biases = padded(optional_biases("bias", bias, outputs, a), wide);
    if (y.numel() == 0) return cut(y, outputs);
    const Tensor first = channels_last(padded(a, wide_a));
    const Tensor second = b.has_value() ? channels_last(padded(*b, wide_b)) : Tensor();
    Tensor weights;
    if (wide == outputs && wide_a == channels && wide_b == others) {
        weights = channels_last(weight);
    } else {
        weights = at::empty({wide, wide_a + wide_b, kernel, kernel}, a.options(), at::MemoryFormat::ChannelsLast);
        const Tensor rows = weights.zero_().narrow(0, 0, outputs);
        rows.narrow(1, 0, channels).copy_(weight.narrow(1, 0, channels));
        if (others > 0) rows.narrow(1, wide_a, others).copy_(weight.narrow(1, channels, others));
    }

    fastden::Convolution arguments{};
    arguments.a = pointer(first);
    arguments.b = pointer(second);
    arguments.weight = pointer(weights);
    arguments.bias = floats(biases);
    arguments.residual = pointer(added);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow(name, batch);
    arguments.height = narrow(name, height);
    arguments.width = narrow(name, width);
    arguments.channels_a = narrow(name, wide_a);
    arguments.channels_b = narrow("b", wide_b);
    arguments.outputs = narrow("weight", wide);
    arguments.kernel = narrow("weight", kernel);
    arguments.stride = narrow("stride", stride);
    arguments.padding = narrow("padding", padding);
    arguments.relu = relu;
    const auto launch = b.has_value() ? fastden::concat_conv_bn_relu : fastden::conv_bn_relu;
    check_launch(b.has_value() ? "concat_conv_bn_relu" : "conv_bn_relu", launch(arguments, device.stream));
    return cut(y, outputs);
}

Tensor conv_bn_relu(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& residual, bool relu,
                    int64_t stride, int64_t padding) {
    return convolution("x", x, std::nullopt, weight, bias, residual, relu, stride, padding);
}

Tensor concat_conv_bn_relu(const Tensor& a, const Tensor& b, const Tensor& weight, const Optional& bias, bool relu,
                           int64_t padding) {
    return convolution("a", a, b, weight, bias, std::nullopt, relu, 1, padding);
}

Tensor concat_conv_fp8(const Tensor& a, const Tensor& b, const Tensor& weight, const Optional& bias,
                       const Tensor& ranges, bool relu) {
    const fastden::DType dtype = half("a", a);
    check_rank("a", a, 4);
    check_rank("weight", weight, 4);
    check_like("b", b, a);
    check_like("weight", weight, a);
    const int64_t batch = a.size(0), height = a.size(2), width = a.size(3), outputs = weight.size(0);
    check_shape("a", a, {batch, 128, height, width});
    check_shape("b", b, {batch, 32, height, width});
    check_multiple("weight's outputs", outputs, 256);
    check_shape("weight", weight, {outputs, 160, 3, 3});
    TORCH_CHECK_TYPE(ranges.scalar_type() == at::kFloat, "ranges: dtype ", ranges.scalar_type(), "; accepted: Float");
    TORCH_CHECK_VALUE(ranges.device() == a.device(), "ranges: on ", ranges.device(), "; accepted: ", a.device());
    check_shape("ranges", ranges, {160});
    const Tensor biases = optional_biases("bias", bias, outputs, a);
    const Device device(a);
    Tensor y = at::empty({batch, outputs, height, width}, a.options(), at::MemoryFormat::ChannelsLast);
    if (y.numel() == 0) return y;
    const Tensor first = channels_last(a), second = channels_last(b), weights = channels_last(weight);
    const Tensor wanted = dense(ranges);

    fastden::Fp8Convolution arguments{};
    arguments.a = pointer(first);
    arguments.b = pointer(second);
    arguments.weight = pointer(weights);
    arguments.ranges = floats(wanted);
    arguments.bias = floats(biases);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow("a", batch);
    arguments.height = narrow("a", height);
    arguments.width = narrow("a", width);
    arguments.channels_a = 128;
    arguments.channels_b = 32;
    arguments.outputs = narrow("weight", outputs);
    arguments.relu = relu;
    const Tensor workspace = at::empty({fastden::workspace_bytes(arguments)}, a.options().dtype(at::kByte));
    arguments.workspace = workspace.mutable_data_ptr();
    check_launch("concat_conv_fp8", fastden::concat_conv_fp8(arguments, device.stream));
    return y;
}

Tensor upsample(const Tensor& x, const Tensor& weight, const Optional& bias) {
    const fastden::DType dtype = half("x", x);
    check_rank("x", x, 4);
    check_rank("weight", weight, 4);
    check_like("weight", weight, x);
    const int64_t batch = x.size(0), channels = x.size(1), outputs = weight.size(1);
    check_shape("weight", weight, {channels, outputs, 4, 4});
    TORCH_CHECK_VALUE(channels >= 1 && outputs >= 1, "weight: shape ", text(weight.sizes()),
                      "; accepted: no empty dimension");
    const Device device(x);
    const int64_t wide = whole(outputs), wide_channels = whole(channels);
    Tensor y = at::empty({batch, wide, 2 * x.size(2), 2 * x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
    const Tensor biases = padded(optional_biases("bias", bias, outputs, x), wide);
    if (y.numel() == 0) return cut(y, outputs);
    const Tensor source = channels_last(padded(x, wide_channels));
    const Tensor filled =
        wide == outputs && wide_channels == channels
            ? weight
            : at::constant_pad_nd(weight, {0, 0, 0, 0, 0, wide - outputs, 0, wide_channels - channels});
    // Channels are innermost. fastden.fuse stores weights in this order, so that nothing is copied.
    const Tensor weights = channels_last(filled.transpose(0, 1));

    fastden::Upsampling arguments{};
    arguments.x = pointer(source);
    arguments.weight = pointer(weights);
    arguments.bias = floats(biases);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow("x", batch);
    arguments.height = narrow("x", x.size(2));
    arguments.width = narrow("x", x.size(3));
    arguments.channels = narrow("x", wide_channels);
    arguments.outputs = narrow("weight", wide);
    check_launch("upsample", fastden::upsample(arguments, device.stream));
    return cut(y, outputs);
}

Tensor bottleneck(const Tensor& x, const Tensor& reduce, const Tensor& conv, const Tensor& expand,
                  const Optional& reduce_bias, const Optional& conv_bias, const Optional& expand_bias) {
    const fastden::DType dtype = half("x", x);
    check_rank("x", x, 4);
    check_rank("reduce", reduce, 4);
    const int64_t channels = x.size(1), middle = reduce.size(0);
    TORCH_CHECK_VALUE(middle == 32 || middle == 64, "reduce's outputs: ", text(middle), "; accepted: 32, 64");
    check_multiple("x's channels", channels, 32);
    check_like("reduce", reduce, x);
    check_like("conv", conv, x);
    check_like("expand", expand, x);
    check_shape("reduce", reduce, {middle, channels, 1, 1});
    check_shape("conv", conv, {middle, middle, 3, 3});
    check_shape("expand", expand, {channels, middle, 1, 1});
    const Device device(x);
    Tensor y = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
    const Tensor biases[] = {optional_biases("reduce_bias", reduce_bias, middle, x),
                             optional_biases("conv_bias", conv_bias, middle, x),
                             optional_biases("expand_bias", expand_bias, channels, x)};
    if (y.numel() == 0) return y;
    const Tensor source = channels_last(x);
    const Tensor weights[] = {channels_last(reduce), channels_last(conv), channels_last(expand)};

    fastden::Bottleneck arguments{};
    arguments.x = pointer(source);
    arguments.reduce = pointer(weights[0]);
    arguments.conv = pointer(weights[1]);
    arguments.expand = pointer(weights[2]);
    arguments.reduce_bias = floats(biases[0]);
    arguments.conv_bias = floats(biases[1]);
    arguments.expand_bias = floats(biases[2]);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow("x", x.size(0));
    arguments.height = narrow("x", x.size(2));
    arguments.width = narrow("x", x.size(3));
    arguments.channels = narrow("x", channels);
    arguments.middle = narrow("reduce", middle);
    check_launch("bottleneck", fastden::bottleneck(arguments, device.stream));
    return y;
}

void check_image(const Tensor& x) {
    check_rank("x", x, 4);
    const int64_t height = x.size(2), width = x.size(3);
    TORCH_CHECK_VALUE(height % 2 == 0 && width % 2 == 0 && std::min(height, width) >= 8, "x: shape ", text(x.sizes()),
                      "; accepted: height and width even and at least 8");
    TORCH_CHECK_VALUE(x.size(1) >= 1 && x.size(1) <= 4, "x's channels: ", text(x.size(1)), "; accepted: 1 to 4");
}

Tensor stem(const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu) {
    const fastden::DType dtype = half("x", x);
    check_image(x);
    check_rank("weight", weight, 5);
    check_like("weight", weight, x);
    const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
    const int64_t outputs = weight.size(1);
    check_shape("weight", weight, {4, outputs, channels, 7, 7});
    const Tensor biases = biases_of("bias", bias, {4, outputs}, x);
    check_multiple("weight's outputs", outputs, 8, 128);
    const Device device(x);
    Tensor y =
        at::empty({batch, outputs, (height - 4) / 2, (width - 4) / 2}, x.options(), at::MemoryFormat::ChannelsLast);
    if (y.numel() == 0) return y;
    const Tensor weights = dense(weight.permute({0, 1, 3, 4, 2}));

    fastden::Stem arguments{};
    arguments.x = pointer(x);
    copy_strides(x, arguments.x_strides);
    arguments.weight = pointer(weights);
    arguments.bias = floats(biases);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow("x", batch);
    arguments.channels = narrow("x", channels);
    arguments.height = narrow("x", height);
    arguments.width = narrow("x", width);
    arguments.outputs = narrow("weight", outputs);
    arguments.relu = relu;
    check_launch("stem", fastden::stem(arguments, device.stream));
    return y;
}

Tensor head(const Tensor& features, const Tensor& x, const Tensor& weight, const Tensor& image_weight,
            const Tensor& bias, const Optional& image, bool add_input, bool clamp, bool composed) {
    const fastden::DType dtype = half("features", features);
    check_image(x);
    check_rank("features", features, 4);
    check_rank("image_weight", image_weight, 4);
    check_like("x", x, features);
    check_like("weight", weight, features);
    check_like("image_weight", image_weight, features);
    const int64_t batch = x.size(0), channels = x.size(1), height = (x.size(2) - 4) / 2, width = (x.size(3) - 4) / 2;
    const int64_t maps = features.size(1), outputs = image_weight.size(0);
    check_shape("features", features, {batch, maps, height, width});
    check_multiple("features' channels", maps, 16);
    TORCH_CHECK_VALUE(outputs >= 1 && outputs <= channels, "image_weight's outputs: ", text(outputs),
                      "; accepted: 1 to ", text(channels), ", the channels of x");
    check_shape("weight", weight, {4 * outputs, maps, 4, 4});
    check_shape("image_weight", image_weight, {outputs, channels, 7, 7});
    const Tensor biases = biases_of("bias", bias, {outputs}, features);
    const Device device(features);
    Tensor added = add_input ? x : Tensor();
    at::ScalarType result = features.scalar_type();
    if (image.has_value()) {
        TORCH_CHECK_VALUE(image->device() == x.device(), "image: on ", image->device(), "; accepted: ", x.device());
        TORCH_CHECK_TYPE(at::isFloatingType(image->scalar_type()), "image: dtype ", image->scalar_type(),
                         "; accepted: a floating dtype");
        check_rank("image", *image, 4);
        check_shape("image", *image, {batch, std::max(image->size(1), outputs), x.size(2), x.size(3)});
        result = image->scalar_type();
        // An image of another dtype is added in float32, like the sums; the result is then rounded to this dtype.
        if (add_input) added = result == features.scalar_type() ? *image : image->to(at::kFloat);
    }
    const bool wide = result != features.scalar_type();
    Tensor y = at::empty({batch, outputs, 2 * height - 2, 2 * width - 2},
                         features.options().dtype(wide ? at::kFloat : result));
    if (y.numel() == 0) return y.to(result);
    const Tensor source = channels_last(features);
    const Tensor weights = channels_last(weight), image_weights = channels_last(image_weight);

    fastden::Head arguments{};
    arguments.features = pointer(source);
    arguments.x = pointer(x);
    copy_strides(x, arguments.x_strides);
    arguments.image = pointer(added);
    if (added.defined()) copy_strides(added, arguments.image_strides);
    arguments.image_dtype = wide ? fastden::DType::kFloat32 : dtype;
    arguments.weight = pointer(weights);
    arguments.image_weight = pointer(image_weights);
    arguments.bias = floats(biases);
    arguments.y = y.mutable_data_ptr();
    arguments.dtype = dtype;
    arguments.batch = narrow("x", batch);
    arguments.height = narrow("features", height);
    arguments.width = narrow("features", width);
    arguments.maps = narrow("features", maps);
    arguments.channels = narrow("x", channels);
    arguments.outputs = narrow("image_weight", outputs);
    arguments.clamp = clamp;
    arguments.composed = composed;
    check_launch("head", fastden::head(arguments, device.stream));
    return y.to(result);
}

// How and for what this library was built: the description by fastden/cuda/build.py, and the versions in the headers.
pybind11::dict build_config() {
    pybind11::dict config = pybind11::module_::import("json").attr("loads")(FASTDEN_BUILD);
    config["torch_headers"] = TORCH_VERSION;
    config["toolkit"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
#ifdef FASTDEN_EMULATED
    config["emulated"] = true;
#else
    config["emulated"] = false;
#endif
    return config;
}

}  // namespace

// The schemas are those of torch.ops.fastden (fastden/ops/_library.py), which also has the shape functions.
TORCH_LIBRARY(fastden_cuda, library) {
    const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
    library.def(
        "conv_bn_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, SymInt stride,"
        " SymInt padding) -> Tensor",
        tags);
    library.def(
        "concat_conv_bn_relu(Tensor a, Tensor b, Tensor weight, Tensor? bias, bool relu, SymInt padding) -> Tensor",
        tags);
    library.def("concat_conv_fp8(Tensor a, Tensor b, Tensor weight, Tensor? bias, Tensor ranges, bool relu) -> Tensor",
                tags);
    library.def("upsample(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags);
    library.def(
        "bottleneck(Tensor x, Tensor reduce, Tensor conv, Tensor expand, Tensor? reduce_bias, Tensor? conv_bias,"
        " Tensor? expand_bias) -> Tensor",
        tags);
    library.def("stem(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor", tags);
    library.def(
        "head(Tensor features, Tensor x, Tensor weight, Tensor image_weight, Tensor bias, Tensor? image, bool"
        " add_input, bool clamp, bool composed) -> Tensor",
        tags);
}

TORCH_LIBRARY_IMPL(fastden_cuda, FASTDEN_KEY, library) {
    library.impl("conv_bn_relu", conv_bn_relu);
    library.impl("concat_conv_bn_relu", concat_conv_bn_relu);
    library.impl("concat_conv_fp8", concat_conv_fp8);
    library.impl("upsample", upsample);
    library.impl("bottleneck", bottleneck);
    library.impl("stem", stem);
    library.impl("head", head);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("build_config", build_config);
}
