// What the kernels on S = Q T Q^T share: the tiles of gemm.h in fp64, half as wide.
#pragma once
#include <vector>

#include "cpu/gemm.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int kHalf = kLanes / 2;  // doubles of a vector
constexpr int kWide = 2 * kHalf;   // columns of a panel

inline double sum64(vd v) {
  double total = 0;
  for (int i = 0; i < kHalf; ++i) total += v[i];
  return total;
}

using Doubles = std::vector<double>;

}  // namespace CHASSIS_ISA
}  // namespace chassis
