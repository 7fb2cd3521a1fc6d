// The shared vector exponential and conversions over an array: lets the tests measure them against libm and torch.
#include "cpu/simd.h"

#include "cpu/ops.h"

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

template <class To>
void convert_to(const Matrix& x, To* out) {
  if (x.dtype == DType::bf16) convert_row(static_cast<const bf16*>(x.data), out, x.cols);
  else if (x.dtype == DType::fp16) convert_row(static_cast<const fp16*>(x.data), out, x.cols);
  else convert_row(static_cast<const float*>(x.data), out, x.cols);
}

}  // namespace

void convert(const Matrix& x, const Matrix& out) {
  if (out.dtype == DType::bf16) convert_to(x, static_cast<bf16*>(out.data));
  else if (out.dtype == DType::fp16) convert_to(x, static_cast<fp16*>(out.data));
  else convert_to(x, static_cast<float*>(out.data));
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
