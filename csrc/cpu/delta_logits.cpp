// logits[i, cols_a] += ((hidden_i - mean_a) U_a) V_a + bias_a, a = adapter_id[i], in place.
//
// Rows are grouped by adapter.
//   few rows   the threads share each group: U by parts of its width, then V by strips of its columns, both read once as
//              they lie in memory (stream.h). The parts are added in a fixed order, whatever the number of threads.
//   many rows  U and V are packed once, then each thread takes whole blocks of rows from hidden states to logits.
// Few rows of bf16 without a mean times a U of bf16 are exact products in pairs, summed in fp32 (gemm_bf16.h).
// A change is summed in fp32 and added to its logit with one rounding, also where columns repeat.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/columns.h"
#include "cpu/stream.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kFewRows = 128;       // of an adapter; below it packing U and V costs more than it saves
constexpr int64_t kPairRows = 4;        // of an adapter; fewer wait for memory, not for products
constexpr int64_t kRowBlocks = 4;       // blocks that share one read of a packed panel
constexpr int64_t kForkWork = 1 << 17;  // multiply-adds below which waking the other threads costs more than it saves
constexpr int64_t kDepths = 8;          // parts of the width whose products few rows add up
constexpr int64_t kStripWidth = 1024;   // columns of V at a time, for few rows, at most,
constexpr int64_t kStripSums = 16384;   // and sums, which then lie in L2 beside their logits

// One adapter's U [width, rank] or V [rank, columns] as panels of kNr columns by at most kSum steps.
struct Packed {
  float* data;
  int64_t rows, cols;
  static int64_t size(int64_t rows, int64_t cols) { return rows * round_up(cols, kNr); }
  float* panel(int64_t k, int64_t j) const { return data + k * round_up(cols, kNr) + j * std::min(kSum, rows - k); }

  void pack_columns(const Matrix& m, int64_t offset, int64_t j) const {
    with_type(m, [&](auto* from) {
      for (int64_t k = 0; k < rows; k += kSum) {
        auto* block = from + offset + k * m.stride + j;
        stage<false>(block, m.stride, std::min(kSum, rows - k), cols - j, panel(k, j));
      }
    });
  }
};

// Uninitialised memory of a thread. Up to kKept floats it is the same in every call: the system zeroes the pages that a
// process first touches, which would take as long as few rows' products.
template <int which>
struct Scratch {
  static constexpr int64_t kKept = 1 << 20;
  Buffer fresh;
  float* data;
  explicit Scratch(int64_t n) : fresh(n > kKept ? n : 0), data(n > kKept ? fresh.get() : kept()) {}
  static float* kept() {
    static thread_local Buffer memory(kKept);
    return memory.get();
  }
};

struct Group { int64_t adapter, first, rows; };  // `rows` entries of the row order from `first` on

