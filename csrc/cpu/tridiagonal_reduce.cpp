// S = Q T Q^T by Householder reflectors, kBlock rows at a time, in fp64 and in place of S's upper triangle:
//
//   v_i makes row i tridiagonal;  w = tau (S v - V W^T v - W V^T v),  w -= tau / 2 (w . v) v;  S -= V W^T + W V^T
//
// (Dongarra, Hammarling & Sorensen 1989). S v is half of the work and reads the rest of S for every row, so it reads the
// upper triangle alone. One team of threads goes through it all; each has its own columns of every vector.
#include <atomic>
#include <cmath>
#include <thread>

#include "cpu/tridiagonal.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kBlock = 32;   // reflectors between two updates of the rest
constexpr int64_t kRows = 4;     // rows of S multiplied together
constexpr int64_t kShare = 128;  // columns that repay a thread

// Five times a row the threads wait for each other, for microseconds. OpenMP's barrier puts a thread to sleep where one is
// late; on a busy machine its waking then costs milliseconds each time.
class Barrier {
 public:
  void wait(int team) {
    const int64_t round = rounds.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived.store(0, std::memory_order_relaxed);
      rounds.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; rounds.load(std::memory_order_acquire) == round; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

 private:
  static constexpr int64_t kSpins = 100000;
  std::atomic<int> arrived{0};
  std::atomic<int64_t> rounds{0};
};

class Reduction {
 public:
  Reduction(const Matrix& S, double* diagonal, double* off, double* scales)
      : S(static_cast<double*>(S.data)), n(S.rows), ld(S.stride), diagonal(diagonal), off(off), scales(scales),
        threads(int(std::clamp<int64_t>(n / kShare, 1, omp_get_max_threads()))), V(kBlock * n), W(kBlock * n), dots(2 * kBlock),
        partial(threads * kStride), sums(threads * padded(n)), right(2 * kBlock * round_up(n, kWide)) {}

  void run() {
#pragma omp parallel num_threads(threads)
    {
      Doubles left(2 * kBlock * kMr);
      for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t last = std::min(n, first + kBlock);
        for (int64_t i = first; i < last; ++i) reduce_row(i, i - first);
        meet();
        update_rest(last, last - first, left.data());
      }
    }
  }

 private:
  static constexpr int64_t kStride = 16;  // doubles apart: a cache line and its neighbour for each thread
  static int64_t padded(int64_t n) { return round_up(n, 16) + 16; }

  double* const S;
  const int64_t n, ld;
  double *const diagonal, *const off, *const scales;
  const int threads;
  Doubles V, W;           // [kBlock, n]
  Doubles dots;           // W_k . v and V_k . v
  Doubles partial, sums;  // of each thread
  Doubles right;          // packed W and V

  Barrier barrier;

  void meet() { barrier.wait(omp_get_num_threads()); }
  double* row(int64_t i) const { return S + i * ld; }
  // The columns from `from` on that are this thread's.
  std::pair<int64_t, int64_t> own(int64_t from) const {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads(), step = round_up(ceil_div(n - from, team), 8);
    return {std::min(n, from + t * step), std::min(n, from + (t + 1) * step)};
  }
  double total() const {
    double all = 0;
    for (int t = 0; t < omp_get_num_threads(); ++t) all += partial[t * kStride];
    return all;
  }

  // The k-th row of a block.
  void reduce_row(int64_t i, int64_t k) {
    double &mine = partial[omp_get_thread_num() * kStride], *a = row(i);
    const auto [begin, end] = own(i + 1);
    meet();
#pragma omp master
    correct(i, k, i, i + 1);
    correct(i, k, begin, end);
    double square = 0;
    for (int64_t c = std::max(begin, i + 2); c < end; ++c) square += a[c] * a[c];
    mine = square;
    meet();
#pragma omp master
    diagonal[i] = a[i];
    if (i + 1 == n) return;
    const double rest = total(), head = a[i + 1], size = std::sqrt(head * head + rest);
    const double end_value = head > 0 ? -size : size, tau = rest == 0 ? 0 : (end_value - head) / end_value;
    double* v = V.data() + k * n;
    meet();
    const double inverse = rest == 0 ? 0 : 1 / (head - end_value);
    for (int64_t c = begin; c < end; ++c) v[c] = a[c] = c == i + 1 ? 1 : a[c] * inverse;
#pragma omp master
    off[i] = rest == 0 ? head : end_value, scales[i] = tau;
    meet();
    multiply(i + 1, k, v);
    meet();
    double *w = W.data() + k * n, dot = 0;
    for (int64_t c = begin; c < end; ++c) {
      double value = 0;
      for (int t = 0; t < omp_get_num_threads(); ++t) value += sums[t * padded(n) + c];
      w[c] = value;
    }
    for (int64_t j = 0; j < k; ++j) {
      const double *vj = V.data() + j * n, *wj = W.data() + j * n, by_v = dots[j], by_w = dots[kBlock + j];
      for (int64_t c = begin; c < end; ++c) w[c] -= vj[c] * by_v + wj[c] * by_w;
    }
    for (int64_t c = begin; c < end; ++c) dot += (w[c] *= tau) * v[c];
    mine = dot;
    meet();
    const double share = -0.5 * tau * total();
    for (int64_t c = begin; c < end; ++c) w[c] += share * v[c];
  }

