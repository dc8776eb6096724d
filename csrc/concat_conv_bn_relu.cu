// concat_conv_bn_relu: relu(conv2d(cat(a, b), weight) + bias), batch normalisation folded, nothing concatenated.
#include "concat_hopper.cuh"
#include "convolution.cuh"

namespace fastden {
namespace hopper {

template <typename T>
Status launch_for(const Convolution& arguments, cudaStream_t stream) {
    if (arguments.channels_b == 32) return launch_tiles<T, T, 2>(arguments, nullptr, stream);
    return launch_tiles<T, T, 4>(arguments, nullptr, stream);
}

inline bool fits(const Convolution& arguments) {
    return arguments.channels_a % kStepChannels == 0 && (arguments.channels_b == 32 || arguments.channels_b == 64) &&
           arguments.outputs % kTileOutputs == 0 && arguments.kernel == 2 * arguments.padding + 1 &&
           arguments.kernel <= kLargestKernel && arguments.dtype != DType::kFloat32;
}

}  // namespace hopper

Status concat_conv_bn_relu(const Convolution& arguments, cudaStream_t stream) {
// The build defines this if 9.0a is one of the architectures.
#ifdef FASTDEN_HOPPER
    int major = 0;
    const cudaError_t error = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
    if (error != cudaSuccess) return error;
    if (major == 9 && hopper::fits(arguments)) {
        return for_dtype(arguments.dtype,
                         [&](auto zero) { return hopper::launch_for<decltype(zero)>(arguments, stream); });
    }
#endif
    return run_convolution(arguments, stream, false);
}

}  // namespace fastden
