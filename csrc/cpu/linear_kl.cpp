// KL(softmax(b) || softmax(a)) per row for logits that are products, tile by tile: no [N, V] logits ever exist.
//
//   a = cap(scale_a (h_a W_a^T + u v + shift_a)),  b = cap(scale_b (h_b W_b^T + shift_b)) or given,  cap(z) = s tanh(z / s)
//
// Each thread takes a range of the vocabulary. It packs a tile of both heads, a panel at a time, multiplies it with all rows
// and folds the two tiles of logits into a running state per row, relative to the running maxima m_a and m_b:
//   s_a = sum e^(a - m_a),  s_b = sum e^(b - m_b),  w = sum e^(b - m_b) ((b - m_b) - (a - m_a))
//   KL = w / s_b + log s_a - log s_b
// Only differences to the maxima are summed, so an offset of the logits costs no digits; sums across tiles are fp64. The
// threads' states are merged in order. dKL/da = softmax(a) - softmax(b) needs both log-sum-exps: where gradients are wanted
// the exponentials of a few rows are kept until these are known; the backward pass, which knows them, computes the tiles again.
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

// What the gradients need of a tile of logits: e^(a - reference) cap'(a) and e^(b - reference) cap'(a), [rows, kTile], with the
// references [rows] of either side.
struct Exponentials {
  float *a, *b, *reference_a, *reference_b;
};

// Sums over a row of a tile.
struct Sums {
  vf a = {}, b = {}, w = {}, widest = splat(-kInf);
};

// Sums a row around its references, and stores what is kept of it. The plain way takes the fewest operations and gives a w
// that is not finite where a logit is -inf; the careful one knows that p_b = 0 adds nothing to it.
template <bool careful, bool keep>
inline Sums sum_row(const float* za, const float* zb, float reference_a, float reference_b, float softcap = 0,
                    float* kept_a = nullptr, float* kept_b = nullptr) {
  Sums sums;
  for (int64_t j = 0; j < kTile; j += kLanes) {
    vf z = load(za + j), a = z - reference_a, b = load(zb + j) - reference_b, apart = b - a;
    vf ea = exp_nonpositive(a), eb = exp_nonpositive(b);
    sums.a += ea;
    sums.b += eb;
    if (careful) sums.w += eb == 0 ? vf{} : eb * apart, sums.widest = vmax(apart, sums.widest);
    else sums.w += eb * apart;
    if (!keep) continue;
    if (softcap > 0) {
      vf slope = 1.0f - (z / softcap) * (z / softcap);
      ea *= slope, eb *= slope;
    }
    store(kept_a + j, ea);
    store(kept_b + j, eb);
  }
  return sums;
}

