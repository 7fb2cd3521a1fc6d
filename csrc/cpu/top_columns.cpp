// The k columns of a matrix of logits with the largest maxima over the rows kept, ascending; ties go to the lowest columns.
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kColumns = 4096;  // a task's columns: their maxima stay in L1 while the rows stream past, four at a time

template <class T>
void column_maxima(const T* x, int64_t stride, const std::vector<int64_t>& rows, int64_t n, float* out) {
  using O = Order<T>;
  typename O::Key best[kColumns];
  std::fill_n(best, n, O::least());
  for (size_t i = 0; i < rows.size(); i += 4) {
    const T* from[4];
    for (size_t part = 0; part < 4; ++part) from[part] = x + rows[std::min(i + part, rows.size() - 1)] * stride;
    int64_t j = 0;
    for (; j + O::lanes <= n; j += O::lanes) {
      typename O::Keys top;
      std::memcpy(&top, best + j, sizeof top);
      for (int part = 0; part < 4; ++part) {
        const auto keys = O::keys(from[part] + j);
        top = keys > top ? keys : top;
      }
      std::memcpy(best + j, &top, sizeof top);
    }
    for (; j < n; ++j)
      for (int part = 0; part < 4; ++part) best[j] = std::max<typename O::Key>(best[j], O::key(from[part][j]));
  }
  for (int64_t j = 0; j < n; ++j) out[j] = O::value(best[j]);
}

// Unsigned integers in the order of floats; -0 is 0.
inline uint32_t ordered(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The bucket, from the last one down, in which the k-th entry lies; k becomes its place within the bucket.
uint32_t bucket_of(const std::vector<int32_t>& counts, int64_t& k) {
  uint32_t bucket = uint32_t(counts.size()) - 1;
  for (; k > counts[bucket]; --bucket) k -= counts[bucket];
  return bucket;
}

}  // namespace

void top_columns(const Matrix& logits, const uint8_t* keep, int64_t k, int64_t* out) {
  if (k <= 0) return;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < logits.rows; ++i)
    if (!keep || keep[i]) rows.push_back(i);
  std::vector<float> best(logits.cols);
#pragma omp parallel for schedule(dynamic)
  for (int64_t from = 0; from < logits.cols; from += kColumns)
    with_type(logits, [&](auto* x) {
      column_maxima(x + from, logits.stride, rows, std::min(kColumns, logits.cols - from), best.data() + from);
    });
  // The k-th largest by its leading, then its trailing 16 bits.
  std::vector<int32_t> counts(1 << 16);
  for (float x : best) ++counts[ordered(x) >> 16];
  int64_t ties = k;
  const uint32_t leading = bucket_of(counts, ties);
  std::fill(counts.begin(), counts.end(), 0);
  for (float x : best)
    if (ordered(x) >> 16 == leading) ++counts[ordered(x) & 0xffff];
  const uint32_t last = leading << 16 | bucket_of(counts, ties);
  for (int64_t j = 0; j < logits.cols; ++j)
    if (ordered(best[j]) > last || (ordered(best[j]) == last && ties-- > 0)) *out++ = j;
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
