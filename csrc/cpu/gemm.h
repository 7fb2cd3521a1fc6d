// The fp32 matrix product shared by the CPU kernels, as parts: pack both operands into panels, then multiply panels.
//
//   C[m, n] = sum_k A[m, k] * B[k, n]
//
// A block of at most kKc depth steps is packed once: A into panels of kMr rows, B into panels of kNr columns, both stored
// depth-major ([depth][width], zero-padded to the width), so that one depth step of a kMr x kNr tile is two contiguous
// loads of B, kMr broadcasts of A and 2 * kMr fused multiply-adds into registers. Packing is also where bf16 and fp16
// become fp32, where means are subtracted, rows are selected and weights applied: always in fp32, before any product.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/simd.h"

namespace chassis {
namespace CHASSIS_ISA {

// 2 * kMr accumulators, two vectors of B and a broadcast fit the 32, 16, 16 (NEON: 32) registers.
constexpr int kNr = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kMr = 12;
#elif defined(__AVX2__)
constexpr int kMr = 6;
#elif defined(__aarch64__)
constexpr int kMr = 8;
#else
constexpr int kMr = 4;
#endif
// An A panel (18 KiB) stays in L1 while B panels stream from L2, and dot products are summed in blocks of this length.
constexpr int64_t kKc = 384;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
// Floats that `pack<kWidth>` writes for `n` rows or columns of `depth` steps.
template <int kWidth>
constexpr int64_t packed_size(int64_t n, int64_t depth) { return round_up(n, kWidth) * depth; }

// One operand: element (i, k), with i along the panel width and k along the depth, is
//   weight[k] * (data[i * stride + row(k) * depth_stride] - mean[i] - depth_mean[k]),   row(k) = index ? index[k] : k
// where each of mean [n], depth_mean [depth], weight [depth] and index [depth] may be absent.
template <class T>
struct Operand {
  const T* data;
  int64_t stride, depth_stride;
  const float* mean = nullptr;
  const float* depth_mean = nullptr;
  const float* weight = nullptr;
  const int64_t* index = nullptr;

