// Double-precision tiles for the kernels on S = Q T Q^T: a register tile as in gemm.h, half as wide.
#pragma once
#include <vector>

#include "cpu/gemm.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int kHalf = kLanes / 2;  // doubles of a vector
constexpr int kWide = 2 * kHalf;   // columns of a panel

typedef double vd __attribute__((vector_size(4 * kLanes)));
inline vd load64(const double* p) { vd v; std::memcpy(&v, p, sizeof v); return v; }
inline void store64(double* p, vd v) { std::memcpy(p, &v, sizeof v); }
inline double sum64(vd v) {
  double total = 0;
  for (int i = 0; i < kHalf; ++i) total += v[i];
  return total;
}

using Doubles = std::vector<double>;

// c [kMr, kWide] (row stride ldc) += sign * a b over `depth` steps of a [depth][kMr] and b [depth][kWide].
inline void multiply_add(const double* a, const double* b, int64_t depth, double* c, int64_t ldc, double sign) {
  vd acc[kMr][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kMr, b += kWide) {
    vd b0 = load64(b), b1 = load64(b + kHalf);
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      double* to = c + i * ldc + j * kHalf;
      store64(to, load64(to) + sign * acc[i][j]);
    }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