// Folds a tile of `count` rows, at most kLanes, of both logits into their states, and into `kept` where the gradients need it.
template <bool keep>
void fold(const float* za, const float* zb, int64_t count, int64_t column, float softcap, State* states, Exponentials kept) {
  vf a_rows[kLanes], b_rows[kLanes], w_rows[kLanes] = {};
  for (int64_t i = 0; i < kLanes; ++i) {
    vf a = splat(-kInf), b = a;
    for (int64_t j = 0; i < count && j < kTile; j += kLanes)
      a = vmax(load(za + i * kTile + j), a), b = vmax(load(zb + i * kTile + j), b);
    a_rows[i] = a, b_rows[i] = b;
  }
  const vf a_max = reduce_rows(a_rows, vmax), b_max = reduce_rows(b_rows, vmax);
  for (int64_t i = 0; i < count; ++i) {
    State& state = states[i];
    const float *a = za + i * kTile, *b = zb + i * kTile;
    auto place = [&](const float* z, float max, float before) {
      return max > before ? column + (std::find(z, z + kTile, max) - z) : 0;
    };
    state.raise(a_max[i], place(a, a_max[i], state.a.max), b_max[i], place(b, b_max[i], state.b.max));
    const float reference_a = state.a.reference(), reference_b = state.b.reference();
    if (keep) kept.reference_a[i] = reference_a, kept.reference_b[i] = reference_b;
    Sums sums = sum_row<false, keep>(a, b, reference_a, reference_b, softcap, kept.a + i * kTile, kept.b + i * kTile);
    a_rows[i] = sums.a, b_rows[i] = sums.b, w_rows[i] = sums.w;
  }
  const vf a_sum = reduce_rows(a_rows, add), b_sum = reduce_rows(b_rows, add), w_sum = reduce_rows(w_rows, add);
  for (int64_t i = 0; i < count; ++i) {
    State& state = states[i];
    double w = w_sum[i];
    if (!(std::fabs(w) < kInf)) {
      Sums sums = sum_row<true, false>(za + i * kTile, zb + i * kTile, state.a.reference(), state.b.reference());
      bool excluded = max(sums.widest) == kInf;
      w = sum(sums.w);
      if (excluded && w == kInf) w = 0;
      state.excluded |= excluded;
    }
    state.a.sum += a_sum[i], state.b.sum += b_sum[i], state.w += w;
  }
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

  // Calls f(t, column, columns, za, zb) with the logits [rows, kTile] of a chunk of packed rows, for every tile of this thread.
  template <class F>
  void walk(int64_t first, int64_t rows, const float* packed_a, const float* packed_b, F f) const {
    Buffer panel(std::max(a.panel_size(), b.panel_size())), za(rows * kTile), zb(rows * kTile);
    each_tile([&](int64_t t, int64_t column, int64_t columns) {
      multiply(a, packed_a, rows, column, columns, panel.get(), za.get());
      multiply(b, packed_b, rows, column, columns, panel.get(), zb.get());
      a.finish(first, rows, column, columns, za.get());
      b.finish(first, rows, column, columns, zb.get());
      f(t, column, columns, za.get(), zb.get());
    });
  }

 private:
  void multiply(const Side& side, const float* packed, int64_t rows, int64_t column, int64_t columns, float* panel, float* z) const {
    if (side.depth == 0) return;
    for (int64_t j = 0; j < columns; j += kNr) {
      const int64_t width = std::min<int64_t>(kNr, columns - j), next = column + j + kNr;
      side.pack_panel(column + j, width, panel);
      for (int64_t i = 0; i < rows; i += kBlock) {
        const int64_t here = std::min(kBlock, rows - i);
        side.multiply(packed + i / kBlock * side.rows_size(), here, panel, width, z + i * kTile + j, next + kNr * i / rows,
                      next + kNr * (i + here) / rows);
      }
    }
  }
};

// The gradients, a chunk of rows after another: d = weight (softmax(a) - softmax(b)) cap'(a), a tile at a time, and d v^T,
// u^T d and the sum of d over rows are added to what out wants.
class Gradients {
 public:
  Gradients(const Problem& p, int64_t most, const float* weight, const double* lse_a, const double* lse_b,
            const LinearKLGradients& out)
      : p(p), weight(weight), lse_a(lse_a), lse_b(lse_b), out(out), packed_u(ceil_div(most, kBlock) * packed_rank),
        grad_u(p.threads * most * rank) {}

  // Of one thread.
  struct Scratch {
    Buffer v, d{kBlock * kTile}, references{2 * kBlock};
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

  // Makes them of the logits of `count` rows, in their place.
  Exponentials exponentials(int64_t row, int64_t count, float* za, float* zb, Scratch& scratch) const {
    float *reference_a = scratch.references.get(), *reference_b = reference_a + kBlock;
    for (int64_t i = 0; i < count; ++i) {
      reference_a[i] = float(lse_a[row + i]), reference_b[i] = float(lse_b[row + i]);
      for (int64_t j = i * kTile; j < (i + 1) * kTile; j += kLanes) {
        vf a = load(za + j), slope = splat(1);
        if (p.a.softcap > 0) slope -= (a / p.a.softcap) * (a / p.a.softcap);
        store(za + j, exp_nonpositive(a - reference_a[i]) * slope);
        store(zb + j, exp_nonpositive(load(zb + j) - reference_b[i]) * slope);
      }
    }
    return {za, zb, reference_a, reference_b};
  }

