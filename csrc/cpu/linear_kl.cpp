// KL(softmax(b) || softmax(a)) per row for logits that are products, tile by tile: no row of logits ever exists.
//
//   a = cap(scale_a (h_a W_a^T + u v + shift_a)),  b = cap(scale_b (h_b W_b^T + shift_b)) or given,  cap(z) = s tanh(z / s)
//
// Each thread takes a range of the vocabulary. It packs a tile of both heads, multiplies it with every block of rows and
// folds the two tiles of logits into a running state per row, relative to the running maxima m_a and m_b:
//   s_a = sum e^(a - m_a),  s_b = sum e^(b - m_b),  w = sum e^(b - m_b) ((b - m_b) - (a - m_a))
//   KL = w / s_b + log s_a - log s_b
// Only differences to the maxima are summed, so an offset of the logits costs no digits; sums across tiles are fp64. The
// threads' states are merged in order. Backward computes the tiles again: dKL/da = softmax(a) - softmax(b).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/gemm_bf16.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kTile = 8 * kNr;                                // columns: 256, 128 or 64
constexpr int64_t kBlock = 96 / kMr * kMr;                        // rows
constexpr int64_t kRowChunk = 1024 / kBlock * kBlock;             // rows packed at a time
constexpr int64_t kSum = 128;                                     // additions per running sum: longer ones lose digits
constexpr int64_t kForkWork = 1 << 17;                            // multiply-adds that repay waking the other threads
constexpr float kInf = std::numeric_limits<float>::infinity();

