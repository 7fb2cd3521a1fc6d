// The product of rows with a matrix that is read once and as it lies in memory:
//
//   y[i, j] (+)= sum_k a[i, k] b[k, j]
//
// kSum steps at a time by as many columns as R rows have registers for. A step is a row of b or, with kPairs, two rows of
// bf16 next to each other in each lane, as two bf16 of a are in each float of it. Up to kDirect rows multiply b as it is loaded;
// more of them share a panel of it, copied to L1 as fp32 or pairs. What comes next is fetched meanwhile, a line or two with
// every step: in a burst most requests would be dropped.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/gemm_bf16.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int64_t kSum = 64;  // products per running sum: longer ones lose digits
constexpr int64_t kDirect = 2 * kMr;  // rows

constexpr int64_t kFetched = kSum;  // lines

// Cache lines of rows of another matrix, fetched one with every step of products that leave memory time for it.
struct Ahead {
  struct Part {
    const char* data;
    int64_t stride;  // bytes
    const int64_t* rows;
    int64_t count;
    const int64_t* offsets;  // in bytes from the start of each row, whole chunks of kFetched
    int64_t lines;
  };
  std::vector<Part> parts;
  size_t part = 0;
  int64_t row = 0, at = 0;

  // The row and the offsets of the next kFetched lines.
  std::pair<const char*, const int64_t*> next() {
    static constexpr int64_t nothing[kFetched] = {};
    if (part == parts.size()) return {reinterpret_cast<const char*>(nothing), nothing};
    const Part& p = parts[part];
    std::pair<const char*, const int64_t*> found{p.data + p.rows[row] * p.stride, p.offsets + at};
    if ((at += kFetched) >= p.lines) at = 0, ++row;
    if (row == p.count) row = 0, ++part;
    return found;
  }
};

constexpr int64_t kNext = 2;  // tiles from the one that is multiplied to the one that is fetched

// Rows of activations as [chunk of kSum columns][row][kSum]: a stride known to the compiler saves an address per row.
struct Rows {
  float* data;
  int64_t rows;
  float* at(int64_t row, int64_t column) const { return data + (column / kSum * rows + row) * kSum + column % kSum; }
};

// Vectors of columns for R rows: sums enough to keep the multipliers busy.
constexpr int vectors(int64_t rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : rows <= kMr ? 2 : 1; }

// kLanes columns of a step of b, with kPairs two bf16 in each lane.
template <bool kPairs, class T>
inline vf load_step(const T* b, int64_t ldb, int64_t columns = kLanes) {
  vf first = load_line(b, 1, columns);
  if constexpr (!kPairs) return first;
  vf second = load_line(b + ldb, 1, columns);
  vi low, high;
  std::memcpy(&low, &first, sizeof low);
  std::memcpy(&high, &second, sizeof high);
  high |= (low >> 16) & 0xffff;
  std::memcpy(&first, &high, sizeof first);
  return first;
}

// sum + a b, a in every lane.
template <bool kPairs>
inline vf add_product(vf sum, const float& a, vf b) {
#if defined(CHASSIS_BF16_PRODUCTS)
  if constexpr (kPairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(_mm512_set1_ps(a)));
    return sum;
  }
#endif
  return sum + a * b;
}

// out[i * ldo + j] (+)= sum_k a[i * kSum + k] b[k * ldb + j] for R rows and C vectors, steps k < depth <= kSum. Each fetches
// kFetch lines of each of its rows, those at next + k * step, and with kAhead another.
template <bool kPairs, int R, int C, int kFetch, bool kAhead, class T>
inline void multiply(const float* a, const T* b, int64_t ldb, int64_t depth, float* out, int64_t ldo, bool accumulate,
                     const char* next, int64_t step, const char* other, const int64_t* offsets) {
  constexpr bool kTwo = kPairs && std::is_same_v<T, bf16>;  // rows to a step; a packed panel holds pairs already
  vf sum[R][C] = {};
  for (int64_t k = 0; k < depth; ++k, b += kTwo ? 2 * ldb : ldb, next += step) {
    for (int line = 0; line < kFetch; ++line) __builtin_prefetch(next + 64 * line);
    if (kTwo)
      for (int line = 0; line < kFetch; ++line) __builtin_prefetch(next + ldb * sizeof(T) + 64 * line);
    if (kAhead) __builtin_prefetch(other + offsets[k], 0, 2);
    vf row[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) row[c] = load_step<kTwo>(b + c * kLanes, ldb);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[i][c] = add_product<kPairs>(sum[i][c], a[i * kSum + k], row[c]);
  }
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = out + i * ldo + c * kLanes;
      store(to, accumulate ? load(to) + sum[i][c] : sum[i][c]);
    }
}

