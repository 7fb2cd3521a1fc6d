// How CUDA kernels are launched, and errors of the CUDA runtime.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/ops.h"

#ifndef CHASSIS_CUDA_THREADS
#define CHASSIS_CUDA_THREADS 512
#endif

namespace chassis {
namespace cuda {

constexpr int kThreads = CHASSIS_CUDA_THREADS;  // of a block
constexpr unsigned kAll = 0xffffffffu;          // the lanes of a warp

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

}  // namespace cuda
}  // namespace chassis
