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

template <size_t... i>
inline void interleave(vf a, vf b, vf& low, vf& high, std::index_sequence<i...>) {
  constexpr int half = kLanes / 2;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (i / 2 + (i % 2) * kLanes)...);
  high = __builtin_shufflevector(a, b, (half + i / 2 + (i % 2) * kLanes)...);
#else
  low = __builtin_shuffle(a, b, vi{int32_t(i / 2 + (i % 2) * kLanes)...});
  high = __builtin_shuffle(a, b, vi{int32_t(half + i / 2 + (i % 2) * kLanes)...});
#endif
}

// Transposes a kLanes x kLanes block: log2(kLanes) rounds, each a perfect shuffle of the row numbers' bits.
inline void transpose(vf* rows) {
  vf next[kLanes];
  for (int span = 1; span < kLanes; span *= 2) {
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1], std::make_index_sequence<kLanes>());
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
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

// c[i * ldc + j] (+)= sum_k a[k * kMr + i] * b[k * kNr + j] for one whole kMr x kNr tile, k < depth.
inline void micro_kernel(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  vf acc[kMr][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kMr, b += kNr) {
    vf b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) {
    float* row = c + i * ldc;
    store(row, accumulate ? load(row) + acc[i][0] : acc[i][0]);
    store(row + kLanes, accumulate ? load(row + kLanes) + acc[i][1] : acc[i][1]);
  }
}

// c [m, n] (row stride ldc) (+)= packed a [m, depth] times packed b [depth, n]; ragged edges go through a local tile.
inline void multiply_panels(const float* a, int64_t m, const float* b, int64_t n, int64_t depth, float* c, int64_t ldc,
                            bool accumulate) {
  for (int64_t i = 0; i < m; i += kMr)
    for (int64_t j = 0; j < n; j += kNr) {
      float* out = c + i * ldc + j;
      if (i + kMr <= m && j + kNr <= n) {
        micro_kernel(a + i * depth, b + j * depth, depth, out, ldc, accumulate);
        continue;
      }
      float tile[kMr * kNr];
      micro_kernel(a + i * depth, b + j * depth, depth, tile, kNr, false);
      for (int64_t r = 0; r < std::min<int64_t>(kMr, m - i); ++r)
        for (int64_t s = 0; s < std::min<int64_t>(kNr, n - j); ++s)
          out[r * ldc + s] = (accumulate ? out[r * ldc + s] : 0) + tile[r * kNr + s];
    }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
