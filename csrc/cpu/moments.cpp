// moments_update: merges a batch of rows x [N, D], y [N, T] with weights w into centred second moments,
//
//   S += sum_k w_k (x_k - m)^T (x_k - m) + f d^T d,   C, Q likewise with y,   d = m - mean,   f = n1 n2 / (n1 + n2)
//
// with m the batch's own mean. Rows are centred in fp32 while they are packed, products are fp32 in blocks of kKc rows,
// everything that outlives a tile is fp64. Only tiles that reach the upper triangle of S and Q are computed. A slab of
// rows is packed once and shared by all threads; each output tile belongs to one job, so results do not depend on the
// number of threads. Centring uses c = fp32(m); the exact -n2 (m - c)^T (m - c) removes what that rounding left.
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/ops.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kGroup = 384;        // columns packed together: a multiple of every kMr and kNr
constexpr int64_t kPackRows = 64;      // rows packed together: a group of them stays in L2 for the second layout
constexpr int64_t kSumRows = 1024;     // rows per partial column sum
constexpr int64_t kSlabBytes = 32 << 20;
constexpr int64_t kSlabRows = 3 * kKc;  // rows summed in fp32 before the fp64 merge: with all of 65536, twice the error
constexpr int64_t kDot = 192;          // rows summed at a time: with 384 the diagonal's error doubles
constexpr int64_t kBlockPanels = 4;    // B panels a job keeps in L2
constexpr int64_t kAlone = 1 << 16;    // values read, or 32 multiply-adds each, that one thread does sooner than several

using Buffer = std::unique_ptr<float, decltype(&std::free)>;
Buffer allocate(int64_t floats) {
  void* p = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(floats, 1) * 4, 64)));
  if (!p) throw std::bad_alloc();
  return {static_cast<float*>(p), &std::free};
}

// The rows that count: all of them, or those of non-zero weight (the others are never read).
struct Rows {
  int64_t n;
  double total;
  std::vector<int64_t> index;
  std::vector<float> weight;

  Rows(int64_t rows, const float* w) : n(rows), total(double(rows)) {
    if (!w) return;
    total = 0;
    for (int64_t k = 0; k < rows; ++k)
      if (w[k] != 0) index.push_back(k), weight.push_back(w[k]), total += w[k];
    n = int64_t(index.size());
  }
};

// x or y: its rows, what the batch changes in its mean, and the current slab of packed rows.
struct Side {
  Matrix rows;
  double* mean;
  std::vector<float> centre;              // c
  std::vector<double> shift, residue;     // d, m - c
  float *left = nullptr, *right = nullptr;  // weighted panels of kMr, plain panels of kNr

  Side(const Matrix& given, const Matrix& state)
      : rows(given), mean(static_cast<double*>(state.data)), centre(given.cols), shift(given.cols), residue(given.cols) {}

  template <class Use>
  void typed(Use use) const {
    if (rows.dtype == DType::bf16) use(static_cast<const bf16*>(rows.data));
    else if (rows.dtype == DType::fp16) use(static_cast<const fp16*>(rows.data));
    else use(static_cast<const float*>(rows.data));
  }
};

void find_means(Side& side, const Rows& rows) {
  const int64_t columns = side.rows.cols, chunks = (rows.n + kSumRows - 1) / kSumRows;
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  std::vector<double> partial(chunks * columns);
  side.typed([&](auto* data) {
#pragma omp parallel for schedule(static) if (rows.n * columns > kAlone)
    for (int64_t unit = 0; unit < chunks * groups; ++unit) {
      const int64_t chunk = unit / groups, first = unit % groups * kGroup, count = std::min(kGroup, columns - first);
      double* sums = partial.data() + chunk * columns + first;
      for (int64_t k = chunk * kSumRows; k < std::min(rows.n, (chunk + 1) * kSumRows); ++k) {
        const auto* row = data + (rows.index.empty() ? k : rows.index[k]) * side.rows.stride + first;
        const double weight = rows.weight.empty() ? 1.0 : rows.weight[k];
        for (int64_t j = 0; j < count; ++j) sums[j] += weight * double(to_float(row[j]));
      }
    }
  });
  for (int64_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + j];
    const double mean = sum / rows.total;
    side.centre[j] = float(mean);
    side.shift[j] = mean - side.mean[j];
    side.residue[j] = mean - double(side.centre[j]);
  }
}

