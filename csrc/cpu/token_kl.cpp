// KL between two softmaxes over the same columns J of one vocabulary, row by row, and its gradient for the student:
//
//   p = softmax(z_s[J] / tau), q = softmax(z_t[J] / tau)
//   forward KL(q || p) = sum q (log q - log p),   dKL/dz_s = (p - q) / tau
//   reverse KL(p || q) = sum p (log p - log q),   dKL/dz_s = p (log p - log q - KL) / tau
//
// A row's differences to its maximum and its exponentials stay in cache from the first read to the gradient's store.
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

const float kInfinity = std::numeric_limits<float>::infinity();

struct Side {
  Scratch scratch;
  float *x, *e;  // (z - max) / tau and its exponential, padded with -inf and 0
  float scale, lse;
  explicit Side(int64_t k) : scratch(2, k), x(scratch.row(0)), e(scratch.row(1)) {}

  template <class T>
  void read(const T* z, const std::vector<int32_t>& columns, int64_t k, float inverse) {
    vf top = splat(-FLT_MAX);
    if (!columns.empty()) {
      const int32_t* at = columns.data();
      for (int64_t j = 0; j < k; ++j) x[j] = to_float(z[at[j]]);
    } else {
      int64_t j = 0;
      for (; j + kLanes <= k; j += kLanes) store(x + j, load(z + j));
      for (; j < k; ++j) x[j] = to_float(z[j]);
    }
    std::fill(x + k, x + scratch.stride, -kInfinity);
    for (int64_t j = 0; j < scratch.stride; j += kLanes) top = vmax(load(x + j), top);
    const float best = max(top);
    const double total = sum_blocks(scratch.stride, [&](int64_t j) {
      vf v = (load(x + j) - best) * inverse, exponential = exp_nonpositive(v);
      store(x + j, v);
      store(e + j, exponential);
      return exponential;
    });
    scale = float(1 / total);
    lse = float(std::log(total));
  }
};

template <class T>
struct Worker {
  const TokenKL& in;
  const TokenKLResult& out;
  const std::vector<int32_t>& columns;
  const float inverse = 1 / in.temperature;
  Side student{in.k}, teacher{in.k};
  std::vector<float> gradient = std::vector<float>(student.scratch.stride);
  std::vector<T> line = std::vector<T>(columns.empty() ? 0 : in.student.cols);  // a row of the gradient, 0 outside J

  void row(int64_t i) {
    T* to = static_cast<T*>(out.grad.data) + i * out.grad.stride;
    const bool kept = !in.keep || in.keep[i];
    const float weight = out.weight && kept ? out.weight[i] : 0;
    if (out.kl) out.kl[i] = 0;
    if (out.grad.data && weight == 0) std::memset(to, 0, in.student.cols * sizeof *to);
    if (!kept || (!out.kl && weight == 0)) return;
    student.read(static_cast<const T*>(in.student.data) + i * in.student.stride, columns, in.k, inverse);
    with_type(in.teacher, [&](auto* z) { teacher.read(z + i * in.teacher.stride, columns, in.k, inverse); });
    const float kl = out.kl || in.reverse ? value() : 0;
    if (out.kl) out.kl[i] = kl;
    if (weight != 0) write(to, weight * inverse, kl);
  }

 private:
  float value() const {
    const Side &from = in.reverse ? student : teacher, &to = in.reverse ? teacher : student;
    const double shift = double(to.lse) - from.lse;
    const double kl = sum_blocks(from.scratch.stride, [&](int64_t j) {
      vf p = load(from.e + j) * from.scale;
      return p == vf{} ? p : p * (load(from.x + j) - load(to.x + j));
    });
    return float(kl + shift);
  }

  void write(T* to, float factor, float kl) {
    const float shift = teacher.lse - student.lse - kl;
    auto slope = [&](int64_t j) {
      vf p = load(student.e + j) * student.scale;
      if (in.reverse) return (p == vf{} ? p : p * (load(student.x + j) - load(teacher.x + j) + shift)) * factor;
      return (p - load(teacher.e + j) * teacher.scale) * factor;
    };
    for (int64_t j = 0; j < student.scratch.stride; j += kLanes) store(gradient.data() + j, slope(j));
    if (columns.empty()) {
      int64_t j = 0;
      for (; j < in.k && reinterpret_cast<uintptr_t>(to + j) % 64; ++j) from_float(gradient[j], to[j]);
      for (; j + kLanes <= in.k; j += kLanes) stream(to + j, load(gradient.data() + j));
      for (; j < in.k; ++j) from_float(gradient[j], to[j]);
      std::memset(to + in.k, 0, (in.student.cols - in.k) * sizeof *to);
    } else {
      for (int64_t j = 0; j < in.k; ++j) from_float(gradient[j], line[columns[j]]);
      stream_bytes(line.data(), to, in.student.cols * sizeof *to);
    }
  }
};

}  // namespace

void token_kl(const TokenKL& in, const TokenKLResult& out) {
  const std::vector<int32_t> columns(in.columns, in.columns ? in.columns + in.k : nullptr);
  if (!out.kl) prefer_large_pages(out.grad);
#pragma omp parallel
  with_type(in.student, [&](auto* z) {
    Worker<std::remove_pointer_t<decltype(z)>> worker{in, out, columns};
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < in.student.rows; ++i) worker.row(i);
    fence();
  });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
