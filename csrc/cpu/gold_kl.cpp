// The gold loss of a chunk, and its gradient. With A and B the chunk's mean log-probabilities of student and teacher:
//
//   common = sum over mapped pairs exp(B)(B - A)          (reverse: exp(A)(A - B))
//   l1     = sum_i |x_i - y_i|, x and y the m largest of exp(A[unmapped]) and exp(B[unmapped]), descending
//   dloss/dz_t[s] = (D[s] - p_t[s] sum D) / n / tau,   D = dloss/dA
//
// A thread takes a whole chunk, reads its rows once for the maximum and the sum (a block at a time, while it is in L1), once
// for the mean, and once for the gradient. The m largest are the values above a bound, sorted by the bits of the floats,
// which order like the integers they are made of; the bound that sufficed for one chunk is where the next one starts.
#include <numeric>
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr float kEps = 1e-10f;
constexpr float kHidden = -1;    // in place of a probability that must not be ranked
constexpr int64_t kPairs = 512;  // mapped pairs gathered at a time

struct Ranked { uint32_t key; int32_t id; };  // key: the bits of a float in [0, 1]

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

// Appends to out[n..] the lanes of x that are not below `bound`, the first of which has number `id`; returns the new n.
// Overwrites up to kLanes entries behind them.
inline int64_t append(vf x, float bound, int32_t id, Ranked* out, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_NLT_UQ);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i keys = _mm512_castps_si512(_mm512_maskz_compress_ps(mask, (__m512)x));
  const __m512i ids = _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(_mm512_set1_epi32(id), steps));
  _mm512_storeu_si512(out + n, _mm512_permutex2var_epi32(keys, low, ids));
  _mm512_storeu_si512(out + n + 8, _mm512_permutex2var_epi32(keys, _mm512_or_epi32(low, _mm512_set1_epi32(8)), ids));
  return n + __builtin_popcount(mask);
#else
  for (int i = 0; i < kLanes; ++i) {  // without a branch: the slot after the last is overwritten
    out[n] = {bits_of(x[i]), id + i};
    n += !(x[i] < bound);
  }
  return n;
#endif
}

// Stable, descending: three digits of the keys' range. `spare` has n slots; the result is in `spare`.
void sort(Ranked* ranked, Ranked* spare, int64_t n) {
  uint32_t least = ~0u, most = 0, place[3][2049] = {};
  for (int64_t i = 0; i < n; ++i) least = std::min(least, ranked[i].key), most = std::max(most, ranked[i].key);
  int bits = 1;
  while (bits < 11 && (most - least) >> 3 * bits) ++bits;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < n; ++i)
    for (int digit = 0; digit < 3; ++digit) ++place[digit][((most - ranked[i].key) >> bits * digit & mask) + 1];
  for (int digit = 0; digit < 3; ++digit, std::swap(ranked, spare)) {
    std::partial_sum(place[digit], place[digit] + mask + 2, place[digit]);
    for (int64_t i = 0; i < n; ++i) spare[place[digit][(most - ranked[i].key) >> bits * digit & mask]++] = ranked[i];
  }
}

// Mean log-probabilities of a chunk's rows, and their exponentials.
struct Side {
  const Matrix& logits;
  const float inverse;
  Scratch scratch;
  float *mean, *e, *hide;
  int64_t others;                  // tokens without a partner
  float bound = 1;                 // what the last chunk's m largest exceeded
  std::vector<float> maxima, scales;  // of the chunk's rows: max z, 1 / sum exp((z - max) / tau)
  std::vector<Ranked> ranked, spare;

  Side(const Matrix& logits, float inverse, const int64_t* pairs, int64_t n)
      : logits(logits), inverse(inverse), scratch(3, logits.cols), mean(scratch.row(0)), e(scratch.row(1)),
        hide(scratch.row(2)), others(logits.cols - n), ranked(others + 2 * kLanes), spare(others + kLanes) {
    std::fill_n(hide, scratch.stride, kHidden);
    std::fill_n(hide, logits.cols, 0.0f);
    for (int64_t i = 0; i < n; ++i) hide[pairs[i]] = kHidden;
  }

  // Logits i .. i + kLanes of a row, -inf beyond its end.
  template <class T>
  vf at(const T* z, int64_t i) const {
    if (i + kLanes <= logits.cols) return load(z + i);
    vf v = splat(-kInf);
    for (int64_t j = i; j < logits.cols; ++j) v[j - i] = to_float(z[j]);
    return v;
  }