  const T* at(int64_t i, int64_t k) const { return data + i * stride + (index ? index[k] : k) * depth_stride; }
  Operand from(int64_t i, int64_t k) const {
    return {data + i * stride + (index ? 0 : k * depth_stride), stride,
            depth_stride, mean ? mean + i : nullptr, depth_mean ? depth_mean + k : nullptr,
            weight ? weight + k : nullptr, index ? index + k : nullptr};
  }
};

// Every `span` lanes of `even` and `odd` are the even and the odd runs of `run` lanes in those of a, then in those of b.
template <int run, int span, size_t... i>
inline void unzip(vf a, vf b, vf& even, vf& odd, std::index_sequence<i...>) {
#define CHASSIS_FROM (i / span * span + i % (span / 2) / run * 2 * run + i % run + (i % span < span / 2 ? 0 : kLanes))
#if defined(__clang__)
  even = __builtin_shufflevector(a, b, CHASSIS_FROM...);
  odd = __builtin_shufflevector(a, b, (CHASSIS_FROM + run)...);
#else
  even = __builtin_shuffle(a, b, vi{int32_t(CHASSIS_FROM)...});
  odd = __builtin_shuffle(a, b, vi{int32_t(CHASSIS_FROM + run)...});
#endif
#undef CHASSIS_FROM
}

// Transposes the squares of count x count runs of `run` lanes in rows 0, step, 2 step, ...: each round moves one bit of the
// rows' numbers into the lanes'.
template <int run, int count>
inline void transpose_runs(vf* rows, int step) {
  vf next[count];
  for (int round = 1; round < count; round *= 2) {
    for (int i = 0; i < count / 2; ++i)
      unzip<run, run * count>(rows[2 * i * step], rows[(2 * i + 1) * step], next[i], next[i + count / 2],
                              std::make_index_sequence<kLanes>());
    for (int i = 0; i < count; ++i) rows[i * step] = next[i];
  }
}

// Transposes a kLanes x kLanes block: fours of lanes, which processors shuffle quickest, then the fours themselves.
inline void transpose(vf* rows) {
  for (int i = 0; i < kLanes; i += 4) transpose_runs<1, 4>(rows + i, 1);
  for (int i = 0; i < 4; ++i) transpose_runs<4, kLanes / 4>(rows + i, 4);
}

// Lane i of the result is f over all lanes of rows[i], which are used up.
template <class F>
inline vf reduce_rows(vf* rows, F f) {
  transpose(rows);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) rows[i] = f(rows[i], rows[i + half]);
  return rows[0];
}

// Up to kLanes values along a line; the lanes from `count` on are zero.
template <class T>
inline vf load_line(const T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  for (int i = 0; i < std::min<int64_t>(count, kLanes); ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

// Stores depth step k of a panel column block. Whole vectors run over into step k + 1, which is written next; the last
// step must not, because the next panel may belong to another thread.
template <int kWidth>
inline void store_step(float* p, vf v, bool last) {
  if (kWidth % kLanes == 0 || !last) store(p, v);
  else std::memcpy(p, &v, 4 * (kWidth % kLanes));
}

// One panel whose width runs along memory: each depth step is a load, a subtraction and a store.
template <int kWidth, class T>
inline void pack_across(const Operand<T>& m, int64_t n, int64_t depth, float* out) {
  for (int part = 0; part < kWidth; part += kLanes) {
    vf mean = m.mean ? load_line(m.mean + part, 1, n - part) : vf{};
    for (int64_t k = 0; k < depth; ++k) {
      vf v = load_line(m.at(part, k), 1, n - part) - mean;
      if (m.depth_mean) v -= m.depth_mean[k];
      if (m.weight) v *= m.weight[k];
      if (n - part < kLanes)
        for (int i = std::max<int64_t>(n - part, 0); i < kLanes; ++i) v[i] = 0;
      store_step<kWidth>(out + k * kWidth + part, v, k == depth - 1);
    }
  }
}

// One panel whose depth runs along memory (or neither does): kLanes rows by kLanes steps are transposed in registers.
template <int kWidth, class T>
inline void pack_along(const Operand<T>& m, int64_t n, int64_t depth, float* out) {
  for (int part = 0; part < kWidth; part += kLanes) {
    int rows = int(std::max<int64_t>(0, std::min<int64_t>({n - part, kWidth - part, kLanes})));
    for (int64_t k = 0; k < depth; k += kLanes) {
      int64_t steps = std::min<int64_t>(kLanes, depth - k);
      vf depth_mean = m.depth_mean ? load_line(m.depth_mean + k, 1, steps) : vf{};
      vf weight = m.weight ? load_line(m.weight + k, 1, steps) : splat(1);
      vf block[kLanes] = {};
      for (int i = 0; i < rows; ++i) {
        if (m.index)
          for (int64_t j = 0; j < steps; ++j) block[i][j] = to_float(*m.at(part + i, k + j));
        else
          block[i] = load_line(m.at(part + i, k), m.depth_stride, steps);
        if (m.mean) block[i] -= m.mean[part + i];
        block[i] = (block[i] - depth_mean) * weight;
      }
      transpose(block);
      for (int64_t j = 0; j < steps; ++j)
        store_step<kWidth>(out + (k + j) * kWidth + part, block[j], k + j == depth - 1);
    }
  }
}

// Packs n rows (or columns) of `depth` steps into ceil(n / kWidth) panels of [depth][kWidth] floats at `out`;
// kWidth is kMr for the left operand and kNr for the right one.
template <int kWidth, class T>
inline void pack(const Operand<T>& m, int64_t n, int64_t depth, float* out) {
  for (int64_t i = 0; i < n; i += kWidth, out += kWidth * depth) {
    if (m.stride == 1) pack_across<kWidth>(m.from(i, 0), n - i, depth, out);
    else pack_along<kWidth>(m.from(i, 0), n - i, depth, out);
  }
}

// c [kMr, two vectors] (row stride ldc) (+)= sign * sum_k a[i * kRow + k * kStep] * b[k * ldb + j], k < depth.
template <int kRow = 1, int kStep = kMr, class T>
inline void micro_kernel(const T* a, const T* b, int64_t ldb, int64_t depth, T* c, int64_t ldc, bool accumulate, T sign = 1) {
  constexpr int lanes = sizeof(vf) / sizeof(T);
  decltype(load(b)) acc[kMr][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kStep, b += ldb) {
    auto b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
      acc[i][0] += a[i * kRow] * b0;
      acc[i][1] += a[i * kRow] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      T* to = c + i * ldc + j * lanes;
      store(to, accumulate ? load(to) + sign * acc[i][j] : sign * acc[i][j]);
    }
}

// Operands of a product: packed panels, or what lies in memory in whole panels anyhow. at(i) is the panel of row or column i.
template <int kWidth>
struct Packed {
  const float* data;
  int64_t depth;
  static constexpr int kRow = 1, kStep = kWidth;
  int64_t step() const { return kWidth; }
  const float* at(int64_t i) const { return data + i * depth; }
};
template <int kStride>
struct WholeRows {
  const float* data;
  static constexpr int kRow = kStride, kStep = 1;
  const float* at(int64_t i) const { return data + i * kStride; }
};
struct WholeColumns {
  const float* data;
  int64_t stride;
  int64_t step() const { return stride; }
  const float* at(int64_t j) const { return data + j; }
};

// c [m, n] (row stride ldc) (+)= a [m, depth] times b [depth, n]; ragged edges go through a local tile.
template <class A, class B>
inline void multiply_views(A a, int64_t m, B b, int64_t n, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; i += kMr)
    for (int64_t j = 0; j < n; j += kNr) {
      float* out = c + i * ldc + j;
      if (i + kMr <= m && j + kNr <= n) {
        micro_kernel<A::kRow, A::kStep>(a.at(i), b.at(j), b.step(), depth, out, ldc, accumulate);
        continue;
      }
      float tile[kMr * kNr];
      micro_kernel<A::kRow, A::kStep>(a.at(i), b.at(j), b.step(), depth, tile, kNr, false);
      for (int64_t r = 0; r < std::min<int64_t>(kMr, m - i); ++r)
        for (int64_t s = 0; s < std::min<int64_t>(kNr, n - j); ++s)
          out[r * ldc + s] = (accumulate ? out[r * ldc + s] : 0) + tile[r * kNr + s];
    }
}
inline void multiply_panels(const float* a, int64_t m, const float* b, int64_t n, int64_t depth, float* c, int64_t ldc,
                            bool accumulate) {
  multiply_views(Packed<kMr>{a, depth}, m, Packed<kNr>{b, depth}, n, depth, c, ldc, accumulate);
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
