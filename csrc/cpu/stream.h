// The product of few rows, here called lines, with a matrix that is read once and as it lies in memory:
//
//   y[i, j] += sum_k a[i, k] b[k, j]
//
// kSteps steps at a time over a strip of columns, whose sums stay in L1. A step is one row of b in fp32, or a pair of rows
// in bf16 (gemm_bf16.h); a line of `a` holds one float, or a pair of bf16, for each.
#pragma once
#include "cpu/gemm_bf16.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int kSteps = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLines = 4;  // kLines * kSteps values of `a` stay in registers
#else
constexpr int kLines = 2;
#endif
constexpr int64_t kStripWidth = 1024;  // columns of a strip at most,
constexpr int64_t kStripLines = 32;    // lines that share a pass over b,
constexpr int64_t kStripSums = 4096;   // and sums in L1

template <int R>
inline void step_lines(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t width, float* y, int64_t ldy) {
  vf left[R][kSteps];
  for (int i = 0; i < R; ++i)
    for (int s = 0; s < kSteps; ++s) left[i][s] = splat(a[i * lda + s]);
  for (int64_t j = 0; j < width; j += kLanes) {
    vf row[kSteps];
    for (int s = 0; s < kSteps; ++s) row[s] = load(b + s * ldb + j);
    for (int i = 0; i < R; ++i) {
      vf sum = left[i][0] * row[0];
      for (int s = 1; s < kSteps; ++s) sum += left[i][s] * row[s];
      store(y + i * ldy + j, load(y + i * ldy + j) + sum);
    }
  }
}

#if defined(CHASSIS_BF16_PRODUCTS)
template <int R>
CHASSIS_BF16_PRODUCTS inline void step_lines_bf16(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t width,
                                                  float* y, int64_t ldy) {
  __m512bh left[R][kSteps];
  for (int i = 0; i < R; ++i)
    for (int s = 0; s < kSteps; ++s) left[i][s] = (__m512bh)_mm512_set1_ps(a[i * lda + s]);
  for (int64_t j = 0; j < width; j += kLanes) {
    __m512bh row[kSteps];
    for (int s = 0; s < kSteps; ++s) row[s] = (__m512bh)_mm512_loadu_ps(b + s * ldb + j);
    for (int i = 0; i < R; ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int s = 0; s < kSteps; ++s) sum = _mm512_dpbf16_ps(sum, left[i][s], row[s]);
      _mm512_storeu_ps(y + i * ldy + j, _mm512_add_ps(_mm512_loadu_ps(y + i * ldy + j), sum));
    }
  }
}
#else
template <int R>
inline void step_lines_bf16(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t) {}
#endif

template <int R>
inline void step_some(bool pairs, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t width, float* y, int64_t ldy) {
  if (pairs) step_lines_bf16<R>(a, lda, b, ldb, width, y, ldy);
  else step_lines<R>(a, lda, b, ldb, width, y, ldy);
}

// kSteps steps of b as fp32 or as pairs of bf16, zeros where b ends.
template <class T>
inline void stage(bool pairs, const T* b, int64_t ldb, int64_t depth, int64_t width, float* out) {
  auto line = [&](int64_t k, int64_t j) { return k < depth ? load_line(b + k * ldb + j, 1, width - j) : vf{}; };
  for (int64_t s = 0; s < kSteps; ++s)
    for (int64_t j = 0; j < width; j += kLanes) {
      vf both = line(pairs ? 2 * s : s, j);
      if (pairs) {
        vf second = line(2 * s + 1, j);
        vi low, high;
        std::memcpy(&low, &both, sizeof low);
        std::memcpy(&high, &second, sizeof high);
        low = ((low >> 16) & 0xffff) | high;
        std::memcpy(&both, &low, sizeof both);
      }
      store(out + s * kStripWidth + j, both);
    }
}

// y [lines, width] += a [lines, depth] b [depth, width], width <= kStripWidth; y and a have whole vectors and whole steps.
// Between steps `meanwhile(step)` is called, once for each: room to fetch what comes next.
template <class T, class F>
inline void stream(bool pairs, const float* a, int64_t lda, int64_t lines, const T* b, int64_t ldb, int64_t depth,
                   int64_t width, float* y, int64_t ldy, F meanwhile) {
  alignas(64) float staged[kSteps * kStripWidth];
  const int64_t rows = pairs ? 2 * kSteps : kSteps;
  for (int64_t first = 0; first < lines; first += kStripLines)
    for (int64_t k = 0, step = 0; k < depth; k += rows, step += kSteps) {
      const float* from = staged;
      int64_t ldf = kStripWidth, last = std::min(lines, first + kStripLines), i = first;
      if constexpr (std::is_same_v<T, float>)
        if (depth - k >= rows && width % kLanes == 0) from = b + k * ldb, ldf = ldb;
      if (from == staged) stage(pairs, b + k * ldb, ldb, depth - k, width, staged);
      if (first == 0) {
        for (int64_t row = k + rows; row < std::min(depth, k + 2 * rows); ++row)
          for (int64_t j = 0; j < width; j += int64_t(64 / sizeof(T))) __builtin_prefetch(b + row * ldb + j);
        meanwhile(step / kSteps);
      }
      for (; i + kLines <= last; i += kLines) step_some<kLines>(pairs, a + i * lda + step, lda, from, ldf, width, y + i * ldy, ldy);
      for (; i + 2 <= last; i += 2) step_some<2>(pairs, a + i * lda + step, lda, from, ldf, width, y + i * ldy, ldy);
      for (; i < last; ++i) step_some<1>(pairs, a + i * lda + step, lda, from, ldf, width, y + i * ldy, ldy);
    }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
