// upsample: a transposed 4x4 convolution of stride 2 as four 2x2 convolutions, one for each parity of the output pixel.
#include "convolution.cuh"

namespace fastden {

Status upsample(const Upsampling& arguments, cudaStream_t stream) {
    Convolution phases = {};
    phases.a = arguments.x;
    phases.weight = arguments.weight;
    phases.bias = arguments.bias;
    phases.y = arguments.y;
    phases.dtype = arguments.dtype;
    phases.batch = arguments.batch;
    phases.height = arguments.height;
    phases.width = arguments.width;
    phases.channels_a = arguments.channels;
    phases.outputs = arguments.outputs;
    phases.kernel = 2;  // of a phase; weights have the layout of the whole kernel
    phases.stride = 1;
    phases.padding = 1;  // of phase 0; an odd row or column begins its window one pixel later
    return run_convolution(phases, stream, true);
}

}  // namespace fastden
