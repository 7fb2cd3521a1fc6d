// KL(softmax(b) || softmax(a)) per row for logits that are products, tile by tile: no [N, V] logits ever exist.
//
//   a = cap(scale_a (h_a W_a^T + u v + shift_a)),  b = cap(scale_b (h_b W_b^T + shift_b)) or given,  cap(z) = s tanh(z / s)
//
// Each thread takes a range of the vocabulary. It packs a tile of both heads, multiplies it with every block of rows and
// folds the two tiles of logits into a running state per row, relative to the running maxima m_a and m_b:
//   s_a = sum e^(a - m_a),  s_b = sum e^(b - m_b),  w = sum e^(b - m_b) ((b - m_b) - (a - m_a))
//   KL = w / s_b + log s_a - log s_b
// Only differences to the maxima are summed, so an offset of the logits costs no digits; sums across tiles are fp64. The
// threads' states are merged in order. dKL/da = softmax(a) - softmax(b) needs both log-sum-exps: where gradients are wanted
// the logits of a few rows are kept until these are known; the backward pass, which knows them, computes the tiles again.
#include <cmath>

#include "cpu/linear_kl_logits.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kRowChunk = 1024 / kBlock * kBlock;  // rows packed at a time
constexpr int64_t kForkWork = 1 << 17;                 // multiply-adds that repay waking the other threads

// A running maximum with its place, and the sum of exponentials relative to it.
struct LogSumExp {
  float max = -kInf;
  int64_t argmax = 0;
  double sum = 0;

  float reference() const { return max == -kInf ? 0 : max; }
  // Takes over a larger maximum; returns how far the reference moved.
  double raise(float to, int64_t place) {
    if (!(to > max)) return 0;
    double before = reference();
    sum *= max == -kInf ? 0 : std::exp(double(max) - to);
    max = to, argmax = place;
    return reference() - before;
  }
  double value() const { return max + std::log(sum); }
};

struct State {
  LogSumExp a, b;
  double w = 0;
  bool excluded = false;  // b gives mass, however little, to a token whose logit a is -inf

  void raise(float max_a, int64_t place_a, float max_b, int64_t place_b) {
    double had = b.sum;
    double moved_a = a.raise(max_a, place_a), moved_b = b.raise(max_b, place_b);
    if (moved_a == 0 && moved_b == 0) return;
    w = had == 0 ? w * 0 : (w + had * (moved_a - moved_b)) * (b.sum / had);
  }
  void merge(const State& other) {
    State o = other;
    raise(o.a.max, o.a.argmax, o.b.max, o.b.argmax);
    o.raise(a.max, 0, b.max, 0);
    a.sum += o.a.sum, b.sum += o.b.sum, w += o.w, excluded |= o.excluded;
  }
  float kl() const {
    double value = w / b.sum + std::log(a.sum) - std::log(b.sum);
    return excluded && value == value ? kInf : float(value);
  }
};

float max_of(const float* z) {
  vf best = splat(-kInf);
  for (int64_t j = 0; j < kTile; j += kLanes) best = vmax(load(z + j), best);
  return max(best);
}

// Folds one row's tile of both logits into its state.
void fold(const float* za, const float* zb, int64_t column, State& state) {
  float max_a = max_of(za), max_b = max_of(zb);
  auto place = [&](const float* z, float max, float before) {
    return max > before ? column + (std::find(z, z + kTile, max) - z) : 0;
  };
  state.raise(max_a, place(za, max_a, state.a.max), max_b, place(zb, max_b, state.b.max));
  const vf ma = splat(state.a.reference()), mb = splat(state.b.reference());
  vf sa = {}, sb = {}, w = {}, widest = splat(-kInf);
  for (int64_t j = 0; j < kTile; j += kLanes) {
    vf a = load(za + j) - ma, b = load(zb + j) - mb, apart = b - a, eb = exp_nonpositive(b);
    sa += exp_nonpositive(a);
    sb += eb;
    w += eb == 0 ? vf{} : eb * apart;
    widest = vmax(apart, widest);
  }
  state.a.sum += sum(sa);
  state.b.sum += sum(sb);
  bool excluded = max(widest) == kInf;
  double more = sum(w);
  state.excluded |= excluded;
  state.w += excluded && more == kInf ? 0 : more;
}

// Rows packed for both sides, and the walk over tiles of the vocabulary and blocks of rows that both passes share.
struct Problem {
  const LinearKL& args;
  const int64_t n, vocabulary, tiles;
  const Side a, b;
  int threads;

  explicit Problem(const LinearKL& g)
      : args(g), n(g.h_a.rows), vocabulary(g.W_a.rows), tiles(ceil_div(vocabulary, kTile)),
        a(g.h_a, g.W_a, g.u, g.v, g.bias_a, g.c, g.softcap_a, g.scale_a, vocabulary),
        b(g.h_b, g.W_b, {}, {}, g.bias_b, {}, g.softcap_b, g.scale_b, vocabulary) {
    bool small = n * vocabulary * (a.depth + b.depth + 8) < kForkWork;
    threads = small ? 1 : int(std::min<int64_t>(omp_get_max_threads(), tiles));
  }