// Packs rows [begin, begin + depth) of the batch into side.left (if wanted) and side.right.
void pack_slab(const Side& side, const Rows& rows, int64_t begin, int64_t depth) {
  const int64_t columns = side.rows.cols, groups = (columns + kGroup - 1) / kGroup;
  const int64_t chunks = (depth + kPackRows - 1) / kPackRows;
  side.typed([&](auto* data) {
    Operand<std::remove_const_t<std::remove_pointer_t<decltype(data)>>> all{data, 1, side.rows.stride, side.centre.data()};
    if (!rows.index.empty()) all.index = rows.index.data(), all.weight = rows.weight.data();
#pragma omp parallel for schedule(dynamic) if (depth * columns > kAlone)
    for (int64_t unit = 0; unit < chunks * groups; ++unit) {
      const int64_t k = unit / groups * kPackRows, count = std::min(kPackRows, depth - k);
      const int64_t first = unit % groups * kGroup, last = std::min(columns, first + kGroup);
      for (int64_t j = first; side.left && j < last; j += kMr)
        pack_across<kMr>(all.from(j, begin + k), columns - j, count, side.left + j * depth + k * kMr);
      for (int64_t j = first; j < last; j += kNr) {
        auto plain = all.from(j, begin + k);
        plain.weight = nullptr;
        pack_across<kNr>(plain, columns - j, count, side.right + j * depth + k * kNr);
      }
    }
  });
}

// out[i, j] (fp64) += a_i . b_j, for all j or for j >= i.
struct Product {
  const Side *a, *b;
  double* out;
  bool upper;
};
struct Job {
  const Product* product;
  int64_t row_begin, row_end, column_begin, column_end;
};

// Splits the products into jobs that keep a few B panels in L2; small outputs into more jobs than there are threads.
std::vector<Job> plan(const std::vector<Product>& products) {
  std::vector<Job> jobs;
  for (const Product& p : products) {
    const int64_t m = p.a->rows.cols, n = p.b->rows.cols;
    const bool small = m <= 32 * kMr;
    const int64_t height = small ? kMr : 16 * kMr, width = small ? kNr : kBlockPanels * kNr;
    for (int64_t j = 0; j < n; j += width)
      for (int64_t i = 0; i < m && !(p.upper && i >= j + width); i += height)
        jobs.push_back({&p, i, std::min(m, i + height), j, std::min(n, j + width)});
  }
  return jobs;
}

void run(const Job& job, int64_t depth, double merge, double total) {
  const Product& p = *job.product;
  const int64_t columns = p.b->rows.cols;
  alignas(64) float tile[kMr * kNr];
  for (int64_t i = job.row_begin; i < job.row_end; i += kMr)
    for (int64_t j = job.column_begin; j < job.column_end; j += kNr) {
      if (p.upper && j + kNr <= i) continue;
      const int64_t rows = std::min<int64_t>(kMr, job.row_end - i), count = std::min<int64_t>(kNr, columns - j);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < count; s += 8) __builtin_prefetch(p.out + (i + r) * columns + j + s, 1);
      for (int64_t k = 0; k < depth; k += kDot)
        micro_kernel(p.a->left + i * depth + k * kMr, p.b->right + j * depth + k * kNr, std::min(kDot, depth - k), tile,
                     kNr, k > 0);
      for (int64_t r = 0; r < rows; ++r) {
        double* out = p.out + (i + r) * columns + j;
        const double shift = merge * p.a->shift[i + r], residue = total * p.a->residue[i + r];
        for (int64_t s = p.upper ? std::max<int64_t>(0, i + r - j) : 0; s < count; ++s)
          out[s] += tile[r * kNr + s] + (shift * p.b->shift[j + s] - residue * p.b->residue[j + s]);
      }
    }
}

