// Ridge for many penalties from S = Q T Q^T with T tridiagonal, in fp64:
//
//   tridiagonal_path   R = Q^T C;  for each alpha the trace of (T + alpha)^-1 and, with w = (T + alpha)^-1 r, the dots r . w
//                      and squares w . w of every column r
//   tridiagonal_solve  W = Q (T + alpha_j)^-1 r_j  with an alpha for each column
//
// Q is the product of Householder reflectors I - tau v v^T, applied a block of them at a time as I - V F V^T (Schreiber &
// Van Loan 1989). Each thread takes kPanels panels of kWide columns through everything: they stay in its L2 while the packed
// reflectors stream by. T + alpha is positive definite, so L D L^T needs no pivots.
#include "cpu/tridiagonal.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kPanels = 2;
constexpr int64_t kDepth = 256;  // steps for which a packed panel of reflectors stays in L1

// The reflectors, packed: of each block both V^T, in panels of kMr reflectors, and V, in panels of kMr coordinates. Those of
// block b have no coordinates up to its first reflector's.
class Reflectors {
 public:
  Reflectors(const Tridiagonal& g) : size(g.diagonal.cols), each(g.factors.cols), factors(static_cast<const double*>(g.factors.data)) {
    const int64_t blocks = g.factors.rows / each;
    const double* given = static_cast<const double*>(g.reflectors.data);
    starts.assign(blocks + 1, 0);
    for (int64_t b = 0; b < blocks; ++b) starts[b + 1] = starts[b] + 2 * round_up(each, kMr) * round_up(length(b), kMr);
    packed.reset(new double[starts[blocks]]);
#pragma omp parallel for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      double *rows = by_reflector(b), *columns = by_coordinate(b);
      auto value = [&](int64_t i, int64_t x) {
        return i < each && x < length(b) ? given[(b * each + i) * g.reflectors.stride + first(b) + x] : 0.0;
      };
      for (int64_t i = 0; i < each; i += kMr)
        for (int64_t x = 0; x < length(b); ++x)
          for (int r = 0; r < kMr; ++r) *rows++ = value(i + r, x);
      for (int64_t x = 0; x < length(b); x += kMr)
        for (int64_t i = 0; i < each; ++i)
          for (int r = 0; r < kMr; ++r) *columns++ = value(i, x + r);
    }
  }

  // Scratch for `apply`.
  int64_t scratch() const { return 2 * kPanels * round_up(each, kMr) * kWide; }

  // panels [kPanels, padded rows, kWide] = Q panels, or Q^T panels.
  void apply(double* panels, bool transposed, double* scratch) const {
    const int64_t blocks = starts.size() - 1;
    for (int64_t k = 0; k < blocks; ++k) apply_block(transposed ? k : blocks - 1 - k, panels, transposed, scratch);
  }

  int64_t padded() const { return round_up(size, kMr) + kMr; }  // rows of a panel: the last tile may run over

 private:
  const int64_t size, each;
  const double* factors;
  std::vector<int64_t> starts;
  std::unique_ptr<double[]> packed;

  int64_t first(int64_t b) const { return b * each + 1; }
  int64_t length(int64_t b) const { return std::max<int64_t>(0, size - first(b)); }
  double* by_reflector(int64_t b) const { return packed.get() + starts[b]; }
  double* by_coordinate(int64_t b) const { return by_reflector(b) + round_up(each, kMr) * length(b); }

  void apply_block(int64_t b, double* panels, bool transposed, double* scratch) const {
    const int64_t lines = round_up(each, kMr), n = length(b);
    double *product = scratch, *turned = scratch + kPanels * lines * kWide;
    std::fill_n(product, kPanels * lines * kWide, 0.0);
    for (int64_t k = 0; k < n; k += kDepth)
      for (int64_t i = 0; i < lines; i += kMr)
        for (int64_t p = 0; p < kPanels; ++p)
          micro_kernel(by_reflector(b) + i * n + k * kMr, panels + (p * padded() + first(b) + k) * kWide, kWide,
                       std::min(kDepth, n - k), product + (p * lines + i) * kWide, kWide, true);
    const double* F = factors + b * each * each;
    for (int64_t p = 0; p < kPanels; ++p)
      for (int64_t i = 0; i < each; ++i) {  // F is upper triangular
        vd sum[2] = {};
        for (int64_t k = transposed ? 0 : i; k < (transposed ? i + 1 : each); ++k) {
          const double factor = transposed ? F[k * each + i] : F[i * each + k];
          for (int j = 0; j < 2; ++j) sum[j] += factor * load(product + (p * lines + k) * kWide + j * kHalf);
        }
        for (int j = 0; j < 2; ++j) store(turned + (p * lines + i) * kWide + j * kHalf, sum[j]);
      }
    for (int64_t x = 0; x < n; x += kMr)
      for (int64_t p = 0; p < kPanels; ++p)
        micro_kernel(by_coordinate(b) + x * each, turned + p * lines * kWide, kWide, each,
                     panels + (p * padded() + first(b) + x) * kWide, kWide, true, -1.0);
  }
};