  template <class T>
  void add(const T* z, float share, bool first, bool last) {
    float best = -FLT_MAX;
    double total = 0;
    for (int64_t from = 0; from < scratch.stride; from += kBlock) {
      const int64_t to = std::min(from + kBlock, scratch.stride);
      vf top = splat(best), part = {};
      for (int64_t i = from; i < to; i += kLanes) top = vmax(at(z, i), top);
      const float here = max(top);
      total *= exp_nonpositive(splat((best - here) * inverse))[0];
      best = here;
      for (int64_t i = from; i < to; i += kLanes) part += exp_nonpositive((at(z, i) - best) * inverse);
      total += sum(part);
    }
    maxima.push_back(best);
    scales.push_back(float(1 / total));
    const float lse = float(std::log(total));
    for (int64_t j = 0; j < scratch.stride; j += kLanes) {
      vf v = ((at(z, j) - best) * inverse - lse) * share;
      if (!first) v += load(mean + j);
      store(mean + j, v);
      if (last) store(e + j, exp_nonpositive(v));
    }
  }

  void read(const Members& rows, int64_t c) {
    const int64_t n = rows.count(c);
    const float share = 1 / (float(n) + kEps);
    maxima.clear(), scales.clear();
    for (int64_t i = 0; i < n; ++i)
      with_type(logits, [&](auto* z) { add(z + rows.row(c, i) * logits.stride, share, i == 0, i == n - 1); });
  }

  int64_t collect(float bound) {
    int64_t n = 0;
    for (int64_t j = 0; j < scratch.stride; j += kLanes) {
      const vf hidden = load(hide + j);
      n = append(hidden < 0 ? hidden : load(e + j), bound, int32_t(j), ranked.data(), n);
    }
    return n;
  }

  // The m largest probabilities of the others, descending, equal ones by id.
  const Ranked* rank(int64_t m) {
    int64_t n = collect(bound);
    while (n < m) n = collect(bound = bound > 1e-35f ? bound / 4 : 0);
    if (n > m + m / 4) n = narrow(n, m);
    sort(ranked.data(), spare.data(), n);
    if (m > 0) {
      std::memcpy(&bound, &spare[m - 1].key, 4);
      bound /= 2;
    }
    return spare.data();
  }

 private:
  // Of n collected drops those that the leading bits alone show not to be among the m largest.
  int64_t narrow(int64_t n, int64_t m) {
    uint32_t leading[2048] = {};
    for (int64_t i = 0; i < n; ++i) ++leading[ranked[i].key >> 20];
    int64_t first = 2047, kept = leading[2047];
    while (first > 0 && kept < m) kept += leading[--first];
    kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      ranked[kept] = ranked[i];
      kept += ranked[kept].key >= uint32_t(first) << 20;
    }
    return kept;
  }
};

struct Worker {
  const GoldKL& in;
  const GoldKLResult& out;
  const float inverse = 1 / in.temperature;
  Side student{in.student, inverse, in.students, in.pairs}, teacher{in.teacher, inverse, in.teachers, in.pairs};
  Scratch slope{1, in.student.cols};
  float* D = slope.row(0);
  const int64_t m = std::min({student.others, teacher.others, in.uncommon_topk});

  void chunk(int64_t c, const Members& students, const Members& teachers) {
    const int64_t n = students.count(c);
    const float common_weight = out.weight_common ? out.weight_common[c] : 0, l1_weight = out.weight_l1 ? out.weight_l1[c] : 0;
    const bool slopes = common_weight != 0 || l1_weight != 0;
    if (out.common) out.common[c] = out.l1[c] = 0, out.agree[c] = false;
    if (n == 0 || teachers.count(c) == 0 || (!out.common && !slopes)) {
      for (int64_t i = 0; i < n; ++i) zero(out.grad, students.row(c, i));
      return;
    }
    student.read(students, c);
    teacher.read(teachers, c);
    if (slopes) std::fill_n(D, slope.stride, 0.0f);
    common(common_weight, c);
    if (out.common || l1_weight != 0) l1(l1_weight, c);
    if (!out.grad.data) return;
    const double sum_D = slopes ? sum_blocks(slope.stride, [&](int64_t j) { return load(D + j); }) : 0;
    for (int64_t i = 0; i < n; ++i)
      with_type(out.grad, [&](auto* g) {
        const int64_t row = students.row(c, i);
        g += row * out.grad.stride;
        if (!slopes) std::memset(g, 0, out.grad.cols * sizeof *g);
        else write(static_cast<decltype(g)>(in.student.data) + row * in.student.stride, g, i, sum_D, 1 / (float(n) + kEps));
      });
  }

