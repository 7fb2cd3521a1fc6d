// logits[i, cols_a] += ((hidden_i - mean_a) U_a) V_a + bias_a, a = adapter_id[i], in place.
//
// Rows are grouped by adapter.
//   few rows   the threads share each group: depth blocks of U by strips of its columns, then strips of V, both read once as
//              they lie in memory (stream.h). Partial sums are added in a fixed order, whatever the number of threads.
//   many rows  U and V are packed once, then each thread takes whole blocks of rows from hidden states to logits.
// A change is summed in fp32 and added to its logit with one rounding, also where columns repeat. Few rows are multiplied as
// pairs of bf16 where all is bf16: hidden U - mean U with the mean as three bf16 that add up to it, and the product of
// rank r as two, 16 of its 24 bits.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/columns.h"
#include "cpu/stream.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kFewRows = 128;       // of an adapter; below it packing U and V costs more than it saves,
constexpr int64_t kFewPairs = 64;       // or, with pairs of bf16, whose V is multiplied twice
constexpr int64_t kRowBlocks = 4;       // blocks that share one read of a packed panel
constexpr int64_t kSum = 64;            // products per running sum: longer ones lose digits
constexpr int64_t kForkWork = 1 << 17;  // multiply-adds below which waking the other threads costs more than it saves
constexpr int64_t kMeanLines = 3;       // bf16 that add up to an fp32

// Rows of activations as [chunk of kKc columns][row][kKc]: a stride known to the compiler saves an address per row.
struct Rows {
  float* data;
  int64_t rows;
  float* at(int64_t row, int64_t column) const { return data + (column / kKc * rows + row) * kKc + column % kKc; }
};

// out[i * ldo + j] (+)= sum_k a[i * kKc + k] b[k * kNr + j] for R rows and a panel of kNr columns.
template <int R>
void multiply(const float* a, const float* b, int64_t depth, float* out, int64_t ldo, bool accumulate) {
  for (int64_t start = 0; start < depth; start += kSum, accumulate = true) {
    vf sum[R][2] = {};
    for (int64_t k = start; k < std::min(depth, start + kSum); ++k, b += kNr) {
      vf left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        sum[i][0] += a[i * kKc + k] * left;
        sum[i][1] += a[i * kKc + k] * right;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        float* to = out + i * ldo + c * kLanes;
        store(to, accumulate ? load(to) + sum[i][c] : sum[i][c]);
      }
  }
}

template <size_t... i>
auto kernel_for(int64_t rows, std::index_sequence<i...>) {
  using Kernel = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);
  static constexpr Kernel table[] = {multiply<i + 1>...};
  return table[rows - 1];
}

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

// Cache lines to fetch a few at a time while something else is computed: all ids of a part in all of its rows.
class Ahead {
 public:
  void add(const int64_t* rows, int64_t count, const Columns& columns, int64_t from, int64_t across, int64_t line) {
    int64_t first = ids.size();
    columns.cache_lines(from, across, line, ids);
    parts.push_back({rows, count, first, int64_t(ids.size())});
    left += count * (int64_t(ids.size()) - first);
  }
  // The next lines, all that are left in `calls` calls.
  void fetch(const Matrix& logits, int64_t calls) {
    int64_t now = ceil_div(left, std::max<int64_t>(calls, 1));
    left -= now;
    with_type(logits, [&](auto* data) {
      while (now > 0) {
        const Part& part = parts[at];
        auto* to = data + part.rows[row] * logits.stride;
        int64_t end = std::min(part.last, part.first + place + now);
        now -= end - part.first - place;
        for (int64_t j = part.first + place; j < end; ++j) __builtin_prefetch(to + ids[j], 1);
        place = end - part.first;
        if (end < part.last) continue;
        place = 0;
        if (++row == part.count) row = 0, ++at;
      }
    });
  }

 private:
  struct Part { const int64_t* rows; int64_t count, first, last; };
  std::vector<Part> parts;
  std::vector<int64_t> ids;
  int64_t at = 0, row = 0, place = 0, left = 0;
};

