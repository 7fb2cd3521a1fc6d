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
  void read(const T* z, const int64_t* columns, int64_t k, float inverse) {
    vf top = splat(-FLT_MAX);
    if (columns) {
      for (int64_t j = 0; j < k; ++j) x[j] = to_float(z[columns[j]]);
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

struct Worker {
  const TokenKL& in;
  const float inverse = 1 / in.temperature;
  Side student{in.k}, teacher{in.k};
  std::vector<float> gradient = std::vector<float>(student.scratch.stride);

  void read(int64_t row) {
    with_type(in.student, [&](auto* z) { student.read(z + row * in.student.stride, in.columns, in.k, inverse); });
    with_type(in.teacher, [&](auto* z) { teacher.read(z + row * in.teacher.stride, in.columns, in.k, inverse); });
  }

  float value() const {
    const Side &from = in.reverse ? student : teacher, &to = in.reverse ? teacher : student;
    const double shift = double(to.lse) - from.lse;
    const double kl = sum_blocks(from.scratch.stride, [&](int64_t j) {
      vf p = load(from.e + j) * from.scale;
      return p == vf{} ? p : p * (load(from.x + j) - load(to.x + j));
    });
    return float(kl + shift);
  }

  template <class T>
  void write(T* out, float weight) {
    const float factor = weight * inverse, kl = in.reverse ? value() : 0, shift = teacher.lse - student.lse - kl;
    for (int64_t j = 0; j < student.scratch.stride; j += kLanes) {
      vf p = load(student.e + j) * student.scale, g;
      if (in.reverse) g = p == vf{} ? p : p * (load(student.x + j) - load(teacher.x + j) + shift);
      else g = p - load(teacher.e + j) * teacher.scale;
      store(gradient.data() + j, g * factor);
    }
    if (in.columns) {
      std::memset(out, 0, in.student.cols * sizeof *out);
      for (int64_t j = 0; j < in.k; ++j) from_float(gradient[j], out[in.columns[j]]);
      return;
    }
    int64_t j = 0;
    for (; j + kLanes <= in.k; j += kLanes) store_rounded(out + j, load(gradient.data() + j));
    for (; j < in.k; ++j) from_float(gradient[j], out[j]);
    std::memset(out + in.k, 0, (in.student.cols - in.k) * sizeof *out);
  }
};

}  // namespace

void token_kl(const TokenKL& in, float* kl) {
#pragma omp parallel
  {
    Worker worker{in};
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < in.student.rows; ++row) {
      kl[row] = 0;
      if (in.keep && !in.keep[row]) continue;
      worker.read(row);
      kl[row] = worker.value();
    }
  }
}

void token_kl_backward(const TokenKL& in, const float* weight, const Matrix& grad) {
  prefer_large_pages(grad);
#pragma omp parallel
  {
    Worker worker{in};
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < in.student.rows; ++row)
      with_type(grad, [&](auto* out) {
        out += row * grad.stride;
        if ((in.keep && !in.keep[row]) || weight[row] == 0) {
          std::memset(out, 0, grad.cols * sizeof *out);
          return;
        }
        worker.read(row);
        worker.write(out, weight[row]);
      });
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