class Update {
 public:
  explicit Update(const DeltaLogits& args) : g(args), width(args.hidden.cols), rank(args.U.cols), columns(args.V.cols) {
    group_rows();
    int64_t n = row_order.size();
    threads = n * rank * (width + columns) < kForkWork ? 1 : omp_get_max_threads();
    block_rows = std::min(kRowBlocks * kMr, round_up(ceil_div(n, threads), kMr));
    many = n >= std::max<int64_t>(kFewRows * groups.size(), 2 * kMr * threads);
    pairs = !many && n >= kPairRows * int64_t(groups.size()) && g.hidden.dtype == DType::bf16 && g.U.dtype == DType::bf16 &&
            !g.mean.data && width % 2 == 0 && has_bf16_products();
    if (columns)
      for (size_t i = 0; i < (g.stride_cols ? groups.size() : 1); ++i)
        changed.push_back({g.cols ? g.cols + (g.stride_cols ? groups[i].adapter * g.stride_cols : 0) : nullptr, columns,
                           g.logits.cols, g.stride_cols != 0, many});
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
  bool pairs = false;      // hidden states and U are multiplied as they are, two bf16 at a time
  int64_t block_rows = 0;  // of many rows, at most
  std::vector<int64_t> row_order;  // rows with an adapter, grouped by adapter
  std::vector<Group> groups;
  std::vector<Columns> changed;    // of each group, or the first's for all
  std::vector<float> bias;         // [groups, columns]

  const Columns& columns_at(int64_t group) const { return changed[g.stride_cols ? group : 0]; }

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
      if (id < -1 || id >= g.adapters) fail_id("adapter_id", id, -1, g.adapters - 1);
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

  // hidden - mean of one row in fp32, or with pairs as it is, `count` values from `from` on.
  void centre(int64_t adapter, int64_t row, int64_t from, int64_t count, float* to) const {
    if (pairs) {
      std::memcpy(to, static_cast<const bf16*>(g.hidden.data) + row * g.hidden.stride + from, count * sizeof(bf16));
      return;
    }
    with_type(g.hidden, [&](auto* hidden) {
      with_type(g.mean, [&](auto* mean) {
        hidden += row * g.hidden.stride + from;
        if (mean) mean += adapter * g.mean.stride + from;
        int64_t k = 0;
        for (; k + kLanes <= count; k += kLanes) store(to + k, mean ? load(hidden + k) - load(mean + k) : load(hidden + k));
        for (; k < count; ++k) to[k] = to_float(hidden[k]) - (mean ? to_float(mean[k]) : 0);
      });
    });
  }

  // Adds the changes [rows, ldc] of columns [from, from + count) to rows of a group, from the one at `first` in row_order on.
  void add(int64_t group, int64_t first, int64_t rows, int64_t from, int64_t count, const float* change, int64_t ldc,
           const Lines& lines) const {
    add_change(g.logits, row_order.data() + first, rows, columns_at(group), from, count, change, ldc,
               bias.data() + group * columns + from, lines);
  }

  // The lines of a row of logits that columns [from, from + count) of a group lie in, where these are changed one by one.
  Lines lines(int64_t group, int64_t from, int64_t count) const {
    const Columns& c = columns_at(group);
    return c.ids && c.order.empty() && !c.whole ? Lines(c.ids + from, count, bytes()) : Lines();
  }
  int64_t bytes() const { return g.logits.dtype == DType::fp32 ? 4 : 2; }
  Ahead::Part fetched(const Group& group, const Lines& lines) const {
    return {static_cast<const char*>(g.logits.data), g.logits.stride * bytes(), row_order.data() + group.first, group.rows,
            lines.offsets.data(), int64_t(lines.offsets.size())};
  }

  // Columns of a strip of V: few enough for its sums to stay in L2, and for each thread to have one; so many that a row's
  // logits are changed along memory.
  int64_t strip(int64_t rows, int64_t count) const {
    int64_t most = std::clamp<int64_t>(kStripSums / rows, 64, kStripWidth);
    return round_up(std::min(most, ceil_div(count, threads)), 64);
  }

  void few_rows() {
    struct Task { int64_t group, k, j, depth, count; };  // columns [j, j + count) of U, of rows [k, k + depth), or of V
    std::vector<Task> down, up;
    const int64_t chunk = pairs ? 2 * kSum : kSum;  // rows of U in kSum steps
    const int64_t n = row_order.size(), part = round_up(ceil_div(std::max<int64_t>(width, 1), kDepths), kSum);
    const int64_t parts = ceil_div(width, part);
    const int64_t across = round_up(ceil_div(rank, ceil_div(threads, kDepths)), kNr);  // columns of U
    const int64_t ldp = round_up(rank, kNr), ldr = round_up(rank, kSum), ldc = round_up(columns, kNr);
    int64_t most = 0, most_sums = 0;
    bool whole = false;
    for (int64_t i = 0; i < int64_t(groups.size()); ++i) {
      int64_t count = columns_at(i).count, wide = strip(groups[i].rows, count);
      most = std::max(most, groups[i].rows);
      most_sums = std::max(most_sums, groups[i].rows * wide);
      whole |= columns_at(i).whole;
      for (int64_t k = 0; k < width; k += part)
        for (int64_t j = 0; j < rank; j += across)
          down.push_back({i, k, j, std::min(part, width - k), std::min(across, rank - j)});
      for (int64_t j = 0; j < count; j += wide) up.push_back({i, 0, j, rank, std::min(wide, count - j)});
    }
    Scratch<0> shared(parts * n * ldp + (whole ? n * ldc : 0));
    float *partial = shared.data, *change = partial + parts * n * ldp;
    auto work = [&] {
      Scratch<1> mine(most * part + n * ldr + most_sums);
      float *hidden = mine.data, *own = hidden + most * part, *sums = own + n * ldr;
      int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      auto share = [&](const std::vector<Task>& tasks, auto run) {
        for (size_t t = tasks.size() * thread / team; t < tasks.size() * (thread + 1) / team; ++t)
          run(tasks[t], groups[tasks[t].group]);
      };
      Ahead ahead;
      std::vector<Lines> listed;  // of this thread's tasks with more than kDirect rows
      share(up, [&](const Task& task, const Group& group) {
        if (group.rows <= kDirect) return;
        listed.push_back(lines(task.group, task.j, task.count));
        if (listed.back().offsets.size()) ahead.parts.push_back(fetched(group, listed.back()));
      });
      auto next_listed = listed.begin();
      auto low = [&](const Group& group) { return Rows{own + group.first * ldr, group.rows}; };
      share(down, [&](const Task& task, const Group& group) {
        auto [i, k, j, depth, count] = task;
        Rows centred{hidden, group.rows};
        for (int64_t row = 0; row < group.rows; ++row)
          for (int64_t c = 0; c < depth; c += chunk) {
            float* to = centred.at(row, c / chunk * kSum);
            centre(group.adapter, row_order[group.first + row], k + c, std::min(chunk, depth - c), to);
          }
        float* out = partial + (k / part * n + group.first) * ldp + j;
        with_type(g.U, [&](auto* U) {
          U += group.adapter * g.stride_U + k * g.U.stride + j;
          auto* then = U + depth * g.U.stride;
          if constexpr (std::is_same_v<decltype(U), bf16*>)
            if (pairs) return stream<true>(centred, U, g.U.stride, depth / 2, count, then, out, ldp, ahead);
          stream<false>(centred, U, g.U.stride, depth, count, then, out, ldp, ahead);
        });
      });
#pragma omp barrier
      for (const Group& group : groups)
        for (int64_t row = 0; row < group.rows; ++row)
          for (int64_t j = 0; j < rank; j += kNr)
            add_parts(partial + (group.first + row) * ldp + j, parts, n * ldp, low(group).at(row, j));
      share(up, [&](const Task& task, const Group& group) {
        auto [i, k, j, depth, count] = task;
        int64_t ldy = round_up(count, kNr);
        if (depth == 0) std::fill_n(sums, group.rows * ldy, 0.0f);
        with_type(g.V, [&](auto* V) {
          V += group.adapter * g.stride_V + j;
          stream<false>(low(group), V, g.V.stride, depth, count, V + count, sums, ldy, ahead);
        });
        Lines touched = group.rows > kDirect ? std::move(*next_listed++) : lines(i, j, count);
        if (!columns_at(i).whole) add(i, group.first, group.rows, j, count, sums, ldy, touched);
        else
          for (int64_t row = 0; row < group.rows; ++row)
            std::copy_n(sums + row * ldy, count, change + (group.first + row) * ldc + j);
      });
      if (whole) {
#pragma omp barrier
#pragma omp for
        for (size_t i = 0; i < groups.size(); ++i)
          for (int64_t row = groups[i].first; columns_at(i).whole && row < groups[i].first + groups[i].rows; ++row)
            add(i, row, 1, 0, columns, change + row * ldc, ldc, Lines());
      }
    };
    if (threads == 1) return work();  // without the cost of a team
#pragma omp parallel num_threads(threads)
    work();
  }

  // kNr sums of `parts` values, `step` apart.
  static void add_parts(const float* from, int64_t parts, int64_t step, float* to) {
    for (int c = 0; c < kNr; c += kLanes) {
      vf sum = {};
      for (int64_t part = 0; part < parts; ++part) sum += load(from + part * step + c);
      store(to + c, sum);
    }
  }

  void many_rows() {
    std::vector<Group> blocks;  // as above, but `adapter` is the place in groups
    for (size_t group = 0; group < groups.size(); ++group) {
      auto [adapter, first, rows] = groups[group];
      int64_t count = ceil_div(rows, block_rows);
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
      int64_t most = block_rows, ldc = 0;
      for (const Columns& c : changed) ldc = std::max(ldc, round_up(std::min(c.chunk(), columns), kNr));
      Buffer centred(most * round_up(width, kSum)), own(most * round_up(rank, kSum)), change(most * ldc);
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < blocks.size(); ++t) {
        auto [group, first, rows] = blocks[t];
        Packed u = packed_u(group), v = packed_v(group);
        Rows hidden{centred.get(), rows}, low{own.get(), rows};
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t k = 0; k < width; k += kSum)
            centre(groups[group].adapter, row_order[first + i], k, std::min(kSum, width - k), hidden.at(i, k));
        if (width == 0) std::fill_n(own.get(), most * round_up(rank, kSum), 0.0f);
        for (int64_t k = 0; k < width; k += kSum)
          for (int64_t j = 0; j < rank; j += kNr)
            multiply_rows(hidden, k, u.panel(k, j), std::min(kSum, width - k), low.at(0, j), kSum, k > 0);
        const Columns& c = columns_at(group);
        for (int64_t from = 0; from < c.count; from += c.chunk()) {
          int64_t count = std::min(c.chunk(), c.count - from);
          if (rank == 0) std::fill_n(change.get(), most * ldc, 0.0f);
          for (int64_t j = 0; j < count; j += kNr)
            for (int64_t k = 0; k < rank; k += kSum)
              multiply_rows(low, k, v.panel(k, from + j), std::min(kSum, rank - k), change.get() + j, ldc, k > 0);
          add(group, first, rows, from, count, change.get(), ldc, lines(group, from, count));
        }
      }
    }
  }
};

}  // namespace

void delta_logits_(const DeltaLogits& args) { Update(args).run(); }

}  // namespace CHASSIS_ISA
}  // namespace chassis
