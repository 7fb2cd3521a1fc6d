// The gold loss of a chunk, and its gradient. With A and B the chunk's mean log-probabilities of student and teacher:
//
//   common = sum over mapped pairs exp(B)(B - A)          (reverse: exp(A)(A - B))
//   l1     = sum_i |x_i - y_i|, x and y the m largest of exp(A[unmapped]) and exp(B[unmapped]), descending
//   dloss/dz_t[s] = (D[s] - p_t[s] sum D) / n / tau,   D = dloss/dA
//
// A thread takes a whole chunk. The m largest are found by a histogram over the leading bits of the floats, which order
// like the integers they are made of, and sorted by their remaining bits.
#include <numeric>
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr float kEps = 1e-10f;

struct Ranked { uint32_t key; int32_t id; };  // key: the bits of a float in [0, 1]

// The m largest of e[others[i]], descending, equal ones by place, into `out`.
void largest(const float* e, const std::vector<int32_t>& others, int64_t m, std::vector<Ranked>& out,
             std::vector<Ranked>& spare) {
  auto key = [&](int32_t id) {
    uint32_t bits;
    std::memcpy(&bits, e + id, 4);
    return bits & 0x7fffffff;
  };
  uint32_t leading[2048] = {}, place[3][2049] = {};
  for (int32_t id : others) ++leading[key(id) >> 20];
  int64_t first = 2047, kept = leading[2047];
  while (first > 0 && kept < m) kept += leading[--first];
  out.resize(kept + 1);
  spare.resize(kept);
  const uint32_t least = uint32_t(first) << 20;
  kept = 0;
  for (int32_t id : others) {  // without a branch: the slot after the last is overwritten
    out[kept] = {key(id), id};
    kept += out[kept].key >= least;
  }
  out.resize(kept);
  for (const Ranked& r : out)
    for (int digit = 0; digit < 3; ++digit) ++place[digit][2048 - (r.key >> 11 * digit & 2047)];
  for (int digit = 0; digit < 3; ++digit) {
    std::partial_sum(place[digit], place[digit] + 2049, place[digit]);
    for (const Ranked& r : out) spare[place[digit][2047 - (r.key >> 11 * digit & 2047)]++] = r;
    out.swap(spare);
    spare.resize(kept);
  }
  out.resize(m);
}

// Mean log-probabilities of a chunk's rows, and their exponentials.
struct Side {
  const Matrix& logits;
  const float inverse;
  Scratch scratch;
  float *mean, *e;
  std::vector<int32_t> others;  // tokens without a partner
  std::vector<Ranked> top, spare;

  Side(const Matrix& logits, float inverse, const int64_t* pairs, int64_t n)
      : logits(logits), inverse(inverse), scratch(2, logits.cols), mean(scratch.row(0)), e(scratch.row(1)) {
    std::vector<char> mapped(logits.cols, 0);
    for (int64_t i = 0; i < n; ++i) mapped[pairs[i]] = 1;
    for (int64_t i = 0; i < logits.cols; ++i)
      if (!mapped[i]) others.push_back(int32_t(i));
  }

  template <class T>
  void add(const T* z, float share, bool first) {
    float best = -FLT_MAX;
    vf top_here = splat(best);
    int64_t i = 0;
    for (; i + kLanes <= logits.cols; i += kLanes) {
      vf v = load(z + i);
      store(e + i, v);
      top_here = vmax(v, top_here);
    }
    best = max(top_here);
    for (; i < logits.cols; ++i) best = std::max(best, e[i] = to_float(z[i]));
    std::fill(e + logits.cols, e + scratch.stride, -std::numeric_limits<float>::infinity());
    const double total = sum_blocks(scratch.stride, [&](int64_t j) { return exp_nonpositive((load(e + j) - best) * inverse); });
    const float lse = float(std::log(total));
    for (int64_t j = 0; j < scratch.stride; j += kLanes) {
      vf v = ((load(e + j) - best) * inverse - lse) * share;
      store(mean + j, first ? v : load(mean + j) + v);
    }
  }

  void read(const Members& rows, int64_t c) {
    const float share = 1 / (float(rows.count(c)) + kEps);
    for (int64_t i = 0; i < rows.count(c); ++i)
      with_type(logits, [&](auto* z) { add(z + rows.row(c, i) * logits.stride, share, i == 0); });
    for (int64_t j = 0; j < scratch.stride; j += kLanes) store(e + j, exp_nonpositive(load(mean + j)));
  }

  const std::vector<Ranked>& rank(int64_t m) {
    largest(e, others, m, top, spare);
    return top;
  }
};

struct Worker {
  const GoldKL& in;
  const float inverse = 1 / in.temperature;
  Side student{in.student, inverse, in.students, in.pairs}, teacher{in.teacher, inverse, in.teachers, in.pairs};
  Scratch slope{1, in.student.cols};
  float* D = slope.row(0);
  const int64_t m = std::min({int64_t(student.others.size()), int64_t(teacher.others.size()), in.uncommon_topk});