// Calls use(first column, columns, panels) for all columns of `from` [rows, columns], kPanels panels at a time, by all threads;
// what then stands in the panels is written to `to`, where it is there.
template <class Use>
void each_strip(const Reflectors& Q, const Matrix& from, const Matrix& to, Use use) {
  const int64_t width = kPanels * kWide;
#pragma omp parallel
  {
    Doubles panels(kPanels * Q.padded() * kWide), scratch(Q.scratch());
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < from.cols; j += width) {
      const int64_t columns = std::min(width, from.cols - j);
      auto place = [&](int64_t i, int64_t p) { return panels.data() + (p * Q.padded() + i) * kWide; };
      auto count = [&](int64_t p) { return std::clamp<int64_t>(columns - p * kWide, 0, kWide); };
      for (int64_t i = 0; i < from.rows; ++i)
        for (int64_t p = 0; p < kPanels; ++p) {
          const double* row = static_cast<const double*>(from.data) + i * from.stride + j + p * kWide;
          std::fill_n(std::copy_n(row, count(p), place(i, p)), kWide - count(p), 0.0);
        }
      use(j, columns, panels.data(), scratch.data());
      for (int64_t i = 0; i < to.rows; ++i)
        for (int64_t p = 0; p < kPanels; ++p)
          std::copy_n(place(i, p), count(p), static_cast<double*>(to.data) + i * to.stride + j + p * kWide);
    }
  }
}

// L D L^T of T + alpha for one alpha: 1 / D, the entries of L below its diagonal, and the trace of the inverse of T + alpha,
// whose diagonal is 1 / (d_i + u_i - t_i - alpha) with the pivots d from above and u from below.
struct Pivots {
  Doubles inverse, lower;
  double trace = 0;

  Pivots(const double* diagonal, const double* off, int64_t n, double alpha) : inverse(n), lower(n) {
    for (int64_t i = 0; i < n; ++i) {
      inverse[i] = 1 / (diagonal[i] + alpha - (i ? lower[i - 1] * off[i - 1] : 0));
      if (i + 1 < n) lower[i] = off[i] * inverse[i];
    }
    double below = 0;  // what the rows below take from the pivot
    for (int64_t i = n - 1; i >= 0; --i) {
      trace += 1 / (1 / inverse[i] - below);
      if (i) below = off[i - 1] * off[i - 1] / (diagonal[i] + alpha - below);
    }
  }
};

