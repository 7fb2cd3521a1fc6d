// Where a change of logits goes: the columns of one adapter, and adding to them in place.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/stream.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int64_t kBatch = 8 * kLanes;     // columns of a row that are gathered, changed and scattered together
constexpr int64_t kColumnChunk = 2048;  // columns of a block's change kept at a time: 48 rows are 384 KiB

[[noreturn]] inline void fail_id(const char* name, int64_t id, int64_t low, int64_t high) {
  throw std::out_of_range(std::string(name) + " holds " + std::to_string(id) + ": expected ids from " +
                          std::to_string(low) + " to " + std::to_string(high));
}

// The logits at ids[order[p]], without an order ids[p], without ids all.
struct Columns {
  const int64_t* ids = nullptr;
  int64_t count = 0;           // columns of V in use: all up to the last that is not -1
  bool whole = false;          // a row's change must be there before it is added: ids repeat, or have gaps
  std::vector<int32_t> order;  // ascending ids, of each chunk or of them all

  int64_t chunk() const { return whole ? count : kColumnChunk; }

  // Checks every id. `sorted`: ascending order keeps the writes of many rows streaming.
  Columns(const int64_t* given, int64_t columns, int64_t vocabulary, bool padded, bool sorted) : ids(given), count(columns) {
    if (!ids) return;
    while (padded && count > 0 && ids[count - 1] == -1) --count;
    if (count == 0) return;
    bool ascending = true;
    for (int64_t j = 1; j < count; ++j) ascending &= ids[j] > ids[j - 1];
    int64_t low = ids[0], high = ids[count - 1], lowest = padded ? -1 : 0;
    if (!ascending) {
      auto found = std::minmax_element(ids, ids + count);
      low = *found.first, high = *found.second;
    }
    if (low < lowest || high >= vocabulary) fail_id("cols", low < lowest ? low : high, lowest, vocabulary - 1);
    whole = low < 0;
    if (ascending && !whole) return;
    std::vector<bool> seen(vocabulary);
    for (int64_t j = 0; j < count && !whole; ++j) {
      whole = seen[ids[j]];
      seen[ids[j]] = true;
    }
    if (!whole && !sorted) return;
    for (int64_t j = 0; j < count; ++j)
      if (ids[j] >= 0) order.push_back(j);
    int64_t size = order.size(), step = chunk();
    for (int64_t j = 0; j < size; j += step)
      std::stable_sort(order.begin() + j, order.begin() + std::min(j + step, size),
                       [&](int32_t x, int32_t y) { return ids[x] < ids[y]; });
  }
};

template <class T>
inline void add_all(T* row, int64_t count, const float* change, const float* shift) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store_rounded(row + j, load(row + j) + (load(change + j) + load(shift + j)));
  for (; j < count; ++j) from_float(to_float(row[j]) + (change[j] + shift[j]), row[j]);
}

// The cache lines of a row that columns lie in, as offsets in bytes: what to fetch before they are changed.
struct Lines {
  std::vector<int64_t> offsets;  // whole chunks of kFetched, filled up with the last one
  std::vector<int32_t> start;    // of each batch's lines

  Lines() = default;
  Lines(const int64_t* cols, int64_t count, int64_t bytes) : offsets(round_up(count, kFetched)), start(1) {
    int64_t size = 0, last = -1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = cols[j] * bytes;
      offsets[size] = at;  // kept if its line is another: no branch, which would be mispredicted as often as not
      size += at / 64 != last;
      last = at / 64;
      if ((j + 1) % kBatch == 0 || j + 1 == count) start.push_back(size);
    }
    int64_t chunks = round_up(size, kFetched);
    std::fill(offsets.begin() + size, offsets.begin() + chunks, size ? offsets[size - 1] : 0);
    offsets.resize(chunks);
  }
  int64_t batches() const { return start.size() - 1; }
  int64_t size(int64_t batch) const { return start[batch + 1] - start[batch]; }
  const int64_t* batch(int64_t i) const { return offsets.data() + start[i]; }
};

// With each batch the next one's lines are fetched, after the last those of the first in the row that follows.
template <class T>
inline void add_at(T* row, const T* following, const int64_t* cols, int64_t count, const Lines& lines, const float* change,
                   const float* shift) {
  float old[kBatch];
  T fresh[kBatch];
  for (int64_t b = 0; b < lines.batches(); ++b, cols += kBatch, change += kBatch, shift += kBatch, count -= kBatch) {
    const bool last = b + 1 == lines.batches();
    const int64_t here = std::min(kBatch, count), ahead = last ? 0 : b + 1, fetched = lines.size(ahead);
    const int64_t* line = lines.batch(ahead);
    const char* there = reinterpret_cast<const char*>(last ? following : row);
    int64_t j = 0;
    for (j = 0; j < here; ++j) {
      if (j < fetched) __builtin_prefetch(there + line[j], 1);
      old[j] = to_float(row[cols[j]]);
    }
    for (j = 0; j + kLanes <= here; j += kLanes) store_rounded(fresh + j, load(old + j) + (load(change + j) + load(shift + j)));
    for (; j < here; ++j) from_float(old[j] + (change[j] + shift[j]), fresh[j]);
    for (j = 0; j < here; ++j) row[cols[j]] = fresh[j];
  }
}

// Sums the changes of equal columns, which the order makes neighbours, before the one rounding.
template <class T>
inline void add_ordered(T* row, const Columns& c, int64_t from, int64_t count, const float* change, const float* shift) {
  const int32_t* order = c.order.data() + from;
  for (int64_t j = 0; j < count;) {
    int64_t column = c.ids[order[j]];
    float total = 0;
    for (; j < count && c.ids[order[j]] == column; ++j) total += change[order[j] - from] + shift[order[j] - from];
    from_float(to_float(row[column]) + total, row[column]);
  }
}

// Adds change [rows, ldc] + shift to `count` columns, from the one numbered `from` on, of those rows of the logits.
inline void add_change(const Matrix& logits, const int64_t* rows, int64_t n, const Columns& c, int64_t from, int64_t count,
                       const float* change, int64_t ldc, const float* shift, const Lines& lines) {
  with_type(logits, [&](auto* data) {
    for (int64_t i = 0; i < n; ++i, change += ldc) {
      auto *to = data + rows[i] * logits.stride, *following = data + rows[std::min(i + 1, n - 1)] * logits.stride;
      if (!c.ids) add_all(to + from, count, change, shift);
      else if (c.order.empty()) add_at(to, following, c.ids + from, count, lines, change, shift);
      else add_ordered(to, c, from, c.whole ? c.order.size() : count, change, shift);
    }
  });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