  static void zero(const Matrix& grad, int64_t row) {
    if (grad.data) with_type(grad, [&](auto* g) { std::memset(g + row * grad.stride, 0, grad.cols * sizeof *g); });
  }

 private:
  // The part of the mapped pairs; adds weight dcommon/dA to D where `weight` is not 0.
  void common(float weight, int64_t c) {
    alignas(64) float a[kPairs], b[kPairs];
    double total = 0;
    float best_a = -kInf, best_b = -kInf;
    int64_t place_a = 0, place_b = 0;
    for (int64_t from = 0; from < in.pairs; from += kPairs) {
      const int64_t n = std::min(kPairs, in.pairs - from), padded = ceil_div(n, kLanes) * kLanes;
      for (int64_t i = 0; i < n; ++i) a[i] = student.mean[in.students[from + i]], b[i] = teacher.mean[in.teachers[from + i]];
      std::fill(a + n, a + padded, -kInf), std::fill(b + n, b + padded, -kInf);
      raise(a, padded, from, best_a, place_a), raise(b, padded, from, best_b, place_b);
      vf part = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const vf x = load(a + i), y = load(b + i), p = exp_nonpositive(in.reverse ? x : y), apart = in.reverse ? x - y : y - x;
        part += p == vf{} ? p : p * apart;
        store(a + i, p == vf{} ? p : (in.reverse ? p * (1.0f + apart) : -p) * weight);
      }
      total += sum(part);
      for (int64_t i = 0; weight != 0 && i < n; ++i) D[in.students[from + i]] = a[i];
    }
    if (out.common) out.common[c] = float(total), out.agree[c] = in.pairs > 0 && place_a == place_b;
  }

  // A larger value among x[0..n), and its first place counted from `from`.
  static void raise(const float* x, int64_t n, int64_t from, float& best, int64_t& place) {
    vf top = splat(-kInf);
    for (int64_t i = 0; i < n; i += kLanes) top = vmax(load(x + i), top);
    const float here = max(top);
    if (here > best) best = here, place = from + (std::find(x, x + n, here) - x);
  }

  // The part of the others; adds weight dl1/dA to D where `weight` is not 0.
  void l1(float weight, int64_t c) {
    const Ranked *x = student.rank(m), *y = teacher.rank(m);
    double total = 0;
    for (int64_t from = 0; from < m; from += kBlock) {
      float part[4] = {};
      for (int64_t i = from; i < std::min(from + kBlock, m); ++i) {
        float a, b;
        std::memcpy(&a, &x[i].key, 4), std::memcpy(&b, &y[i].key, 4);
        part[i & 3] += std::fabs(a - b);
        if (weight != 0) D[x[i].id] = a > b ? weight * a : a < b ? -weight * a : 0;
      }
      total += double(part[0] + part[1]) + (part[2] + part[3]);
    }
    if (out.l1) out.l1[c] = float(total);
  }

  // Row i of the chunk.
  template <class T>
  void write(const T* z, T* to, int64_t i, double sum_D, float share) const {
    const float best = student.maxima[i], back = float(sum_D * student.scales[i]), factor = share * inverse;
    const int64_t width = in.student.cols;
    int64_t j = 0;
    auto one = [&] {
      const float p = exp_nonpositive(splat((to_float(z[j]) - best) * inverse))[0];
      from_float((D[j] - p * back) * factor, to[j]);
    };
    for (; j < width && reinterpret_cast<uintptr_t>(to + j) % 64; ++j) one();
    for (; j + kLanes <= width; j += kLanes)
      stream(to + j, (load(D + j) - exp_nonpositive((load(z + j) - best) * inverse) * back) * factor);
    for (; j < width; ++j) one();
  }
};

}  // namespace

void gold_kl(const GoldKL& in, const GoldKLResult& out) {
  const Members students(in.student_chunk, in.student.rows, in.chunks), teachers(in.teacher_chunk, in.teacher.rows, in.chunks);
#pragma omp parallel
  {
    Worker worker{in, out};
#pragma omp for schedule(dynamic) nowait
    for (int64_t c = 0; c < in.chunks; ++c) worker.chunk(c, students, teachers);
#pragma omp for
    for (int64_t i = 0; i < in.student.rows; ++i)
      if (in.student_chunk[i] < 0) Worker::zero(out.grad, i);
    fence();
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