// The diagonal alone of Q: squares of one packed panel.
void run_squares(const Side& y, const Rows& rows, int64_t j, int64_t begin, int64_t depth, double merge, double total,
                 double* out) {
  const float* panel = y.right + j * depth;
  double sums[kNr] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const double weight = rows.weight.empty() ? 1.0 : rows.weight[begin + k];
    for (int s = 0; s < kNr; ++s) sums[s] += weight * panel[k * kNr + s] * panel[k * kNr + s];
  }
  for (int64_t s = 0; s < std::min<int64_t>(kNr, y.rows.cols - j); ++s)
    out[j + s] += sums[s] + merge * y.shift[j + s] * y.shift[j + s] - total * y.residue[j + s] * y.residue[j + s];
}

}  // namespace

void moments_update(const Matrix& count, const Matrix& mean_x, const Matrix& xx, const Matrix& mean_y, const Matrix& xy,
                    const Matrix& yy, const Matrix& x, const Matrix& y, const Matrix& weight) {
  const Rows rows(x.rows, static_cast<const float*>(weight.data));
  if (rows.n == 0) return;
  double& n1 = *static_cast<double*>(count.data);
  const double n = n1 + rows.total;
  const bool full_y = y.data && yy.rows == y.cols && y.cols > 1;

  Side side_x(x, mean_x), side_y(y, mean_y);
  find_means(side_x, rows);
  if (y.data) find_means(side_y, rows);
  std::vector<Product> products{{&side_x, &side_x, static_cast<double*>(xx.data), true}};
  if (y.data) products.push_back({&side_x, &side_y, static_cast<double*>(xy.data), false});
  if (full_y) products.push_back({&side_y, &side_y, static_cast<double*>(yy.data), true});
  const std::vector<Job> jobs = plan(products);
  const int64_t squares = y.data && !full_y ? (y.cols + kNr - 1) / kNr : 0;

  const int64_t left_x = round_up(x.cols, kMr), right_x = round_up(x.cols, kNr);
  const int64_t left_y = full_y ? round_up(y.cols, kMr) : 0, right_y = round_up(y.cols, kNr);
  const int64_t width = left_x + right_x + left_y + right_y;
  const int64_t fitting = std::max<int64_t>(1, kSlabBytes / (4 * width * kKc)) * kKc;
  const int64_t slab = std::min({rows.n, kSlabRows, fitting});
  const Buffer packed = allocate(width * slab);
  for (int64_t begin = 0; begin < rows.n; begin += slab) {
    const int64_t depth = std::min(slab, rows.n - begin);
    side_x.right = packed.get();
    side_y.right = side_x.right + right_x * depth;
    side_x.left = side_y.right + right_y * depth;
    if (full_y) side_y.left = side_x.left + left_x * depth;
    pack_slab(side_x, rows, begin, depth);
    if (y.data) pack_slab(side_y, rows, begin, depth);

    // The rank-one terms belong to the batch, not to a slab: they go in once.
    const double merge = begin ? 0 : n1 * rows.total / n, total = begin ? 0 : rows.total;
#pragma omp parallel for schedule(dynamic) if (depth * x.cols * (x.cols + y.cols) / 32 > kAlone)
    for (int64_t unit = 0; unit < int64_t(jobs.size()) + squares; ++unit) {
      if (unit < squares)
        run_squares(side_y, rows, unit * kNr, begin, depth, merge, total, static_cast<double*>(yy.data));
      else
        run(jobs[unit - squares], depth, merge, total);
    }
  }
  for (Side* side : {&side_x, &side_y})
    for (int64_t j = 0; j < side->rows.cols; ++j) side->mean[j] += side->shift[j] * (rows.total / n);
  n1 = n;
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