  // Adds weight dcommon/dA to D where `weight` is not 0.
  void common(float weight, float& value, bool& agree) {
    double total = 0;
    int64_t best_a = 0, best_b = 0;
    for (int64_t i = 0; i < in.pairs; ++i) {
      const int64_t s = in.students[i], t = in.teachers[i];
      const float a = student.mean[s], b = teacher.mean[t];
      if (in.reverse) total += student.e[s] == 0 ? 0 : student.e[s] * (a - b);
      else total += teacher.e[t] == 0 ? 0 : teacher.e[t] * (b - a);
      if (a > student.mean[in.students[best_a]]) best_a = i;
      if (b > teacher.mean[in.teachers[best_b]]) best_b = i;
      if (weight != 0) D[s] = weight * (in.reverse ? (student.e[s] == 0 ? 0 : student.e[s] * (1 + a - b)) : -teacher.e[t]);
    }
    value = float(total);
    agree = in.pairs > 0 && best_a == best_b;
  }

  // Adds weight dl1/dA to D where `weight` is not 0.
  float l1(float weight) {
    const std::vector<Ranked>&x = student.rank(m), &y = teacher.rank(m);
    double total = 0;
    for (int64_t i = 0; i < m; ++i) {
      const float a = student.e[x[i].id], b = teacher.e[y[i].id];
      total += std::fabs(a - b);
      if (weight != 0) D[x[i].id] = a > b ? weight * a : a < b ? -weight * a : 0;
    }
    return float(total);
  }

  template <class T>
  void write(const T* z, T* out, float share) {
    int64_t i = 0;
    const int64_t width = in.student.cols;
    float* e = student.e;
    vf top = splat(-FLT_MAX);
    for (; i + kLanes <= width; i += kLanes) top = vmax(load(z + i), top);
    float best = max(top);
    for (; i < width; ++i) best = std::max(best, to_float(z[i]));
    for (i = 0; i + kLanes <= width; i += kLanes) store(e + i, exp_nonpositive((load(z + i) - best) * inverse));
    for (; i < width; ++i) e[i] = exp_nonpositive(splat((to_float(z[i]) - best) * inverse))[0];
    std::fill(e + width, e + slope.stride, 0.0f);
    const double total = sum_blocks(slope.stride, [&](int64_t j) { return load(e + j); });
    const double sum_D = sum_blocks(slope.stride, [&](int64_t j) { return load(D + j); });
    const float back = float(sum_D / total), factor = share * inverse;
    for (i = 0; i + kLanes <= width; i += kLanes) store_rounded(out + i, (load(D + i) - load(e + i) * back) * factor);
    for (; i < width; ++i) from_float((D[i] - e[i] * back) * factor, out[i]);
  }
};

}  // namespace

void gold_kl(const GoldKL& in, const GoldKLResult& out) {
  const Members student(in.student_chunk, in.student.rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
#pragma omp parallel
  {
    Worker worker{in};
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < in.chunks; ++c) {
      out.common[c] = out.l1[c] = 0;
      out.agree[c] = false;
      if (student.count(c) == 0 || teacher.count(c) == 0) continue;
      worker.student.read(student, c);
      worker.teacher.read(teacher, c);
      worker.common(0, out.common[c], out.agree[c]);
      out.l1[c] = worker.l1(0);
    }
  }
}

void gold_kl_backward(const GoldKL& in, const float* weight_common, const float* weight_l1, const Matrix& grad) {
  const Members student(in.student_chunk, in.student.rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
  prefer_large_pages(grad);
  auto zero = [&](int64_t row) {
    with_type(grad, [&](auto* g) { std::memset(g + row * grad.stride, 0, grad.cols * sizeof *g); });
  };
#pragma omp parallel
  {
    Worker worker{in};
#pragma omp for schedule(dynamic) nowait
    for (int64_t c = 0; c < in.chunks; ++c) {
      const int64_t n = student.count(c);
      if (n == 0 || teacher.count(c) == 0 || (weight_common[c] == 0 && weight_l1[c] == 0)) {
        for (int64_t i = 0; i < n; ++i) zero(student.row(c, i));
        continue;
      }
      worker.student.read(student, c);
      worker.teacher.read(teacher, c);
      std::fill_n(worker.D, worker.slope.stride, 0.0f);
      float value;
      bool agree;
      worker.common(weight_common[c], value, agree);
      if (weight_l1[c] != 0) worker.l1(weight_l1[c]);
      for (int64_t i = 0; i < n; ++i)
        with_type(grad, [&](auto* g) {
          const int64_t row = student.row(c, i);
          worker.write(static_cast<decltype(g)>(in.student.data) + row * in.student.stride, g + row * grad.stride,
                       1 / (float(n) + kEps));
        });
    }
#pragma omp for
    for (int64_t i = 0; i < in.student.rows; ++i)
      if (in.student_chunk[i] < 0) zero(i);
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