  void pack_rows(int64_t first, int64_t rows, float* packed_a, float* packed_b) const {
#pragma omp for
    for (int64_t block = 0; block < ceil_div(rows, kBlock); ++block) {
      int64_t here = std::min(kBlock, rows - block * kBlock);
      a.pack_rows(first + block * kBlock, here, packed_a + block * a.rows_size());
      b.pack_rows(first + block * kBlock, here, packed_b + block * b.rows_size());
    }
  }

  // Calls f(tile, column, columns) for every tile of this thread.
  template <class F>
  void each_tile(F f) const {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t t = tiles * thread / team; t < tiles * (thread + 1) / team; ++t)
      f(t, t * kTile, std::min(kTile, vocabulary - t * kTile));
  }

  // Calls tile(column, columns), then block(row, rows, column, columns, za, zb), for every tile of this thread and block of
  // the chunk. The logits stay in `kept` [tiles, 2, rows, kTile] where it is there.
  template <class Tile, class Block>
  void walk(int64_t first, int64_t rows, const float* packed_a, const float* packed_b, float* kept, Tile tile, Block block) const {
    Buffer tile_a(a.tile_size()), tile_b(b.tile_size()), z(kept ? 0 : 2 * kBlock * kTile);
    each_tile([&](int64_t t, int64_t column, int64_t columns) {
      a.pack_tile(column, columns, tile_a.get());
      b.pack_tile(column, columns, tile_b.get());
      tile(column, columns);
      for (int64_t i = 0; i < rows; i += kBlock) {
        int64_t here = std::min(kBlock, rows - i), at = i / kBlock;
        float* za = kept ? kept + (2 * t * rows + i) * kTile : z.get();
        float* zb = za + (kept ? rows : kBlock) * kTile;
        int64_t next = i + kBlock >= rows ? column + kTile : vocabulary;
        a.logits(packed_a + at * a.rows_size(), first + i, here, tile_a.get(), column, columns, za, next);
        b.logits(packed_b + at * b.rows_size(), first + i, here, tile_b.get(), column, columns, zb, next);
        block(i, here, column, columns, za, zb);
      }
    });
  }
};

// The gradients, a chunk of rows after another: d = weight (softmax(a) - softmax(b)) cap'(a) takes the place of a tile of a,
// and d v^T, u^T d and the sum of d over rows are added to what out wants.
class Gradients {
 public:
  Gradients(const Problem& p, int64_t most, const float* weight, const double* lse_a, const double* lse_b,
            const LinearKLGradients& out)
      : p(p), weight(weight), lse_a(lse_a), lse_b(lse_b), out(out), packed_u(ceil_div(most, kBlock) * packed_rank),
        grad_u(p.threads * most * rank) {}

  // Of one thread.
  struct Scratch {
    Buffer v, by_row{kBlock * kTile}, by_column{kBlock * kTile};
    explicit Scratch(const Gradients& g) : v(round_up(g.rank, kNr) * kTile) {}
  };

  // By all threads, before the chunk's first tile and after its last.
  void begin(int64_t first, int64_t rows) const {
    std::fill_n(mine(rows), rows * rank, 0.0f);
#pragma omp for
    for (int64_t i = 0; i < rows; i += kBlock)
      with_type(p.args.u, [&](auto* u) {
        Operand<std::remove_pointer_t<decltype(u)>> transposed{u + (first + i) * p.args.u.stride, 1, p.args.u.stride};
        pack<kMr>(transposed, rank, std::min(kBlock, rows - i), packed_u.get() + i / kBlock * packed_rank);
      });
  }
  void finish(int64_t first, int64_t rows) const {
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < (out.u ? rows * rank : 0); ++i) {
      float total = 0;
      for (int t = 0; t < omp_get_num_threads(); ++t) total += grad_u[t * rows * rank + i];
      out.u[first * rank + i] = total;
    }
  }

  void tile(int64_t column, int64_t columns, Scratch& scratch) const {
    with_type(p.args.v, [&](auto* v) {
      Operand<std::remove_pointer_t<decltype(v)>> transposed{v + column, p.args.v.stride, 1};
      if (out.u) pack<kNr>(transposed, rank, columns, scratch.v.get());
    });
  }

  // The block of `count` rows from `row` of the chunk on.
  void block(int64_t first, int64_t rows, int64_t row, int64_t count, int64_t column, int64_t columns, float* za, const float* zb,
             Scratch& scratch) const {
    for (int64_t i = 0; i < count; ++i) {
      float* dz = za + i * kTile;
      const float* b = zb + i * kTile;
      int64_t at = first + row + i;
      float high_a = float(lse_a[at]), low_a = float(lse_a[at] - high_a);
      float high_b = float(lse_b[at]), low_b = float(lse_b[at] - high_b);
      float factor = weight ? weight[at] * p.a.scale : p.a.scale;
      for (int64_t j = 0; j < columns; j += kLanes) {
        vf a = load(dz + j);
        vf d = exp_nonpositive(a - high_a - low_a) - exp_nonpositive(load(b + j) - high_b - low_b);
        if (p.a.softcap > 0) d *= 1.0f - (a / p.a.softcap) * (a / p.a.softcap);
        store(dz + j, d * factor);
      }
      for (int64_t j = 0; out.c && j < columns; ++j) out.c[column + j] += dz[j];
    }
    if (out.u) {
      pack<kMr>(Operand<float>{za, kTile, 1}, count, columns, scratch.by_row.get());
      multiply_panels(scratch.by_row.get(), count, scratch.v.get(), rank, columns, mine(rows) + row * rank, rank, true);
    }
    if (out.v) {
      pack<kNr>(Operand<float>{za, 1, kTile}, columns, count, scratch.by_column.get());
      multiply_panels(packed_u.get() + row / kBlock * packed_rank, rank, scratch.by_column.get(), columns, count, out.v + column,
                      p.vocabulary, true);
    }
  }

 private:
  const Problem& p;
  const float* weight;
  const double *lse_a, *lse_b;
  const LinearKLGradients& out;
  const int64_t rank = p.args.u.cols, packed_rank = round_up(rank, kMr) * kBlock;
  Buffer packed_u;
  mutable std::vector<float> grad_u;  // [threads, rows, rank]

  float* mine(int64_t rows) const { return grad_u.data() + omp_get_thread_num() * rows * rank; }
};

}  // namespace