double sum64(vf v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// One term of the logits: left [rows, depth] times right, which is [columns, depth] or, across, [depth, columns].
struct Product {
  Matrix left, right;
  bool across;
  Multiplier way;

  Product(const Matrix& left, const Matrix& right, bool across)
      : left(left), right(right), across(across),
        way{!across && left.dtype == DType::bf16 && right.dtype == DType::bf16 && has_bf16_products()} {}

  void pack_left(int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) const {
    pack_operand<kMr>(left, row, rows, k, depth, left.stride, 1, out);
  }
  void pack_right(int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) const {
    pack_operand<kNr>(right, column, columns, k, depth, across ? 1 : right.stride, across ? right.stride : 1, out);
  }
  void multiply(const float* a, int64_t rows, const float* b, int64_t columns, int64_t depth, float* out, bool accumulate) const {
    way.multiply(a, rows, b, columns, depth, out, kTile, accumulate);
  }

 private:
  template <int kWidth>
  void pack_operand(const Matrix& m, int64_t i, int64_t n, int64_t k, int64_t depth, int64_t stride, int64_t depth_stride,
                    float* out) const {
    with_type(m, [&](auto* p) {
      Operand<std::remove_pointer_t<decltype(p)>> operand{p, stride, depth_stride};
      way.pack_panels<kWidth>(operand.from(i, k), n, depth, out);
    });
  }
};

// One of the two distributions: the products that make its logits, or the logits themselves.
class Side {
 public:
  Side(const Matrix& h, const Matrix& W, const Matrix& u, const Matrix& v, const Matrix& bias, const Matrix& c, float softcap,
       float scale, int64_t vocabulary)
      : softcap(softcap), scale(scale), given(W.data ? Matrix{} : h) {
    if (W.data) products.emplace_back(h, W, false);
    if (u.data) products.emplace_back(u, v, true);
    for (const Product& product : products) depth += product.left.cols;
    if (!bias.data && !c.data) return;
    shift.assign(vocabulary, 0.0f);
    for (const Matrix& term : {bias, c})
      with_type(term, [&](auto* p) {
        for (int64_t j = 0; p && j < vocabulary; ++j) shift[j] += to_float(p[j]);
      });
  }

  const float softcap, scale;
  int64_t depth = 0;

  int64_t rows_size() const { return kBlock * depth; }  // floats for a packed block of rows, and for a tile of columns
  int64_t tile_size() const { return kTile * depth; }

  void pack_rows(int64_t row, int64_t rows, float* out) const {
    each_depth([&](const Product& p, int64_t k, int64_t steps, int64_t at) { p.pack_left(row, rows, k, steps, out + at * kBlock); });
  }
  // A panel at a time through all of its depth, so that the rows of a head stream.
  void pack_tile(int64_t column, int64_t columns, float* out) const {
    for (int64_t j = 0; j < columns; j += kNr)
      each_depth([&](const Product& p, int64_t k, int64_t steps, int64_t at) {
        p.pack_right(column + j, std::min<int64_t>(kNr, columns - j), k, steps, out + at * kTile + j * p.way.steps(steps));
      });
  }

  // z [rows, kTile] = the logits of a packed block and a packed tile, -inf beyond its columns.
  void logits(const float* block, int64_t row, int64_t rows, const float* tile, int64_t column, int64_t columns, float* z) const {
    bool first = true;
    each_depth([&](const Product& p, int64_t, int64_t steps, int64_t at) {
      p.multiply(block + at * kBlock, rows, tile + at * kTile, columns, steps, z, !first);
      first = false;
    });
    if (first) std::fill_n(z, rows * kTile, 0.0f);
    for (int64_t i = 0; i < rows; ++i, z += kTile) {
      if (given.data)
        with_type(given, [&](auto* p) {
          p += (row + i) * given.stride + column;
          for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load_line(p + j, 1, columns - j));
        });
      if (!shift.empty())
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load(z + j) + load_line(shift.data() + column + j, 1, columns - j));
      if (scale != 1)
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load(z + j) * scale);
      if (softcap > 0)
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, softcap * tanh(load(z + j) / softcap));
      std::fill(z + columns, z + kTile, -kInf);
    }
  }

 private:
  const Matrix given;
  std::vector<Product> products;
  std::vector<float> shift;

  template <class F>
  void each_depth(F f) const {
    int64_t at = 0;
    for (const Product& product : products)
      for (int64_t k = 0, steps; k < product.left.cols; k += steps, at += steps) {
        steps = std::min(product.way.pairs ? 2 * kSum : kSum, product.left.cols - k);
        f(product, k, steps, at);
      }
  }
};

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
  state.a.sum += sum64(sa);
  state.b.sum += sum64(sb);
  bool excluded = max(widest) == kInf;
  double more = sum64(w);
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

  // Calls tile(column, columns), then block(row, rows, za, zb), for every tile of this thread and block of the chunk.
  template <class Tile, class Block>
  void walk(int64_t first, int64_t rows, const float* packed_a, const float* packed_b, Tile tile, Block block) const {
    Buffer tile_a(a.tile_size()), tile_b(b.tile_size()), za(kBlock * kTile), zb(kBlock * kTile);
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t t = tiles * thread / team; t < tiles * (thread + 1) / team; ++t) {
      int64_t column = t * kTile, columns = std::min(kTile, vocabulary - column);
      a.pack_tile(column, columns, tile_a.get());
      b.pack_tile(column, columns, tile_b.get());
      tile(column, columns);
      for (int64_t i = 0; i < rows; i += kBlock) {
        int64_t here = std::min(kBlock, rows - i), at = i / kBlock;
        a.logits(packed_a + at * a.rows_size(), first + i, here, tile_a.get(), column, columns, za.get());
        b.logits(packed_b + at * b.rows_size(), first + i, here, tile_b.get(), column, columns, zb.get());
        block(i, here, column, columns, za.get(), zb.get());
      }
    }
  }
};

}  // namespace

void linear_kl(const LinearKL& args, const LinearKLResult& out) {
  Problem p(args);
  int64_t most = std::min(kRowChunk, p.n), blocks = ceil_div(most, kBlock);
  Buffer packed_a(blocks * p.a.rows_size()), packed_b(blocks * p.b.rows_size());
  std::vector<State> states;
  for (int64_t first = 0; first < p.n; first += kRowChunk) {
    int64_t rows = std::min(kRowChunk, p.n - first);
    states.assign(p.threads * rows, State());
#pragma omp parallel num_threads(p.threads)
    {
      p.pack_rows(first, rows, packed_a.get(), packed_b.get());
      State* mine = states.data() + omp_get_thread_num() * rows;
      p.walk(first, rows, packed_a.get(), packed_b.get(), [](int64_t, int64_t) {},
             [&](int64_t row, int64_t count, int64_t column, int64_t, const float* za, const float* zb) {
               for (int64_t i = 0; i < count; ++i) fold(za + i * kTile, zb + i * kTile, column, mine[row + i]);
             });
    }
    for (int64_t i = 0; i < rows; ++i) {
      State total = states[i];
      for (int t = 1; t < p.threads; ++t) total.merge(states[t * rows + i]);
      out.kl[first + i] = total.kl();
      out.lse_a[first + i] = total.a.value();
      out.lse_b[first + i] = total.b.value();
      out.argmax_a[first + i] = total.a.argmax;
      out.argmax_b[first + i] = total.b.argmax;
    }
  }
}

