// A CUDA runtime and a driver that do nothing, to test how the operators call them where there is no GPU: which call
// fails is set from outside, errors stay until someone asks, and the driver's functions need a context.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "fastden.h"

namespace {

cudaError_t last = cudaSuccess;
std::string failing;
bool has_context = false;
int clusters = 3, current = 0;
std::atomic<int> attributes_set = 0, clusters_asked = 0;
unsigned blocks = 0;
CUresult encoding = CUDA_SUCCESS;

cudaError_t result_of(const char* name) {
    if (failing == name) return last = cudaErrorLaunchFailure;
    return cudaSuccess;
}

CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
    return has_context ? encoding : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult name_of(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_NOT_PERMITTED";
    return CUDA_SUCCESS;
}

cudaError_t entry_point(const char* name, void** function) {
    *function =
        std::strcmp(name, "cuGetErrorName") == 0 ? reinterpret_cast<void*>(name_of) : reinterpret_cast<void*>(encode);
    return cudaSuccess;
}

fastden::Status launch_conv3(int kernel, int rows, int columns) {
    static char memory[16];
    fastden::Convolution arguments = {};
    arguments.a = arguments.b = arguments.weight = memory;
    arguments.y = memory;
    arguments.dtype = fastden::DType::kFloat16;
    arguments.batch = 1;
    arguments.height = rows;
    arguments.width = columns;
    arguments.channels_a = 128;
    arguments.channels_b = 32;
    arguments.outputs = 256;
    arguments.kernel = kernel;
    arguments.stride = 1;
    arguments.padding = kernel == 3 ? 1 : 0;
    return fastden::concat_conv_bn_relu(arguments, nullptr);
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return result_of("cudaGetDevice");
}
cudaError_t cudaSetDevice(int) {
    has_context = true;
    return result_of("cudaSetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 132;
    return result_of("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    ++attributes_set;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that other threads ask meanwhile
    return result_of("cudaFuncSetAttribute");
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
    ++clusters_asked;
    if (failing != "cudaOccupancyMaxActiveClusters") *count = clusters;
    return result_of("cudaOccupancyMaxActiveClusters");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    has_context = true;
    blocks = config->gridDim.x;
    return result_of("cudaLaunchKernelExC");
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
    *found = cudaDriverEntryPointSuccess;
    return entry_point(name, function);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    *found = cudaDriverEntryPointSuccess;
    return entry_point(name, function);
}
// What nvcc's own part of an object file calls.
void** __cudaRegisterFatBinary(void*) {
    return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) {
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaSuccess;
}
char __cudaInitModule(void**) {
    return 1;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) {
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaSuccess;
}

// conv3's channels, on an image of `rows` x `columns`; "" where all went well, else the detail or the error's number.
const char* concat(const char* fails, int driver_error, int kernel, int rows, int columns) {
    static std::string answer;
    failing = fails;
    encoding = static_cast<CUresult>(driver_error);
    has_context = false;
    const fastden::Status status = launch_conv3(kernel, rows, columns);
    answer = status ? "" : status.detail != nullptr ? status.detail : std::to_string(status.error);
    return answer.c_str();
}
// The same as the last time, in any thread: the error.
int launch_again() {
    return launch_conv3(3, 133, 265).error;
}
// Makes a device the current one; none of its kernels was launched.
void use_device(int device) {
    current = device;
}
// How often the runtime was asked what an operator may keep.
int asked() {
    return attributes_set + clusters_asked;
}
int left_behind() {
    return last;
}
int blocks_launched() {
    return static_cast<int>(blocks);
}
}
