// logits[i, cols] += ((hidden_i - mean_a) U_a) V_a + bias_a, a = adapter_id[i], in place.
//
// Rows are grouped by adapter and cut into blocks of at most kMr rows; a block is multiplied with U, then with V, in fp32.
//   few rows   the threads share each block: depth blocks x column tiles of U, then column tiles of V, so that U and V are
//              streamed once; partial sums are added in a fixed order, whatever the number of threads.
//   many rows  U and V are packed once, then each thread takes whole blocks from hidden states to logits.
// A change is summed in fp32 and added to its logit with one rounding, also where `cols` repeats a column.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kColumnChunk = 2048;  // columns of a block's change kept at a time: 48 rows are 384 KiB
constexpr int64_t kRowBlocks = 4;       // blocks that share one read of a packed panel
constexpr int64_t kSum = 64;            // products per running sum: longer ones lose digits
constexpr int64_t kForkWork = 1 << 17;  // multiply-adds below which waking the other threads costs more than it saves

// Rows of activations as [chunk of kKc columns][row][kKc]: a stride known to the compiler saves an address per row.
struct Rows {
  float* data;
  int64_t rows;
  float* at(int64_t row, int64_t column) const { return data + (column / kKc * rows + row) * kKc + column % kKc; }
};

enum class From { memory, memory_keep, panel };