  // The block of `count` rows from `row` of the chunk on.
  void block(int64_t first, int64_t rows, int64_t row, int64_t count, int64_t column, int64_t columns, Exponentials e,
             Scratch& scratch) const {
    float factor_a[kBlock + kLanes], factor_b[kBlock + kLanes], *d = scratch.d.get();
    for (int64_t i = 0; i < count; ++i) {
      factor_a[i] = float(e.reference_a[i] - lse_a[first + row + i]);
      factor_b[i] = float(e.reference_b[i] - lse_b[first + row + i]);
    }
    for (float* factor : {factor_a, factor_b})
      for (int64_t i = 0; i < count; i += kLanes) {
        vf scaled = exp_nonpositive(load(factor + i)) * p.a.scale;
        if (weight) scaled *= load_line(weight + first + row + i, 1, count - i);
        store(factor + i, scaled);
      }
    vf totals[kTile / kLanes] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < kTile; j += kLanes) {
        vf each = load(e.a + i * kTile + j) * factor_a[i] - load(e.b + i * kTile + j) * factor_b[i];
        store(d + i * kTile + j, each);
        totals[j / kLanes] += each;
      }
    for (int64_t j = 0; out.c && j < columns; ++j) out.c[column + j] += totals[j / kLanes][j % kLanes];
    if (out.u)
      multiply_views(WholeRows<kTile>{d}, count, Packed<kNr>{scratch.v.get(), columns}, rank, columns, mine(rows) + row * rank, rank, true);
    if (out.v)
      multiply_views(Packed<kMr>{packed_u.get() + row / kBlock * packed_rank, count}, rank, WholeColumns{d, kTile}, columns, count,
                      out.v + column, p.vocabulary, true);
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
  Buffer references(kept ? p.tiles * 2 * most : 0);
  auto exponentials = [&](int64_t t, int64_t rows, int64_t i) {  // of a chunk's rows from i on
    float *a = kept + (2 * t * rows + i) * kTile, *reference = references.get() + 2 * t * rows + i;
    return Exponentials{a, a + rows * kTile, reference, reference + rows};
  };
  const Gradients gradients(p, kept ? most : 0, nullptr, out.lse_a, out.lse_b, grads);
#pragma omp parallel num_threads(p.threads)
  for (int64_t first = 0; first < p.n; first += most) {
    const int64_t rows = std::min(most, p.n - first);
    State* mine = states.data() + omp_get_thread_num() * rows;
    std::fill_n(mine, rows, State());
    p.pack_rows(first, rows, packed_a.get(), packed_b.get());
    p.walk(first, rows, packed_a.get(), packed_b.get(), [&](int64_t t, int64_t column, int64_t, const float* za, const float* zb) {
      for (int64_t i = 0; i < rows; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, rows - i);
        if (kept) fold<true>(za + i * kTile, zb + i * kTile, count, column, p.a.softcap, mine + i, exponentials(t, rows, i));
        else fold<false>(za + i * kTile, zb + i * kTile, count, column, 0, mine + i, {});
      }
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
      gradients.tile(column, columns, scratch);
      for (int64_t i = 0; i < rows; i += kBlock)
        gradients.block(first, rows, i, std::min(kBlock, rows - i), column, columns, exponentials(t, rows, i), scratch);
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
    p.walk(first, rows, packed_a.get(), packed_b.get(), [&](int64_t, int64_t column, int64_t columns, float* za, float* zb) {
      gradients.tile(column, columns, scratch);
      for (int64_t i = 0; i < rows; i += kBlock) {
        const int64_t count = std::min(kBlock, rows - i);
        const Exponentials e = gradients.exponentials(first + i, count, za + i * kTile, zb + i * kTile, scratch);
        gradients.block(first, rows, i, count, column, columns, e, scratch);
      }
    });
    gradients.finish(first, rows);
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
