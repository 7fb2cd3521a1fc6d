// The extension chassis_kernels._CUDA with every kernel run on the host, and what its emulated device is.
#include "cuda/projection_kl.cu"
#include "cuda/slice.cu"

namespace chassis {
namespace cuda {
namespace {
uint4 shared_memory[(256 << 10) / sizeof(uint4)];
}
}  // namespace cuda
}  // namespace chassis

void emulation::poison_shared_memory(size_t) {
  std::memset(chassis::cuda::shared_memory, 0xff, sizeof chassis::cuda::shared_memory);
}

extern "C" __attribute__((visibility("default"))) void emulate(int processors, int shared_limit, bool reversed) {
  emulation::machine.processors = processors;
  emulation::machine.shared_limit = shared_limit;
  emulation::machine.reversed = reversed;
}

#include "cuda/bindings.cpp"
