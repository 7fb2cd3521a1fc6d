// Stands in for CUDA's own header, so that g++ compiles the kernels of csrc/cuda for the host: the threads of a block are
// fibres, one block runs after the other, "device" memory is host memory. Barriers and shuffles meet as on a GPU; a block
// whose threads wait for each other at different places is reported. What it leaves out: warps that run in lockstep, memory
// that other threads see late, and time. Tests can reverse the turns.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32, kStack = 256 << 10;

struct Barrier {
  int wanted = 0, arrived = 0;
  int64_t round = 0;
};
struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
};
struct Machine {
  int processors = 2, shared_limit = 1 << 16;  // what cudaDeviceGetAttribute answers
  bool reversed = false;                       // order of turns
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;  // [warps, 2, kWarp]: what a warp's threads hand over, by parity of the round
  Barrier block;
  ucontext_t scheduler;
  int current = 0;
  bool moved = false;
  std::function<void()> work;
};
inline Machine machine;

inline void meet(Barrier& barrier) {
  const int64_t round = barrier.round;
  machine.moved = true;
  if (++barrier.arrived == barrier.wanted) barrier.arrived = 0, ++barrier.round;
  while (barrier.round == round) swapcontext(&machine.fibres[machine.current].context, &machine.scheduler);
  machine.moved = true;
}

// All threads of a warp give x; the result is what each gave, by lane.
template <class T>
const T* exchange(T x) {
  static_assert(sizeof(T) <= 8);
  const int me = machine.current;
  Barrier& warp = machine.warps[me / kWarp];
  T* of_warp = reinterpret_cast<T*>(machine.exchange.data() + (2 * (me / kWarp) + warp.round % 2) * kWarp);
  of_warp[me % kWarp] = x;
  meet(warp);
  return of_warp;
}

inline void enter() {
  machine.work();
  machine.fibres[machine.current].done = machine.moved = true;
  swapcontext(&machine.fibres[machine.current].context, &machine.scheduler);
}

inline void run_block() {
  const int n = int(blockDim.x);
  if (n % kWarp) std::fprintf(stderr, "a block of %d threads is not whole warps\n", n), std::abort();
  machine.fibres.resize(n);
  machine.exchange.assign(2 * n, 0);
  machine.block = {n};
  machine.warps.assign(n / kWarp, {kWarp});
  for (Fibre& fibre : machine.fibres) {
    fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack = {fibre.stack.data(), 0, fibre.stack.size()};
    makecontext(&fibre.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = machine.moved = false;
    for (int i = 0; i < n; ++i) {
      machine.current = machine.reversed ? n - 1 - i : i;
      Fibre& fibre = machine.fibres[machine.current];
      if (fibre.done) continue;
      left = true;
      threadIdx.x = unsigned(machine.current);
      swapcontext(&machine.scheduler, &fibre.context);
    }
    if (left && !machine.moved) std::fprintf(stderr, "threads of a block wait at different barriers\n"), std::abort();
  }
}

void poison_shared_memory(size_t bytes);  // defined beside the shared memory itself

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::machine.block); }
template <class T> T __shfl_sync(unsigned, T x, int lane) { return emulation::exchange(x)[lane]; }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::exchange(x)[(emulation::machine.current % emulation::kWarp) ^ mask];
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const bool* given = emulation::exchange(x);
  unsigned mask = 0;
  for (int i = 0; i < emulation::kWarp; ++i) mask |= unsigned(given[i]) << i;
  return mask;
}
template <class T> T atomicAdd(T* p, T x) { return std::exchange(*p, T(*p + x)); }
template <class T> T atomicSub(T* p, T x) { return std::exchange(*p, T(*p - x)); }
template <class T> T atomicOr(T* p, T x) { return std::exchange(*p, T(*p | x)); }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  const bool shared = asked == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = shared ? emulation::machine.shared_limit : emulation::machine.processors;
  return cudaSuccess;
}
template <class K> cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) { return cudaSuccess; }
template <class K> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  if (config->dynamicSmemBytes > size_t(emulation::machine.shared_limit)) return cudaErrorInvalidValue;
  emulation::machine.work = [&] { kernel(arguments...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx = dim3(emulation::machine.reversed ? config->gridDim.x - 1 - i : i, 0, 0);
    emulation::poison_shared_memory(config->dynamicSmemBytes);
    emulation::run_block();
  }
  return cudaSuccess;
}
