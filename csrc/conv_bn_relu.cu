// conv_bn_relu: relu(conv2d(a, weight) + bias + residual), batch normalisation folded.
#include "convolution.cuh"

namespace fastden {

Status conv_bn_relu(const Convolution& arguments, cudaStream_t stream) {
    return run_convolution(arguments, stream, false);
}

}  // namespace fastden
