// exp_nonpositive over an array: lets the tests measure the shared vector exponential against libm.
#include "cpu/simd.h"

#include "cpu/ops.h"

namespace chassis {
namespace CHASSIS_ISA {

void exp_nonpositive(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_nonpositive(load(x + i)));
  for (; i < n; ++i) out[i] = exp_nonpositive(splat(x[i]))[0];
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