  // What the k reflectors before it in the block do to row i, columns [begin, end).
  void correct(int64_t i, int64_t k, int64_t begin, int64_t end) const {
    double* a = row(i);
    for (int64_t j = 0; j < k; ++j) {
      const double *v = V.data() + j * n, *w = W.data() + j * n, at_v = v[i], at_w = w[i];
      for (int64_t c = begin; c < end; ++c) a[c] -= at_v * w[c] + at_w * v[c];
    }
  }

  // This thread's part of S v over rows and columns from `from` on, and of the products of v with V and W.
  void multiply(int64_t from, int64_t k, const double* v) {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads(), size = n - from;
    auto bound = [&](int64_t t) {  // equal areas of the triangle
      return t == team ? n : n - int64_t(double(size) * std::sqrt(1 - double(t) / double(team)));
    };
    double* y = sums.data() + t * padded(n);
    std::fill(y + from, y + n, 0.0);
    int64_t r = bound(t);
    const int64_t last = bound(t + 1);
    for (; r + kRows <= last; r += kRows) rows(r, v, y);
    for (; r < last; ++r) {
      const double* a = row(r);
      double sum = a[r] * v[r];
      for (int64_t c = r + 1; c < n; ++c) sum += a[c] * v[c], y[c] += a[c] * v[r];
      y[r] += sum;
    }
    for (int64_t j = t; j < 2 * k; j += team) {
      const double* other = (j < k ? W.data() + j * n : V.data() + (j - k) * n);
      double sum = 0;
      for (int64_t c = from; c < n; ++c) sum += other[c] * v[c];
      dots[j < k ? j : kBlock + j - k] = sum;
    }
  }

  // kRows rows from r on.
  void rows(int64_t r, const double* v, double* y) const {
    const double* a[kRows];
    for (int64_t i = 0; i < kRows; ++i) a[i] = row(r + i);
    double sum[kRows] = {};
    auto column = [&](int64_t c, int64_t upto) {
      for (int64_t i = 0; i < upto; ++i) sum[i] += a[i][c] * v[c], y[c] += a[i][c] * v[r + i];
    };
    for (int64_t i = 0; i < kRows; ++i) column(r + i, i), sum[i] += a[i][r + i] * v[r + i];
    int64_t c = r + kRows;
    vd wide[kRows] = {};
    for (; c + kHalf <= n; c += kHalf) {
      vd at = load(v + c), to = load(y + c);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) {
        vd s = load(a[i] + c);
        wide[i] += s * at;
        to += s * v[r + i];
      }
      store(y + c, to);
    }
    for (; c < n; ++c) column(c, kRows);
    for (int64_t i = 0; i < kRows; ++i) y[r + i] += sum[i] + sum64(wide[i]);
  }

  // S -= V W^T + W V^T over the rows and columns from `from` on, after `count` reflectors. Tiles that cross the diagonal write
  // below it too, where nobody reads.
  void update_rest(int64_t from, int64_t count, double* left) {
    const int64_t depth = 2 * count;
    auto pack = [&](int64_t at, int64_t width, const Doubles& first, const Doubles& second, double* out) {
      for (int64_t k = 0; k < depth; ++k) {
        const double* line = (k < count ? first.data() + k * n : second.data() + (k - count) * n);
        for (int64_t j = 0; j < width; ++j) *out++ = at + j < n ? line[at + j] : 0;
      }
    };
#pragma omp for nowait
    for (int64_t c = from; c < n; c += kWide) pack(c, kWide, W, V, right.data() + (c - from) * depth);
    meet();
#pragma omp for schedule(dynamic) nowait
    for (int64_t r = from; r < n; r += kMr) {
      const int64_t here = std::min<int64_t>(kMr, n - r);
      pack(r, kMr, V, W, left);
      for (int64_t c = from + (r - from) / kWide * kWide; c < n; c += kWide) {
        const double* packed = right.data() + (c - from) * depth;
        if (here == kMr && c + kWide <= n) {
          micro_kernel(left, packed, kWide, depth, row(r) + c, ld, true, -1.0);
          continue;
        }
        double tile[kMr * kWide] = {};
        micro_kernel(left, packed, kWide, depth, tile, kWide, true, -1.0);
        for (int64_t i = 0; i < here; ++i)
          for (int64_t j = 0; j < std::min<int64_t>(kWide, n - c); ++j) row(r + i)[c + j] += tile[i * kWide + j];
      }
    }
  }
};

}  // namespace

void tridiagonal_reduce_(const Matrix& S, double* diagonal, double* off, double* scales) {
  Reduction(S, diagonal, off, scales).run();
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
