// log sum exp(z / tau) of every row: its maximum and the sum in one visit, in which the next row is fetched.
#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

// sum exp((z - top) / tau) over [0, n): fp32 within a block, double between blocks.
template <class T>
double scaled_sum(const T* z, const T* next, int64_t n, float top, float inverse) {
  double total = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t end = std::min(from + kBlock, n);
    vf parts[4] = {};
    int64_t i = from;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int part = 0; part < 4; ++part) {
        __builtin_prefetch(next + i + part * kLanes);
        parts[part] += exp_nonpositive((load(z + i + part * kLanes) - top) * inverse);
      }
    for (; i + kLanes <= end; i += kLanes) parts[0] += exp_nonpositive((load(z + i) - top) * inverse);
    vf rest = splat(-kInf);
    for (int64_t j = i; j < end; ++j) rest[j - i] = (to_float(z[j]) - top) * inverse;
    total += sum((parts[0] + parts[1]) + (parts[2] + parts[3])) + sum(exp_nonpositive(rest));
  }
  return total;
}

}  // namespace

void log_sums(const Matrix& logits, float temperature, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < logits.rows; ++i)
    with_type(logits, [&](auto* z) {
      z += i * logits.stride;
      const float top = largest(z, logits.cols);  // of -inf alone -FLT_MAX, with a sum of 0
      const double total = scaled_sum(z, z + logits.stride, logits.cols, top, 1 / temperature);
      out[i] = top == kInf ? kInf : float(top / double(temperature) + std::log(total));
    });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
