// What kernels over rows of logits share: scratch rows, sums, stores that bypass the caches, large pages, chunks.
#pragma once
#include <cfloat>
#include <numeric>
#include <vector>

#include "cpu/tensor.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace chassis {
namespace CHASSIS_ISA {

constexpr int64_t kBlock = 2048;  // values per fp32 sum; longer ones lose digits

// Past the caches when the address allows it: a gradient is read next by someone else.
template <class T>
inline void stream(T* p, vf v) { store_rounded(p, v); }
#if defined(__AVX512F__)
inline void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX2__)
inline void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
#endif
#if defined(__AVX2__)
inline void stream(bf16* p, vf v) {
  bf16 rounded[kLanes];
  store_rounded(rounded, v);
#if defined(__AVX512F__)
  __m256i bits;
  std::memcpy(&bits, rounded, sizeof bits);
  _mm256_stream_si256((__m256i*)p, bits);
#else
  __m128i bits;
  std::memcpy(&bits, rounded, sizeof bits);
  _mm_stream_si128((__m128i*)p, bits);
#endif
}
#endif
#if defined(__AVX512F__)
inline void stream(fp16* p, vf v) { _mm256_stream_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0)); }
#endif
// memcpy past the caches.
inline void stream_bytes(const void* from, void* to, size_t n) {
#if defined(__AVX2__)
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const size_t head = std::min<size_t>(n, -reinterpret_cast<uintptr_t>(target) % 64), whole = (n - head) / 64 * 64;
  std::memcpy(target, source, head);
  for (size_t i = head; i < head + whole; i += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(target + i), _mm512_loadu_si512(source + i));
#else
    for (size_t half = i; half < i + 64; half += 32)
      _mm256_stream_si256((__m256i*)(target + half), _mm256_loadu_si256((const __m256i*)(source + half)));
#endif
  }
  std::memcpy(target + head + whole, source + head + whole, n - head - whole);
#else
  std::memcpy(to, from, n);
#endif
}
inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Rows of floats padded with zeros to whole vectors.
struct Scratch {
  int64_t stride;
  Buffer data;
  Scratch(int64_t rows, int64_t width) : stride(ceil_div(width, kLanes) * kLanes), data(rows * stride) {
    for (int64_t i = 0; i < rows; ++i) std::fill(row(i) + width, row(i) + stride, 0.0f);
  }
  float* row(int64_t i) const { return data.get() + i * stride; }
};

// sum f(i) over [0, n) in whole vectors: fp32 within a block, double between blocks.
template <class F>
inline double sum_blocks(int64_t n, F f) {
  double total = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    vf part = {};
    for (int64_t i = from; i < std::min(from + kBlock, n); i += kLanes) part += f(i);
    total += sum(part);
  }
  return total;
}

// Values of a row as they are compared: bf16 by integers of the same order, others as floats.
template <class T>
struct Order {
  using Key = float;
  using Keys = vf;
  static constexpr int lanes = kLanes;
  static Key least() { return -kInf; }
  static Keys splat(Key key) { return CHASSIS_ISA::splat(key); }
  static Keys keys(const T* x) { return load(x); }
  static Key key(T x) { return to_float(x); }
  static float value(Key key) { return key; }
};
template <>
struct Order<bf16> {
  using Key = int16_t;
  typedef int16_t Keys __attribute__((vector_size(4 * kLanes)));
  static constexpr int lanes = 2 * kLanes;
  static Key least() { return key(bf16{0xff80}); }
  static Keys splat(Key key) { return key - Keys{}; }
  static Keys keys(const bf16* x) {
    Keys bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits ^ ((bits >> 15) & 0x7fff);
  }
  static Key key(bf16 x) { return Key(int16_t(x.bits) ^ ((int16_t(x.bits) >> 15) & 0x7fff)); }
  static float value(Key key) { return to_float(bf16{uint16_t(key ^ ((key >> 15) & 0x7fff))}); }
};

// The largest of z[0..n), at least -FLT_MAX.
template <class T>
inline float largest(const T* z, int64_t n) {
  using O = Order<T>;
  const typename O::Keys least = O::splat(O::least());
  typename O::Keys best[4] = {least, least, least, least};
  int64_t i = 0;
  for (; i + 4 * O::lanes <= n; i += 4 * O::lanes)
    for (int part = 0; part < 4; ++part) {
      const auto keys = O::keys(z + i + part * O::lanes);
      best[part] = keys > best[part] ? keys : best[part];
    }
  typename O::Key top = O::least();
  for (const auto& keys : best)
    for (int lane = 0; lane < O::lanes; ++lane) top = std::max<typename O::Key>(top, keys[lane]);
  for (; i < n; ++i) top = std::max<typename O::Key>(top, O::key(z[i]));
  return std::max(O::value(top), -FLT_MAX);
}

// Asks for 2 MiB pages under a large new tensor: faulting it in by 4 KiB pages takes longer than computing it.
inline void prefer_large_pages(const Matrix& m) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(m.data), size = m.dtype == DType::fp32 ? 4 : 2;
  const uintptr_t from = (first + page - 1) / page * page, to = (first + m.rows * m.stride * size) / page * page;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Fetches what rows of a matrix have in the columns J while others are worked on, one cache line a step.
struct Ahead {
  const Matrix& m;
  const int64_t size = m.dtype == DType::fp32 ? 4 : 2;
  std::vector<int32_t> lines;  // where in a row, in bytes
  std::vector<const char*> rows;
  const char* row = nullptr;
  const int32_t *line = nullptr, *end = nullptr;

  Ahead(const int64_t* columns, int64_t k, const Matrix& m) : m(m) {
    for (int64_t j = 0; j < k; ++j)
      if (j == 0 || columns[j] * size / 64 != columns[j - 1] * size / 64) lines.push_back(int32_t(columns[j] * size));
  }
  void clear() {
    rows.clear();
    line = end = nullptr;
  }
  void add(int64_t i) { rows.push_back(static_cast<const char*>(m.data) + i * m.stride * size); }
  void step() {
    if (line == end && !next()) return;
    __builtin_prefetch(row + *line++);
  }

 private:
  bool next() {
    if (rows.empty() || lines.empty()) return false;
    row = rows.back();
    rows.pop_back();
    line = lines.data();
    end = line + lines.size();
    return true;
  }
};

// The rows of each chunk: rows(c) = order[first[c]] .. order[first[c + 1]].
struct Members {
  std::vector<int64_t> first, order;
  Members(const int64_t* ids, int64_t n, int64_t chunks) : first(chunks + 1, 0) {
    for (int64_t i = 0; i < n; ++i)
      if (ids[i] >= 0) ++first[ids[i] + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    order.resize(first[chunks]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      if (ids[i] >= 0) order[next[ids[i]]++] = i;
  }
  int64_t count(int64_t c) const { return first[c + 1] - first[c]; }
  int64_t row(int64_t c, int64_t i) const { return order[first[c] + i]; }
};

}  // namespace CHASSIS_ISA
}  // namespace chassis
