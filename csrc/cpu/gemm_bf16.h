// The product of two bf16 matrices with the AVX512-BF16 instruction, which some AVX-512 processors have: two exact products
// per lane, added to an fp32 sum, at twice the rate of fp32. Panels as in gemm.h, with a pair of depth steps where gemm.h has
// one float; subnormal inputs count as zero.
#pragma once
#include <type_traits>

#include "cpu/gemm.h"

namespace chassis {
namespace CHASSIS_ISA {

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define CHASSIS_BF16_PRODUCTS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

inline bool has_bf16_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

// c [kMr, kNr] (+)= a b over `pairs` pairs of depth steps.
CHASSIS_BF16_PRODUCTS inline void micro_kernel_bf16(const float* a, const float* b, int64_t pairs, float* c, int64_t ldc,
                                                    bool accumulate) {
  __m512 sum[kMr][2];
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += kMr, b += kNr) {
    __m512bh b0 = (__m512bh)_mm512_loadu_ps(b), b1 = (__m512bh)_mm512_loadu_ps(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
      __m512bh left = (__m512bh)_mm512_set1_ps(a[i]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], left, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], left, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* to = c + i * ldc + j * kLanes;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}
#else
inline bool has_bf16_products() { return false; }
inline void micro_kernel_bf16(const float*, const float*, int64_t, float*, int64_t, bool) {}
#endif

// Packs n rows of `depth` steps, contiguous along the depth, into panels of [ceil(depth / 2)][kWidth] pairs; a missing
// last step is zero. The pairs only travel: no arithmetic touches them.
template <int kWidth>
inline void pack_pairs(const bf16* data, int64_t stride, int64_t n, int64_t depth, float* out) {
  int64_t pairs = (depth + 1) / 2;
  for (int64_t i = 0; i < n; i += kWidth, out += kWidth * pairs)
    for (int part = 0; part < kWidth; part += kLanes) {
      int64_t rows = std::min<int64_t>({n - i - part, kWidth - part, kLanes});
      for (int64_t k = 0; k < pairs; k += kLanes) {
        const bf16* from = data + (i + part) * stride + 2 * k;
        for (int64_t r = i + part + kLanes; r < std::min<int64_t>(i + part + 2 * kLanes, n); ++r)
          __builtin_prefetch(data + r * stride + 2 * k);  // rows far apart: no processor guesses the next ones
        vf block[kLanes];
        float* to = out + k * kWidth + part;
        if (rows == kLanes && depth - 2 * k >= 2 * kLanes && kWidth % kLanes == 0) {  // counts known: all in registers
          for (int r = 0; r < kLanes; ++r) std::memcpy(&block[r], from + r * stride, sizeof block[r]);
          transpose(block);
          for (int j = 0; j < kLanes; ++j) store(to + j * kWidth, block[j]);
          continue;
        }
        std::fill_n(block, kLanes, vf{});
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(&block[r], from + r * stride, 2 * std::min<int64_t>(depth - 2 * k, 2 * kLanes));
        transpose(block);
        for (int64_t j = 0; j < std::min<int64_t>(kLanes, pairs - k); ++j)
          store_step<kWidth>(to + j * kWidth, block[j], k + j == pairs - 1);
      }
    }
}

// The same where the width is contiguous: step k of column i is data[row(k) * stride + i], row(k) = index ? index[k] : k.
template <int kWidth>
inline void pack_pairs_across(const bf16* data, int64_t stride, const int64_t* index, int64_t n, int64_t depth, float* out) {
  int64_t pairs = (depth + 1) / 2;
  for (int64_t i = 0; i < n; i += kWidth, out += kWidth * pairs)
    for (int64_t k = 0; k < pairs; ++k)
      for (int part = 0; part < kWidth; part += kLanes) {
        auto line = [&](int64_t step) {
          vi bits = {};
          if (step == depth) return bits;
          vf wide = load_line(data + (index ? index[step] : step) * stride + i + part, 1, n - i - part);
          std::memcpy(&bits, &wide, sizeof bits);
          return bits;
        };
        vi both = ((line(2 * k) >> 16) & 0xffff) | line(2 * k + 1);
        vf pair;
        std::memcpy(&pair, &both, sizeof pair);
        store_step<kWidth>(out + k * kWidth + part, pair, k == pairs - 1);
      }
}

// c [m, n] (row stride ldc) (+)= packed a times packed b; ragged edges go through a local tile.
inline void multiply_pairs(const float* a, int64_t m, const float* b, int64_t n, int64_t depth, float* c, int64_t ldc,
                           bool accumulate) {
  int64_t pairs = (depth + 1) / 2;
  for (int64_t j = 0; j < n; j += kNr)  // a panel of b and, up to some 100 rows by 128 steps, all of a stay in L1
    for (int64_t i = 0; i < m; i += kMr) {
      float* out = c + i * ldc + j;
      if (i + kMr <= m && j + kNr <= n) {
        micro_kernel_bf16(a + i * pairs, b + j * pairs, pairs, out, ldc, accumulate);
        continue;
      }
      float tile[kMr * kNr] = {};
      micro_kernel_bf16(a + i * pairs, b + j * pairs, pairs, tile, kNr, false);
      for (int64_t r = 0; r < std::min<int64_t>(kMr, m - i); ++r)
        for (int64_t s = 0; s < std::min<int64_t>(kNr, n - j); ++s)
          out[r * ldc + s] = (accumulate ? out[r * ldc + s] : 0) + tile[r * kNr + s];
    }
}

// Products in one of the two ways, chosen at run time: pairs of bf16, or fp32 panels of any operands.
struct Multiplier {
  bool pairs;

  int64_t steps(int64_t depth) const { return pairs ? (depth + 1) / 2 : depth; }  // what a column of a panel takes, in floats

  template <int kWidth, class T>
  void pack_panels(const Operand<T>& m, int64_t n, int64_t depth, float* out) const {
    if constexpr (std::is_same_v<T, bf16>) {
      if (pairs && m.depth_stride == 1 && !m.index) return pack_pairs<kWidth>(m.data, m.stride, n, depth, out);
      if (pairs) return pack_pairs_across<kWidth>(m.data, m.depth_stride, m.index, n, depth, out);
    }
    pack<kWidth>(m, n, depth, out);
  }
  void multiply(const float* a, int64_t m, const float* b, int64_t n, int64_t depth, float* c, int64_t ldc, bool accumulate) const {
    (pairs ? multiply_pairs : multiply_panels)(a, m, b, n, depth, c, ldc, accumulate);
  }
};

}  // namespace CHASSIS_ISA
}  // namespace chassis
