// KL between two softmaxes over the same columns J of one vocabulary, row by row, and its gradient for the student:
//
//   p = softmax(z_s[J] / tau), q = softmax(z_t[J] / tau)
//   forward KL(q || p) = sum q (log q - log p),   dKL/dz_s = (p - q) / tau
//   reverse KL(p || q) = sum p (log p - log q),   dKL/dz_s = p (log p - log q - KL) / tau
//
// A row of both sides is gathered once; its exponentials, and in reverse the differences of the logits, stay in cache until
// the gradient's store. Where J is a good part of the columns, the next row arrives while one is compared, and its gradient is
// spread in registers. Else a row would not stay near until its turn: its logits are fetched as they are gathered, and its
// gradient is spread in a line of zeros.
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kSparse = 8;  // columns for each of J, from which on J is sparse
constexpr int64_t kSoon = 256;  // columns of J between a fetch and its use

// The columns J, also as one bit a column, kLanes columns a mask.
struct Columns {
  std::vector<int32_t> ids;
  std::vector<uint16_t> masks;
  bool sparse;
  Columns(const int64_t* columns, int64_t k, int64_t width) : ids(columns, columns + k), masks(ceil_div(width, kLanes)),
        sparse(k > 0 && kSparse * k <= width) {
    for (int32_t id : ids) masks[id / kLanes] |= 1 << id % kLanes;
  }
};

// Rows of `width` values, of which those in J are given: past the caches, straight to memory where that is aligned.
template <class T>
struct Writer {
  const Columns& columns;
  const int64_t width;
  std::vector<T> line = std::vector<T>(ceil_div(width, kLanes) * kLanes);

  // value(j): the vector that starts at column j, a multiple of kLanes.
  template <class F>
  void whole(T* to, F value) {
    const int64_t vectors = width / kLanes * kLanes;
    if (reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(T)) == 0) {
      for (int64_t j = 0; j < vectors; j += kLanes) stream(to + j, value(j));
    } else {
      for (int64_t j = 0; j < vectors; j += kLanes) store_rounded(line.data() + j, value(j));
      stream_bytes(line.data(), to, vectors * sizeof(T));
    }
    if (vectors == width) return;
    const vf last = value(vectors);
    for (int64_t j = vectors; j < width; ++j) from_float(last[j - vectors], to[j]);
  }

  // values[j] to the j-th of J, 0 to the others. Some values beyond the last are read, and the values may be lost.
  void scattered(T* to, float* values) {
#if defined(__AVX512F__)
    if (columns.sparse) return through_line(to, values);
    const uint16_t* mask = columns.masks.data();
    whole(to, [&](int64_t) {
      const __m512 spread = _mm512_maskz_expand_ps(*mask, _mm512_loadu_ps(values));
      values += __builtin_popcount(*mask++);
      return (vf)spread;
    });
#else
    through_line(to, values);
#endif
  }

 private:
  void through_line(T* to, float* values) {
    T* rounded = reinterpret_cast<T*>(values);  // in place, as it is no wider
    const int64_t k = columns.ids.size();
    for (int64_t j = 0; j < k; j += kLanes) store_rounded(rounded + j, load(values + j));
    for (int64_t j = 0; j < k; ++j) line[columns.ids[j]] = rounded[j];  // the line is 0 elsewhere
    stream_bytes(line.data(), to, width * sizeof(T));
  }
};

// The logits of one side, less their maximum, over tau; padded with -inf.
struct Side {
  float* x;
  float best;
  double total = 0;  // of the exponentials

  template <class T>
  static void gather(const T* z, const Columns& columns, int64_t k, float* x) {
    if (!columns.ids.empty()) {
      const int32_t* at = columns.ids.data();
      for (int64_t j = 0; j < k; ++j) {
        if (columns.sparse) __builtin_prefetch(z + at[std::min(j + kSoon, k - 1)]);
        x[j] = to_float(z[at[j]]);
      }
    } else {
      int64_t j = 0;
      for (; j + kLanes <= k; j += kLanes) store(x + j, load(z + j));
      for (; j < k; ++j) x[j] = to_float(z[j]);
    }
  }
  template <class T>
  Side(const T* z, const Columns& columns, int64_t k, int64_t padded, float* x) : x(x) {
    gather(z, columns, k, x);
    std::fill(x + k, x + padded, -kInf);
    vf top = splat(-FLT_MAX);
    for (int64_t j = 0; j < padded; j += kLanes) top = vmax(load(x + j), top);
    best = max(top);
  }
  float scale() const { return float(1 / total); }
  double lse() const { return std::log(total); }
};