template <class T>
using Kernel = void (*)(const float*, const T*, int64_t, int64_t, float*, int64_t, bool, const char*, int64_t,
                        const char*, const int64_t*);

template <bool kPairs, bool kFetch, size_t... i>
inline Kernel<float> panel_kernel(int64_t rows, std::index_sequence<i...>) {
  static constexpr Kernel<float> table[] = {multiply<kPairs, i + 1, 2, kFetch, kFetch, float>...};
  return table[rows - 1];
}

template <bool kPairs, class T, size_t... i>
inline Kernel<T> direct_kernel(int64_t rows, std::index_sequence<i...>) {
  static constexpr Kernel<T> table[] = {
      multiply<kPairs, i + 1, vectors(i + 1), ceil_div(vectors(i + 1) * kLanes * sizeof(T), 64), false, T>...};
  return table[rows - 1];
}

// out [a.rows, kNr] (+)= columns [k, k + depth) of a times a packed panel [depth, kNr]. With kFetch each kMr rows fetch
// lines `ahead`, the first of them also `lines` at next + k * step, `between` apart, with every step k.
template <bool kPairs = false, bool kFetch = false>
inline void multiply_rows(Rows a, int64_t k, const float* panel, int64_t depth, float* out, int64_t ldo, bool accumulate,
                          const char* next = nullptr, int64_t step = 0, int64_t lines = 0, int64_t between = 0,
                          Ahead* ahead = nullptr) {
  int64_t blocks = ceil_div(a.rows, kMr);
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t i = a.rows * block / blocks, rows = a.rows * (block + 1) / blocks - i;
    auto kernel = panel_kernel<kPairs, kFetch>(rows, std::make_index_sequence<kMr>());
    auto [other, offsets] = kFetch ? ahead->next() : std::pair<const char*, const int64_t*>{};
    const bool mine = block < lines;
    kernel(a.at(i, k), panel, kNr, depth, out + i * ldo, ldo, accumulate, mine ? next + between * block : other,
           mine ? step : 0, other, offsets);
  }
}

// Panel [depth, kNr] of steps of b, zeros where b ends.
template <bool kPairs, class T>
inline void stage(const T* b, int64_t ldb, int64_t depth, int64_t width, float* out) {
  for (int64_t k = 0; k < depth; ++k, b += kPairs ? 2 * ldb : ldb)
    for (int c = 0; c < kNr; c += kLanes) store(out + k * kNr + c, load_step<kPairs>(b + c, ldb, width - c));
}

// Whether so many rows multiply b as it is loaded, and the columns they then take at a time.
inline bool direct(int64_t rows, int64_t width) { return rows <= kMr || (rows <= kDirect && width % kLanes == 0); }
inline int64_t tile_width(int64_t rows, int64_t width) { return direct(rows, width) ? vectors(rows) * kLanes : kNr; }

// y [a.rows, width rounded up to kNr] = columns [0, depth) of a times `depth` steps of b, its rows `width` long. What is
// read after that is `then`; more than kDirect rows also fetch what is next `ahead`.
template <bool kPairs, class T>
inline void stream(Rows a, const T* b, int64_t ldb, int64_t depth, int64_t width, const T* then, float* y, int64_t ldy,
                   Ahead& ahead) {
  alignas(64) float panel[kSum * kNr];
  const int64_t across = tile_width(a.rows, width), row = ceil_div(width, across), tiles = ceil_div(depth, kSum) * row;
  const int64_t lds = kPairs ? 2 * ldb : ldb, step = lds * sizeof(T), lines = ceil_div(kNr * sizeof(T), 64);
  auto tile = [&](int64_t t) {
    return t < tiles ? b + t / row * kSum * lds + t % row * across : then + (t - tiles) * across;
  };
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t k = t / row * kSum, j = t % row * across, steps = std::min(kSum, depth - k);
    const char* next = reinterpret_cast<const char*>(tile(t + kNext));
    if (direct(a.rows, width) && width - j >= across) {
      auto kernel = direct_kernel<kPairs, T>(a.rows, std::make_index_sequence<kDirect>());
      kernel(a.at(0, k), tile(t), ldb, steps, y + j, ldy, k > 0, next, step, nullptr, nullptr);
      continue;
    }
    for (int64_t c = j; c < std::min(j + across, width); c += kNr) {
      stage<kPairs>(tile(t) + c - j, ldb, steps, width - c, panel);
      multiply_rows<kPairs, true>(a, k, panel, steps, y + c, ldy, k > 0, next, step, kPairs ? 2 : lines,
                                  kPairs ? ldb * sizeof(T) : 64, &ahead);
    }
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