void linear_kl_backward(const LinearKL& args, const float* grad, const double* lse_a, const double* lse_b,
                        const LinearKLGradients& out) {
  Problem p(args);
  int64_t rank = args.u.cols, most = std::min(kRowChunk, p.n), blocks = ceil_div(most, kBlock);
  int64_t packed_rank = round_up(rank, kMr) * kBlock;
  Buffer packed_a(blocks * p.a.rows_size()), packed_b(blocks * p.b.rows_size()), packed_u(blocks * packed_rank);
  std::vector<float> grad_u;
  for (int64_t first = 0; first < p.n; first += kRowChunk) {
    int64_t rows = std::min(kRowChunk, p.n - first);
    grad_u.assign(p.threads * rows * rank, 0.0f);
#pragma omp parallel num_threads(p.threads)
    {
      p.pack_rows(first, rows, packed_a.get(), packed_b.get());
#pragma omp for
      for (int64_t i = 0; i < rows; i += kBlock)
        with_type(args.u, [&](auto* u) {
          Operand<std::remove_pointer_t<decltype(u)>> transposed{u + (first + i) * args.u.stride, 1, args.u.stride};
          pack<kMr>(transposed, rank, std::min(kBlock, rows - i), packed_u.get() + i / kBlock * packed_rank);
        });
      Buffer tile_v(round_up(rank, kNr) * kTile), by_row(kBlock * kTile), by_column(kBlock * kTile);
      float* mine = grad_u.data() + omp_get_thread_num() * rows * rank;
      auto tile = [&](int64_t column, int64_t columns) {
        with_type(args.v, [&](auto* v) {
          Operand<std::remove_pointer_t<decltype(v)>> transposed{v + column, args.v.stride, 1};
          pack<kNr>(transposed, rank, columns, tile_v.get());
        });
      };
      auto block = [&](int64_t row, int64_t count, int64_t column, int64_t columns, float* za, const float* zb) {
        for (int64_t i = 0; i < count; ++i) {
          float* dz = za + i * kTile;
          const float* b = zb + i * kTile;
          double la = lse_a[first + row + i], lb = lse_b[first + row + i];
          float high_a = float(la), low_a = float(la - high_a), high_b = float(lb), low_b = float(lb - high_b);
          float factor = grad[first + row + i] * p.a.scale;
          for (int64_t j = 0; j < columns; j += kLanes) {
            vf a = load(dz + j);
            vf d = exp_nonpositive(a - high_a - low_a) - exp_nonpositive(load(b + j) - high_b - low_b);
            if (p.a.softcap > 0) d *= 1.0f - (a / p.a.softcap) * (a / p.a.softcap);
            store(dz + j, d * factor);
          }
          for (int64_t j = 0; out.c && j < columns; ++j) out.c[column + j] += dz[j];
        }
        pack<kMr>(Operand<float>{za, kTile, 1}, count, columns, by_row.get());
        multiply_panels(by_row.get(), count, tile_v.get(), rank, columns, mine + row * rank, rank, true);
        pack<kNr>(Operand<float>{za, 1, kTile}, columns, count, by_column.get());
        multiply_panels(packed_u.get() + row / kBlock * packed_rank, rank, by_column.get(), columns, count, out.v + column,
                        p.vocabulary, true);
      };
      p.walk(first, rows, packed_a.get(), packed_b.get(), tile, block);
#pragma omp barrier
#pragma omp for
      for (int64_t i = 0; i < rows * rank; ++i) {
        float total = 0;
        for (int t = 0; t < p.threads; ++t) total += grad_u[t * rows * rank + i];
        out.u[first * rank + i] = total;
      }
    }
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