void linear_kl(const LinearKL& args, const LinearKLResult& out, const LinearKLGradients& grads, const Matrix& room) {
  Problem p(args);
  float* const kept = static_cast<float*>(room.data);
  const int64_t most = std::min(kept ? room.rows : kRowChunk, p.n), blocks = ceil_div(most, kBlock);
  Buffer packed_a(blocks * p.a.rows_size()), packed_b(blocks * p.b.rows_size());
  std::vector<State> states(p.threads * most);
  const Gradients gradients(p, kept ? most : 0, nullptr, out.lse_a, out.lse_b, grads);
#pragma omp parallel num_threads(p.threads)
  for (int64_t first = 0; first < p.n; first += most) {
    const int64_t rows = std::min(most, p.n - first);
    State* mine = states.data() + omp_get_thread_num() * rows;
    std::fill_n(mine, rows, State());
    p.pack_rows(first, rows, packed_a.get(), packed_b.get());
    p.walk(first, rows, packed_a.get(), packed_b.get(), kept, [](int64_t, int64_t) {},
           [&](int64_t row, int64_t count, int64_t column, int64_t, const float* za, const float* zb) {
             for (int64_t i = 0; i < count; ++i) fold(za + i * kTile, zb + i * kTile, column, mine[row + i]);
           });
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < rows; ++i) {
      State total = states[i];
      for (int t = 1; t < omp_get_num_threads(); ++t) total.merge(states[t * rows + i]);
      out.kl[first + i] = total.kl();
      out.lse_a[first + i] = total.a.value();
      out.lse_b[first + i] = total.b.value();
      out.argmax_a[first + i] = total.a.argmax;
      out.argmax_b[first + i] = total.b.argmax;
    }
    if (!kept) continue;
    Gradients::Scratch scratch(gradients);
    gradients.begin(first, rows);
    p.each_tile([&](int64_t t, int64_t column, int64_t columns) {
      float* za = kept + 2 * t * rows * kTile;
      gradients.tile(column, columns, scratch);
      for (int64_t i = 0; i < rows; i += kBlock)
        gradients.block(first, rows, i, std::min(kBlock, rows - i), column, columns, za + i * kTile, za + (rows + i) * kTile, scratch);
    });
    gradients.finish(first, rows);
  }
}

void linear_kl_backward(const LinearKL& args, const float* grad, const double* lse_a, const double* lse_b,
                        const LinearKLGradients& out) {
  Problem p(args);
  const int64_t most = std::min(kRowChunk, p.n), blocks = ceil_div(most, kBlock);
  Buffer packed_a(blocks * p.a.rows_size()), packed_b(blocks * p.b.rows_size());
  const Gradients gradients(p, most, grad, lse_a, lse_b, out);
#pragma omp parallel num_threads(p.threads)
  for (int64_t first = 0; first < p.n; first += most) {
    const int64_t rows = std::min(most, p.n - first);
    Gradients::Scratch scratch(gradients);
    gradients.begin(first, rows);
    p.pack_rows(first, rows, packed_a.get(), packed_b.get());
    p.walk(first, rows, packed_a.get(), packed_b.get(), nullptr,
           [&](int64_t column, int64_t columns) { gradients.tile(column, columns, scratch); },
           [&](int64_t row, int64_t count, int64_t column, int64_t columns, float* za, const float* zb) {
             gradients.block(first, rows, row, count, column, columns, za, zb, scratch);
           });
    gradients.finish(first, rows);
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
