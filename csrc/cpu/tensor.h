// What the kernels share around their arithmetic: typed views of a Matrix, scratch memory, vector stores that round.
#pragma once
#include <algorithm>
#include <memory>
#include <new>

#include "cpu/ops.h"
#include "cpu/simd.h"
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

namespace chassis {
namespace CHASSIS_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with m.data as float*, bf16* or fp16*.
template <class F>
inline void with_type(const Matrix& m, F f) {
  if (m.dtype == DType::bf16) f(static_cast<bf16*>(m.data));
  else if (m.dtype == DType::fp16) f(static_cast<fp16*>(m.data));
  else f(static_cast<float*>(m.data));
}

// Uninitialised: touching the pages of a zeroed buffer can cost more than the products that will fill it. No vector that starts
// at a multiple of kLanes crosses a cache line.
struct Release {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
struct Buffer : std::unique_ptr<float[], Release> {
  explicit Buffer(int64_t n)
      : unique_ptr(static_cast<float*>(::operator new[](sizeof(float) * std::max<int64_t>(n, 1), std::align_val_t{64}))) {}
};

// `store`, with the rounding to bf16 done on the whole vector.
template <class T>
inline void store_rounded(T* p, vf v) { store(p, v); }
inline void store_rounded(bf16* p, vf v) {
  vi bits;
  std::memcpy(&bits, &v, sizeof bits);
  vi rounded = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 64;
  vh half = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &half, sizeof half);
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