template <class T>
struct Worker {
  const TokenKL& in;
  const TokenKLResult& out;
  const Columns& columns;
  const float inverse = 1 / in.temperature;
  Scratch scratch{2, in.k + kLanes};
  const int64_t padded = ceil_div(in.k, kLanes) * kLanes;
  Writer<T> writer{columns, in.student.cols};
  Ahead ahead[2] = {{in.columns, in.columns ? in.k : 0, in.student}, {in.columns, in.columns ? in.k : 0, in.teacher}};
  const int64_t lines = columns.sparse ? 0 : std::max(ahead[0].lines.size(), ahead[1].lines.size());
  const int64_t steps = padded > 0 ? ceil_div(lines * kLanes, padded) : 0;  // per vector that is compared

  void row(int64_t i) {
    T* to = static_cast<T*>(out.grad.data) + i * out.grad.stride;
    const bool kept = !in.keep || in.keep[i];
    const float weight = out.weight && kept ? out.weight[i] : 0;
    if (out.kl) out.kl[i] = 0;
    if (out.grad.data && weight == 0) std::memset(to, 0, in.student.cols * sizeof *to);
    if (!kept || (!out.kl && weight == 0)) return;
    for (Ahead& side : ahead) {
      side.clear();
      if (i + 1 < in.student.rows) side.add(i + 1);
    }
    Side student(static_cast<const T*>(in.student.data) + i * in.student.stride, columns, in.k, padded, scratch.row(0));
    with_type(in.teacher, [&](auto* z) {
      Side teacher(z + i * in.teacher.stride, columns, in.k, padded, scratch.row(1));
      const float kl = in.reverse ? compare<true>(student, teacher) : compare<false>(student, teacher);
      if (out.kl) out.kl[i] = kl;
      if (weight != 0) write(student, teacher, kl, weight * inverse, to);
    });
  }

 private:
  // The KL. Leaves exponentials in place of the logits; in reverse, in the teacher's place, how far the student's exceed them.
  template <bool reverse>
  float compare(Side& student, Side& teacher) {
    float *x = student.x, *y = teacher.x;
    double sum_p = 0, sum_q = 0, sum_apart = 0;
    for (int64_t from = 0; from < padded; from += kBlock) {
      vf p = {}, q = {}, apart = {};
      for (int64_t j = from; j < std::min(from + kBlock, padded); j += kLanes) {
        const vf s = (load(x + j) - student.best) * inverse, t = (load(y + j) - teacher.best) * inverse;
        const vf e_s = exp_nonpositive(s), e_t = exp_nonpositive(t), d = reverse ? s - t : t - s, e = reverse ? e_s : e_t;
        p += e_s, q += e_t, apart += e == vf{} ? e : e * d;
        for (int64_t step = 0; step < steps; ++step) ahead[0].step(), ahead[1].step();
        store(x + j, e_s);
        store(y + j, reverse ? d : e_t);
      }
      sum_p += sum(p), sum_q += sum(q), sum_apart += sum(apart);
    }
    student.total = sum_p, teacher.total = sum_q;
    const double shift = student.lse() - teacher.lse();
    return float(reverse ? sum_apart / sum_p - shift : sum_apart / sum_q + shift);
  }

  void write(const Side& student, const Side& teacher, float kl, float factor, T* to) {
    float *x = student.x, *y = teacher.x;
    const float p = student.scale(), q = teacher.scale(), shift = float(teacher.lse() - student.lse()) - kl;
    auto forward = [&](int64_t j) { return (load(x + j) * p - load(y + j) * q) * factor; };
    auto reverse = [&](int64_t j) {
      const vf e = load(x + j);
      return (e == vf{} ? e * p : e * p * (load(y + j) + shift)) * factor;
    };
    if (columns.ids.empty()) return in.reverse ? writer.whole(to, reverse) : writer.whole(to, forward);
    for (int64_t j = 0; j < padded; j += kLanes) store(x + j, in.reverse ? reverse(j) : forward(j));
    writer.scattered(to, x);
  }
};

}  // namespace

void token_kl(const TokenKL& in, const TokenKLResult& out) {
  const Columns columns(in.columns, in.columns ? in.k : 0, in.student.cols);
#pragma omp parallel
  with_type(in.student, [&](auto* z) {
    Worker<std::remove_pointer_t<decltype(z)>> worker{in, out, columns};
#pragma omp for schedule(dynamic, columns.sparse ? 4 : 16)
    for (int64_t i = 0; i < in.student.rows; ++i) worker.row(i);
    fence();
  });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