// r . w and w . w of the columns of a panel, w = (T + alpha)^-1 r; `y` has room for a panel.
void forms(const double* r, const Pivots& f, int64_t n, double* y, double* dots, double* squares) {
  vd at[2] = {}, dot[2] = {}, square[2] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < 2; ++j) {
      at[j] = load(r + i * kWide + j * kHalf) - (i ? f.lower[i - 1] : 0) * at[j];
      dot[j] += at[j] * at[j] * f.inverse[i];
      store(y + i * kWide + j * kHalf, at[j]);
    }
  at[0] = at[1] = vd{};
  for (int64_t i = n - 1; i >= 0; --i)
    for (int j = 0; j < 2; ++j) {
      at[j] = load(y + i * kWide + j * kHalf) * f.inverse[i] - f.lower[i] * at[j];
      square[j] += at[j] * at[j];
    }
  for (int j = 0; j < 2; ++j) store(dots + j * kHalf, dot[j]), store(squares + j * kHalf, square[j]);
}

// r = (T + alpha_j)^-1 r_j for the columns of a panel, in place; `inverse` and `lower` have room for a panel.
void solve(double* r, const double* diagonal, const double* off, const double* alphas, int64_t n, double* inverse, double* lower) {
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < kWide; j += kHalf) {
      double *at = r + i * kWide + j, *l = lower + i * kWide + j;
      vd pivot = diagonal[i] + load(alphas + j), y = load(at);
      if (i) {
        vd before = load(l - kWide);
        pivot -= before * off[i - 1];
        y -= before * load(at - kWide);
      }
      store(at, y);
      store(inverse + i * kWide + j, 1 / pivot);
      store(l, i + 1 < n ? off[i] / pivot : vd{});
    }
  for (int64_t i = n - 1; i >= 0; --i)
    for (int j = 0; j < kWide; j += kHalf) {
      double* at = r + i * kWide + j;
      vd w = load(at) * load(inverse + i * kWide + j);
      if (i + 1 < n) w -= load(lower + i * kWide + j) * load(at + kWide);
      store(at, w);
    }
}

}  // namespace

void tridiagonal_path(const Tridiagonal& g, const Matrix& R, double* dots, double* squares, double* traces) {
  const Reflectors Q(g);
  const int64_t n = g.diagonal.cols, columns = g.C.cols;
  const auto *diagonal = static_cast<const double*>(g.diagonal.data), *off = static_cast<const double*>(g.off.data);
  std::vector<Pivots> pivots;
  for (int64_t a = 0; a < g.alphas.cols; ++a) pivots.emplace_back(diagonal, off, n, static_cast<const double*>(g.alphas.data)[a]);
  for (const Pivots& f : pivots) *traces++ = f.trace;
  each_strip(Q, g.C, R, [&](int64_t first, int64_t count, double* panels, double* scratch) {
    Q.apply(panels, true, scratch);
    Doubles y(n * kWide);
    double dot[kWide], square[kWide];
    for (int64_t p = 0; p * kWide < count; ++p)
      for (size_t a = 0; a < pivots.size(); ++a) {
        forms(panels + p * Q.padded() * kWide, pivots[a], n, y.data(), dot, square);
        const int64_t here = std::min<int64_t>(kWide, count - p * kWide), at = int64_t(a) * columns + first + p * kWide;
        std::copy_n(dot, here, dots + at);
        std::copy_n(square, here, squares + at);
      }
  });
}

void tridiagonal_solve(const Tridiagonal& g, const Matrix& W) {
  const Reflectors Q(g);
  const int64_t n = g.diagonal.cols;
  const auto *diagonal = static_cast<const double*>(g.diagonal.data), *off = static_cast<const double*>(g.off.data);
  each_strip(Q, g.C, W, [&](int64_t first, int64_t count, double* panels, double* scratch) {
    Doubles inverse(n * kWide), lower(n * kWide);
    for (int64_t p = 0; p * kWide < count; ++p) {
      double alphas[kWide];
      for (int64_t j = 0; j < kWide; ++j)
        alphas[j] = static_cast<const double*>(g.alphas.data)[first + std::min<int64_t>(p * kWide + j, count - 1)];
      solve(panels + p * Q.padded() * kWide, diagonal, off, alphas, n, inverse.data(), lower.data());
    }
    Q.apply(panels, false, scratch);
  });
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