// out[i * ldo + j] (+)= sum_k a[i * kKc + k] b[k * ldb + j] for R rows and C vectors of columns. `memory_keep` also
// leaves the columns, as fp32, in `kept`: the packed panel that the next block of rows reads.
template <int R, int C, From from, class T>
void multiply(const float* a, const T* b, int64_t ldb, int64_t depth, float* out, int64_t ldo, bool accumulate, float* kept) {
  for (int64_t start = 0; start < depth; start += kSum, accumulate = true) {
    vf sum[R][C] = {};
    for (int64_t k = start; k < std::min(depth, start + kSum); ++k, b += ldb) {
      vf row[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        row[c] = load(b + c * kLanes);
        if (from != From::panel) __builtin_prefetch(b + 4 * ldb + c * kLanes);
        if (from == From::memory_keep) store(kept + k * kNr + c * kLanes, row[c]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[i][c] += a[i * kKc + k] * row[c];
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* to = out + i * ldo + c * kLanes;
        store(to, accumulate ? load(to) + sum[i][c] : sum[i][c]);
      }
  }
}

// Vectors per row that fill the accumulators of a micro-kernel with this many rows.
constexpr int wide(int64_t rows) { return rows * 8 <= 2 * kMr ? 8 : rows * 4 <= 2 * kMr ? 4 : 2; }

template <From from, class T, size_t... i>
auto kernel_for(int64_t rows, std::index_sequence<i...>) {
  using Kernel = void (*)(const float*, const T*, int64_t, int64_t, float*, int64_t, bool, float*);
  static constexpr Kernel table[] = {multiply<i + 1, from == From::memory ? wide(i + 1) : 2, from, T>...};
  return table[rows - 1];
}
template <From from, class T>
auto kernel_for(int64_t rows) { return kernel_for<from, T>(rows, std::make_index_sequence<kMr>()); }

// One adapter's U [width, rank] or V [rank, columns] as panels of kNr columns by at most kKc steps.
struct Packed {
  float* data;
  int64_t rows, cols;
  static int64_t size(int64_t rows, int64_t cols) { return rows * round_up(cols, kNr); }
  float* panel(int64_t k, int64_t j) const { return data + k * round_up(cols, kNr) + j * std::min(kKc, rows - k); }

  void pack_columns(const Matrix& m, int64_t offset, int64_t j) const {
    with_type(m, [&](auto* from) {
      for (int64_t k = 0; k < rows; k += kKc) {
        Operand<std::remove_pointer_t<decltype(from)>> block{from + offset + k * m.stride + j, 1, m.stride};
        pack<kNr>(block, std::min<int64_t>(kNr, cols - j), std::min(kKc, rows - k), panel(k, j));
      }
    });
  }
};

struct Group { int64_t adapter, first, rows; };  // `rows` entries of the row order from `first` on

class Update {
 public:
  explicit Update(const DeltaLogits& args) : g(args), width(args.hidden.cols), rank(args.U.cols), columns(args.V.cols) {
    group_rows();
    int64_t n = row_order.size();
    threads = n * rank * (width + columns) < kForkWork ? 1 : omp_get_max_threads();
    many = n >= std::max<int64_t>(128, 2 * kMr * threads);
    check_columns();
    bias.resize(groups.size() * columns);
    with_type(g.bias, [&](auto* from) {
      for (size_t i = 0; from && i < groups.size(); ++i)
        for (int64_t j = 0; j < columns; ++j)
          bias[i * columns + j] = to_float(from[groups[i].adapter * g.bias.stride + j]);
    });
  }

  void run() {
    if (row_order.empty() || columns == 0) return;
    many ? many_rows() : few_rows();
  }

 private:
  const DeltaLogits& g;
  const int64_t width, rank, columns;
  int threads = 1;
  bool many = false;
  bool repeated = false;           // some column occurs twice in cols
  std::vector<int64_t> row_order;  // rows with an adapter, grouped by adapter
  std::vector<Group> groups;
  std::vector<int32_t> col_order;  // ascending columns within each chunk; empty: as given
  std::vector<float> bias;         // [groups, columns]

  void group_rows() {
    int64_t n = g.logits.rows;
    row_order.resize(n);
    if (!g.adapter_id) {
      std::iota(row_order.begin(), row_order.end(), 0);
      if (n) groups.push_back({0, 0, n});
      return;
    }
    std::vector<int64_t> start(g.adapters + 1);
    for (int64_t i = 0; i < n; ++i) {
      int64_t id = g.adapter_id[i];
      if (id < -1 || id >= g.adapters) fail("adapter_id", id, -1, g.adapters - 1);
      if (id >= 0) ++start[id + 1];
    }
    for (int64_t a = 0; a < g.adapters; ++a) {
      if (start[a + 1]) groups.push_back({a, start[a], start[a + 1]});
      start[a + 1] += start[a];
    }
    row_order.resize(start[g.adapters]);
    for (int64_t i = 0; i < n; ++i)
      if (g.adapter_id[i] >= 0) row_order[start[g.adapter_id[i]]++] = i;
  }

  // Checks every id before anything is written. Ascending order keeps the writes of many rows streaming.
  void check_columns() {
    if (!g.cols || columns == 0) return;
    bool ascending = true;
    for (int64_t j = 1; j < columns; ++j) ascending &= g.cols[j] > g.cols[j - 1];
    int64_t low = g.cols[0], high = g.cols[columns - 1];
    if (!ascending) {
      auto found = std::minmax_element(g.cols, g.cols + columns);
      low = *found.first, high = *found.second;
    }
    if (low < 0 || high >= g.logits.cols) fail("cols", low < 0 ? low : high, 0, g.logits.cols - 1);
    if (ascending) return;
    std::vector<bool> seen(g.logits.cols);
    for (int64_t j = 0; j < columns && !repeated; ++j) {
      repeated = seen[g.cols[j]];
      seen[g.cols[j]] = true;
    }
    if (!repeated && !many) return;
    col_order.resize(columns);
    std::iota(col_order.begin(), col_order.end(), 0);
    for (int64_t j = 0; j < columns; j += chunk())
      std::stable_sort(col_order.begin() + j, col_order.begin() + std::min(j + chunk(), columns),
                       [&](int32_t x, int32_t y) { return g.cols[x] < g.cols[y]; });
  }

  int64_t chunk() const { return repeated ? columns : kColumnChunk; }

  [[noreturn]] static void fail(const char* name, int64_t id, int64_t low, int64_t high) {
    throw std::out_of_range(std::string(name) + " holds " + std::to_string(id) + ": expected ids from " +
                            std::to_string(low) + " to " + std::to_string(high));
  }

  // hidden - mean of one row in fp32.
  void centre(int64_t adapter, int64_t row, Rows out, int64_t at) const {
    with_type(g.hidden, [&](auto* hidden) {
      with_type(g.mean, [&](auto* mean) {
        hidden += row * g.hidden.stride;
        if (mean) mean += adapter * g.mean.stride;
        for (int64_t from = 0; from < width; from += kKc) {
          int64_t k = from, end = std::min(width, from + kKc);
          float* to = out.at(at, from) - from;
          for (; k + kLanes <= end; k += kLanes) store(to + k, mean ? load(hidden + k) - load(mean + k) : load(hidden + k));
          for (; k < end; ++k) to[k] = to_float(hidden[k]) - (mean ? to_float(mean[k]) : 0);
        }
      });
    });
  }

  // Adds change [rows, ldc] + bias to columns [from, from + count) of the logits of `rows` rows from `first` in the order.
  void add(int64_t first, int64_t rows, int64_t group, int64_t from, int64_t count, const float* change, int64_t ldc) const {
    with_type(g.logits, [&](auto* logits) {
      const float* shift = bias.data() + group * columns + from;
      for (int64_t i = 0; i < rows; ++i, change += ldc) {
        auto* row = logits + row_order[first + i] * g.logits.stride;
        if (!g.cols) add_all(row + from, count, change, shift);
        else if (col_order.empty()) add_at(row, g.cols + from, count, change, shift);
        else add_ordered(row, col_order.data() + from, from, count, change, shift);
      }
    });
  }

  template <class T>
  static void add_all(T* row, int64_t count, const float* change, const float* shift) {
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store_rounded(row + j, load(row + j) + (load(change + j) + load(shift + j)));
    for (; j < count; ++j) from_float(to_float(row[j]) + (change[j] + shift[j]), row[j]);
  }

  template <class T>
  static void add_at(T* row, const int64_t* cols, int64_t count, const float* change, const float* shift) {
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t j = 0; j < count; ++j) row[cols[j]] += change[j] + shift[j];
      return;
    }
    constexpr int64_t kBatch = 8 * kLanes;  // gather, add and scatter apart, so that the rounding runs on vectors
    float old[kBatch];
    T fresh[kBatch];
    for (; count > 0; cols += kBatch, change += kBatch, shift += kBatch, count -= kBatch) {
      int64_t here = std::min(kBatch, count), j = 0;
      for (j = 0; j < here; ++j) old[j] = to_float(row[cols[j]]);
      for (j = 0; j + kLanes <= here; j += kLanes) store_rounded(fresh + j, load(old + j) + (load(change + j) + load(shift + j)));
      for (; j < here; ++j) from_float(old[j] + (change[j] + shift[j]), fresh[j]);
      for (j = 0; j < here; ++j) row[cols[j]] = fresh[j];
    }
  }

  // Sums the changes of equal columns, which `order` makes neighbours, before the one rounding.
  template <class T>
  void add_ordered(T* row, const int32_t* order, int64_t from, int64_t count, const float* change, const float* shift) const {
    for (int64_t j = 0; j < count;) {
      int64_t column = g.cols[order[j]];
      float total = 0;
      for (; j < count && g.cols[order[j]] == column; ++j) total += change[order[j] - from] + shift[order[j] - from];
      from_float(to_float(row[column]) + total, row[column]);
    }
  }

  int64_t tile_width(const Group& group) const { return (group.rows <= kMr ? wide(group.rows) : 2) * kLanes; }

  // out [rows of the group, ldo] (+)= a b for one tile of columns from j of b [depth, limit]: one block reads b from memory
  // and, if there are more blocks, leaves a panel for them.
  void tile(const Group& group, Rows a, int64_t k, const Matrix& m, int64_t offset, int64_t j, float* out, int64_t ldo,
            bool accumulate) const {
    int64_t depth = std::min(kKc, m.rows - k), blocks = ceil_div(group.rows, kMr), count = m.cols - j;
    alignas(64) float panel[kKc * kNr];
    with_type(m, [&](auto* b) {
      using T = std::remove_pointer_t<decltype(b)>;
      b += offset + k * m.stride + j;
      if (blocks == 1 && count >= tile_width(group)) {
        kernel_for<From::memory, T>(group.rows)(a.at(group.first, k), b, m.stride, depth, out, ldo, accumulate, nullptr);
        return;
      }
      for (int64_t end = std::min(count, tile_width(group)), part = 0; part < end; part += kNr)
        for (int64_t block = 0; block < blocks; ++block) {
          int64_t first = group.rows * block / blocks, rows = group.rows * (block + 1) / blocks - first;
          const float* from = a.at(group.first + first, k);
          float* to = out + first * ldo + part;
          if (block == 0 && count - part >= kNr) {
            kernel_for<From::memory_keep, T>(rows)(from, b + part, m.stride, depth, to, ldo, accumulate, panel);
            continue;
          }
          if (block == 0) pack<kNr>(Operand<T>{b + part, 1, m.stride}, count - part, depth, panel);
          kernel_for<From::panel, float>(rows)(from, panel, kNr, depth, to, ldo, accumulate, nullptr);
        }
    });
  }

  void few_rows() {
    int64_t n = row_order.size(), depths = ceil_div(width, kKc), ranks = ceil_div(rank, kKc);
    int64_t ldp = round_up(rank, 8 * kLanes), ldc = round_up(columns, 8 * kLanes);
    struct Task { int64_t group, k, j; };
    std::vector<Task> down, up;
    for (int64_t group = 0; group < int64_t(groups.size()); ++group) {
      for (int64_t k = 0; k < width; k += kKc)
        for (int64_t j = 0; j < rank; j += tile_width(groups[group])) down.push_back({group, k, j});
      for (int64_t j = 0; j < columns; j += tile_width(groups[group])) up.push_back({group, 0, j});
    }
    Buffer centred(n * depths * kKc), partial(n * depths * ldp), change(repeated ? n * ldc : 0);
    Rows hidden{centred.get(), n};
    const Matrix u{g.U.data, width, rank, g.U.stride, g.U.dtype}, v{g.V.data, rank, columns, g.V.stride, g.V.dtype};
#pragma omp parallel num_threads(threads)
    {
      Buffer own(n * ranks * kKc), local(repeated ? 0 : n * 8 * kLanes);
      Rows low{own.get(), n};
#pragma omp for
      for (int64_t i = 0; i < n; ++i) centre(group_of(i).adapter, row_order[i], hidden, i);
#pragma omp for
      for (size_t t = 0; t < down.size(); ++t) {
        auto [group, k, j] = down[t];
        float* out = partial.get() + (k / kKc * n + groups[group].first) * ldp + j;
        tile(groups[group], hidden, k, u, groups[group].adapter * g.stride_U, j, out, ldp, false);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < rank; j += kLanes) {
          vf total = {};
          for (int64_t d = 0; d < depths; ++d) total += load(partial.get() + (d * n + i) * ldp + j);
          store(low.at(i, j), total);
        }
#pragma omp for
      for (size_t t = 0; t < up.size(); ++t) {
        const Group& group = groups[up[t].group];
        int64_t j = up[t].j, wide = tile_width(group), ldo = repeated ? ldc : wide;
        float* out = repeated ? change.get() + group.first * ldc + j : local.get();
        if (rank == 0)
          for (int64_t i = 0; i < group.rows; ++i) std::fill_n(out + i * ldo, wide, 0.0f);
        for (int64_t k = 0; k < rank; k += kKc) tile(group, low, k, v, group.adapter * g.stride_V, j, out, ldo, k > 0);
        if (!repeated)
          add(group.first, group.rows, up[t].group, j, std::min(wide, columns - j), out, ldo);
      }
      if (repeated) {
#pragma omp for
        for (int64_t i = 0; i < n; ++i) add(i, 1, &group_of(i) - groups.data(), 0, columns, change.get() + i * ldc, ldc);
      }
    }
  }

  const Group& group_of(int64_t i) const {
    return *std::prev(std::upper_bound(groups.begin(), groups.end(), i, [](int64_t x, const Group& y) { return x < y.first; }));
  }

  void many_rows() {
    std::vector<Group> blocks;  // as above, but `adapter` is the place in groups
    for (size_t group = 0; group < groups.size(); ++group) {
      auto [adapter, first, rows] = groups[group];
      int64_t count = ceil_div(rows, kRowBlocks * kMr);
      for (int64_t i = 0; i < count; ++i)
        blocks.push_back({int64_t(group), first + rows * i / count, rows * (i + 1) / count - rows * i / count});
    }
    int64_t panels_u = ceil_div(rank, kNr), each = panels_u + ceil_div(columns, kNr);
    int64_t size_u = Packed::size(width, rank), size = size_u + Packed::size(rank, columns);
    Buffer storage(groups.size() * size);
    auto packed_u = [&](int64_t group) { return Packed{storage.get() + group * size, width, rank}; };
    auto packed_v = [&](int64_t group) { return Packed{storage.get() + group * size + size_u, rank, columns}; };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (int64_t t = 0; t < int64_t(groups.size()) * each; ++t) {
        int64_t group = t / each, p = t % each, adapter = groups[group].adapter;
        if (p < panels_u) packed_u(group).pack_columns(g.U, adapter * g.stride_U, p * kNr);
        else packed_v(group).pack_columns(g.V, adapter * g.stride_V, (p - panels_u) * kNr);
      }
      int64_t most = kRowBlocks * kMr, ldc = round_up(std::min(chunk(), columns), kNr);
      Buffer centred(most * round_up(width, kKc)), own(most * round_up(rank, kKc)), change(most * ldc);
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < blocks.size(); ++t) {
        auto [group, first, rows] = blocks[t];
        Packed u = packed_u(group), v = packed_v(group);
        Rows hidden{centred.get(), rows}, low{own.get(), rows};
        for (int64_t i = 0; i < rows; ++i) centre(groups[group].adapter, row_order[first + i], hidden, i);
        if (width == 0) std::fill_n(own.get(), most * round_up(rank, kKc), 0.0f);
        for (int64_t k = 0; k < width; k += kKc)
          for (int64_t j = 0; j < rank; j += kNr) block_product(hidden, k, u, j, low.at(0, j), kKc, k > 0);
        for (int64_t from = 0; from < columns; from += chunk()) {
          int64_t count = std::min(chunk(), columns - from);
          if (rank == 0) std::fill_n(change.get(), most * ldc, 0.0f);
          for (int64_t j = 0; j < count; j += kNr)
            for (int64_t k = 0; k < rank; k += kKc) block_product(low, k, v, from + j, change.get() + j, ldc, k > 0);
          add(first, rows, group, from, count, change.get(), ldc);
        }
      }
    }
  }

  static void block_product(Rows a, int64_t k, Packed b, int64_t j, float* out, int64_t ldo, bool accumulate) {
    for (int64_t i = 0; i < a.rows; i += kMr)
      kernel_for<From::panel, float>(std::min<int64_t>(kMr, a.rows - i))(
          a.at(i, k), b.panel(k, j), kNr, std::min(kKc, b.rows - k), out + i * ldo, ldo, accumulate, nullptr);
  }
};

}  // namespace

void delta_logits_(const DeltaLogits& args) { Update(args).run(); }

}  // namespace CHASSIS_ISA
}  // namespace chassis