class Update {
 public:
  explicit Update(const DeltaLogits& args) : g(args), width(args.hidden.cols), rank(args.U.cols), columns(args.V.cols) {
    group_rows();
    int64_t n = row_order.size();
    threads = n * rank * (width + columns) < kForkWork ? 1 : omp_get_max_threads();
    block_rows = std::min(kRowBlocks * kMr, round_up(ceil_div(n, threads), kMr));
    pairs = has_bf16_products();
    for (const Matrix* m : {&g.logits, &g.hidden, &g.U, &g.V}) pairs &= m->dtype == DType::bf16;
    many = n >= std::max<int64_t>((pairs ? kFewPairs : kFewRows) * groups.size(), 2 * kMr * threads);
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
  bool many = false, pairs = false;  // pairs: few rows are multiplied as pairs of bf16
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

  // hidden - mean of one row in fp32, `count` values from `from` on.
  void centre(int64_t adapter, int64_t row, int64_t from, int64_t count, float* to) const {
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

  void add(int64_t row, int64_t group, int64_t from, int64_t count, const float* change) const {
    add_change(g.logits, row, columns_at(group), from, count, change, bias.data() + group * columns + from);
  }

  // Lines of a group before U (hidden, and then the parts of the mean) and before V (the products of rank r).
  int64_t mean_lines() const { return pairs && g.mean.data ? kMeanLines : 0; }

  // Columns of a strip: few enough for its sums to stay in L1, and for each thread to have one.
  int64_t strip(int64_t lines, int64_t count) const {
    int64_t most = std::clamp<int64_t>(kStripSums / std::min(lines, kStripLines), 64, kStripWidth);
    return round_up(std::min(most, ceil_div(count, threads)), 64);
  }

  // Lines [.., kKc or kKc / 2] of hidden states for steps [k, k + depth), filled up to whole steps.
  void fill(const Group& group, int64_t k, int64_t depth, float* out, int64_t ld) const {
    for (int64_t i = 0; i < group.rows + mean_lines(); ++i) std::fill_n(out + i * ld, ld, 0.0f);
    for (int64_t i = 0; i < group.rows; ++i) {
      int64_t row = row_order[group.first + i];
      if (pairs) std::memcpy(out + i * ld, static_cast<const bf16*>(g.hidden.data) + row * g.hidden.stride + k, 2 * depth);
      else centre(group.adapter, row, k, depth, out + i * ld);
    }
    if (mean_lines())
      with_type(g.mean, [&](auto* mean) {
        bf16* to = reinterpret_cast<bf16*>(out + group.rows * ld);
        for (int64_t j = 0; j < depth; ++j) {
          float rest = to_float(mean[group.adapter * g.mean.stride + k + j]);
          for (bf16* part = to + j; part < to + kMeanLines * 2 * ld; part += 2 * ld) {
            from_float(rest, *part);
            rest -= to_float(*part);
          }
        }
      });
  }

  void few_rows() {
    int64_t n = row_order.size(), fold = pairs ? 2 : 1, extra = mean_lines(), ld = pairs ? kKc / 2 : kKc;
    int64_t ldp = round_up(rank, kLanes), ldr = round_up(rank, kLanes) / fold, lines = n + groups.size() * extra;
    int64_t most = 0, most_sums = 0, ldc = round_up(columns, kLanes);
    bool whole = false;
    const int64_t line = g.logits.dtype == DType::fp32 ? 16 : 32;  // logits of a cache line
    struct Task { int64_t group, k, j, count; };
    std::vector<Task> down, up;
    for (int64_t i = 0; i < int64_t(groups.size()); ++i) {
      int64_t across = strip(groups[i].rows + extra, rank), count = columns_at(i).count;
      most = std::max(most, groups[i].rows + extra);
      whole |= columns_at(i).whole;
      for (int64_t k = 0; k < width; k += kKc)
        for (int64_t j = 0; j < rank; j += across) down.push_back({i, k, j, std::min(across, rank - j)});
      across = strip(fold * groups[i].rows, count);
      most_sums = std::max(most_sums, fold * groups[i].rows * across);
      for (int64_t j = 0; j < count; j += across) up.push_back({i, 0, j, std::min(across, count - j)});
    }
    Buffer partial(ceil_div(width, kKc) * lines * ldp), change(whole ? n * ldc : 0);
#pragma omp parallel num_threads(threads)
    {
      Buffer hidden(most * ld), low(fold * n * ldr), sums(most_sums);
      Ahead ahead;
      int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), calls = 0;
      auto share = [&](const std::vector<Task>& tasks, auto run) {
        for (size_t t = tasks.size() * thread / team; t < tasks.size() * (thread + 1) / team; ++t) run(tasks[t], groups[tasks[t].group]);
      };
      share(up, [&](const Task& task, const Group& group) {
        if (!columns_at(task.group).whole)
          ahead.add(row_order.data() + group.first, group.rows, columns_at(task.group), task.j, task.count, line);
        calls += ceil_div(rank, fold * kSteps);
      });
      share(down, [&](const Task& task, const Group&) { calls += ceil_div(std::min(kKc, width - task.k), fold * kSteps); });
      auto meanwhile = [&](int64_t) { ahead.fetch(g.logits, calls--); };
      share(down, [&](const Task& task, const Group& group) {
        auto [i, k, j, count] = task;
        int64_t depth = std::min(kKc, width - k), first = group.first + i * extra;
        float* out = partial.get() + (k / kKc * lines + first) * ldp + j;
        for (int64_t line = 0; line < group.rows + extra; ++line) std::fill_n(out + line * ldp, round_up(count, kLanes), 0.0f);
        fill(group, k, depth, hidden.get(), ld);
        with_type(g.U, [&](auto* U) {
          U += group.adapter * g.stride_U + k * g.U.stride + j;
          stream(pairs, hidden.get(), ld, group.rows + extra, U, g.U.stride, depth, count, out, ldp, meanwhile);
        });
      });
#pragma omp barrier
      for (size_t i = 0; i < groups.size(); ++i) total(i, partial.get(), lines, ldp, low.get(), ldr);
      share(up, [&](const Task& task, const Group& group) {
        auto [i, k, j, count] = task;
        int64_t ldy = round_up(count, kLanes);
        std::fill_n(sums.get(), fold * group.rows * ldy, 0.0f);
        with_type(g.V, [&](auto* V) {
          V += group.adapter * g.stride_V + j;
          stream(pairs, low.get() + fold * group.first * ldr, ldr, fold * group.rows, V, g.V.stride, rank, count, sums.get(), ldy,
                 meanwhile);
        });
        for (int64_t row = 0; row < group.rows; ++row) {
          float* y = sums.get() + fold * row * ldy;
          for (int64_t c = 0; pairs && c < ldy; c += kLanes) store(y + c, load(y + c) + load(y + ldy + c));
          if (columns_at(i).whole) std::copy_n(y, count, change.get() + (group.first + row) * ldc + j);
          else add(row_order[group.first + row], i, j, count, y);
        }
      });
      if (whole) {
#pragma omp barrier
#pragma omp for
        for (size_t i = 0; i < groups.size(); ++i)
          for (int64_t row = groups[i].first; columns_at(i).whole && row < groups[i].first + groups[i].rows; ++row)
            add(row_order[row], i, 0, columns, change.get() + row * ldc);
      }
    }
  }

  // The products of rank r of a group's rows, [rows, ldr] fp32 or [rows, 2, ldr] pairs: what the depth blocks add up to, less
  // the mean's share.
  void total(int64_t i, const float* partial, int64_t lines, int64_t ldp, float* low, int64_t ldr) const {
    const Group& group = groups[i];
    int64_t extra = mean_lines(), fold = pairs ? 2 : 1, depths = ceil_div(width, kKc);
    partial += (group.first + i * extra) * ldp;
    low += fold * group.first * ldr;
    auto line = [&](int64_t row, int64_t j) {
      vf sum = {};
      for (int64_t d = 0; d < depths; ++d) sum += load(partial + (d * lines + row) * ldp + j);
      return sum;
    };
    for (int64_t j = 0; j < rank; j += kLanes) {
      vf mean = {};
      for (int64_t part = 0; part < extra; ++part) mean += line(group.rows + part, j);
      for (int64_t row = 0; row < group.rows; ++row) {
        vf sum = line(row, j) - mean;
        for (int64_t c = rank - j; c < kLanes; ++c) sum[c] = 0;
        if (!pairs) {
          store(low + row * ldr + j, sum);
          continue;
        }
        bf16* to = reinterpret_cast<bf16*>(low + 2 * row * ldr) + j;
        store_rounded(to, sum);
        vf rest = sum - load(to);
        store_rounded(to + 2 * ldr, rest - rest == 0 ? rest : vf{});  // nothing is left of an infinity
      }
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
      Buffer centred(most * round_up(width, kKc)), own(most * round_up(rank, kKc)), change(most * ldc);
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < blocks.size(); ++t) {
        auto [group, first, rows] = blocks[t];
        Packed u = packed_u(group), v = packed_v(group);
        Rows hidden{centred.get(), rows}, low{own.get(), rows};
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t k = 0; k < width; k += kKc)
            centre(groups[group].adapter, row_order[first + i], k, std::min(kKc, width - k), hidden.at(i, k));
        if (width == 0) std::fill_n(own.get(), most * round_up(rank, kKc), 0.0f);
        for (int64_t k = 0; k < width; k += kKc)
          for (int64_t j = 0; j < rank; j += kNr) block_product(hidden, k, u, j, low.at(0, j), kKc, k > 0);
        const Columns& c = columns_at(group);
        for (int64_t from = 0; from < c.count; from += c.chunk()) {
          int64_t count = std::min(c.chunk(), c.count - from);
          if (rank == 0) std::fill_n(change.get(), most * ldc, 0.0f);
          for (int64_t j = 0; j < count; j += kNr)
            for (int64_t k = 0; k < rank; k += kKc) block_product(low, k, v, from + j, change.get() + j, ldc, k > 0);
          for (int64_t i = 0; i < rows; ++i) add(row_order[first + i], group, from, count, change.get() + i * ldc);
        }
      }
    }
  }

  static void block_product(Rows a, int64_t k, Packed b, int64_t j, float* out, int64_t ldo, bool accumulate) {
    for (int64_t i = 0; i < a.rows; i += kMr)
      kernel_for(std::min<int64_t>(kMr, a.rows - i), std::make_index_sequence<kMr>())(
          a.at(i, k), b.panel(k, j), std::min(kKc, b.rows - k), out + i * ldo, ldo, accumulate);
  }
};

}  // namespace

void delta_logits_(const DeltaLogits& args) { Update(args).run(); }

}  // namespace CHASSIS_ISA
}  // namespace chassis
