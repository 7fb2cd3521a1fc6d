// The shared vector exponential and conversions over an array: lets the tests measure them against libm and torch.
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

void exp_nonpositive(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_nonpositive(load(x + i)));
  for (; i < n; ++i) out[i] = exp_nonpositive(splat(x[i]))[0];
}

namespace {

template <class From, class To>
void convert_row(const From* x, To* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) from_float(to_float(x[i]), out[i]);
}

}  // namespace

void convert(const Matrix& x, const Matrix& out) {
  with_type(x, [&](auto* from) { with_type(out, [&](auto* to) { convert_row(from, to, x.cols); }); });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
