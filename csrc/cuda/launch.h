// Launches a kernel on the current stream of the current device; every error is an exception that names the operator.
// On the emulator of tests/emulator where no CUDA compiler reads this.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "layout.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

// Weak: a PyTorch without CUDA does not have it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#include "emulator.h"
#endif

namespace ffattr::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads, shared_bytes, cluster;
};

#ifdef __CUDACC__

inline void check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // the next call is not to find it
  throw std::runtime_error(what + ": " + cudaGetErrorString(code));
}

// This library has a CUDA runtime of its own, which knows nothing of the device that PyTorch's has chosen.
inline void use_device(int device) { check(cudaSetDevice(device), "current device"); }

inline int device_attribute(cudaDeviceAttr attribute, const std::string& what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

// Bytes of shared memory that a block may have, and that there are for all blocks of a multiprocessor.
inline int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory"); }
inline int shared_per_multiprocessor() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, "shared memory");
}

// 10 times the major version and the minor one, of the current device.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, "compute capability") +
         device_attribute(cudaDevAttrComputeCapabilityMinor, "compute capability");
}

inline cudaStream_t current_stream() {
  int device = 0;
  void* stream = nullptr;
  check(cudaGetDevice(&device), "current device");
  if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("PyTorch has no current CUDA stream: was it built with CUDA?");
  return static_cast<cudaStream_t>(stream);
}

#else

inline void use_device(int) {}
inline int shared_limit() { return emulator::shared_limit(); }
inline int shared_per_multiprocessor() { return shared_limit() + (1 << 10); }
inline int capability() { return 90; }

#endif

template <class... Parameters, class... Arguments>
void launch(const char* op, const LaunchShape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (shape.blocks == 0) return;
  if (shape.blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error(std::string(op) + ": " + std::to_string(shape.blocks) +
                             " blocks are more than a launch has; pass fewer queries at once");
  const int most = shared_limit();
  if (shape.shared_bytes > most)
    throw std::runtime_error(std::string(op) + ": so many heads take " + std::to_string(shape.shared_bytes >> 10) +
                             " KiB of shared memory, this GPU has " + std::to_string(most >> 10) +
                             "; use backend='torch'");
#ifdef __CUDACC__
  if (shape.shared_bytes > 48 << 10)  // as much as there is: another thread may be launching the same kernel
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), op);
  if (shape.shared_bytes > 0)  // or the driver might leave more to the cache, and room for fewer blocks
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          op);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = current_stream();
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op);
#else
  emulator::launch({static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
                    static_cast<unsigned>(shape.shared_bytes), static_cast<unsigned>(shape.cluster)},
                   kernel, arguments...);
#endif
}

}  // namespace ffattr::cuda
