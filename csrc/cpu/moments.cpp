// moments_update: merges batches of rows x [N, D], y [N, T] with weights w into centred second moments, one set per layer,
//
//   S += sum_k w_k (x_k - m)^T (x_k - m) + f d^T d,   C, Q likewise with y,   d = m - mean,   f = n1 n2 / (n1 + n2)
//
// with m the batch's own mean. Rows are centred in fp32 while they are packed, products are fp32 in blocks of kKc rows,
// everything that outlives a tile is fp64. Only tiles that reach the upper triangle of S and Q are computed. A slab of
// rows is packed once for all threads, and once for all layers that have it; each output tile belongs to one job, so
// results depend neither on the number of threads nor on the other layers. Centring uses c = fp32(m); the exact
// -n2 (m - c)^T (m - c) removes what that rounding left.
#include <algorithm>
#include <deque>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr int64_t kGroup = 384;        // columns packed together: a multiple of every kMr and kNr
constexpr int64_t kPackRows = 64;      // rows packed together: a group of them stays in L2 for the second layout
constexpr int64_t kSumRows = 1024;     // rows per partial column sum
constexpr int64_t kSlabBytes = 32 << 20;
constexpr int64_t kTeamBytes = 4 << 20;  // of slabs per thread, packed for layers that are multiplied together
constexpr int64_t kSlabRows = 3 * kKc;  // rows summed in fp32 before the fp64 merge: with all of 65536, twice the error
constexpr int64_t kDot = 192;          // rows summed at a time: with 384 the diagonal's error doubles
constexpr int64_t kBlockPanels = 4;    // B panels a job keeps in L2
constexpr int64_t kAlone = 1 << 16;    // values read, or 32 multiply-adds each, that one thread does sooner than several

// The rows that count: all of them, or those of non-zero weight (the others are never read).
struct Rows {
  const float* given;  // the weights
  int64_t all, n;
  double total;
  std::vector<int64_t> index;
  std::vector<float> weight;

  Rows(int64_t rows, const float* w) : given(w), all(rows), n(rows), total(double(rows)) {
    if (!w) return;
    total = 0;
    for (int64_t k = 0; k < rows; ++k)
      if (w[k] != 0) index.push_back(k), weight.push_back(w[k]), total += w[k];
    n = int64_t(index.size());
  }
};

// An x or a y: its rows, their mean, and the current slab of them, packed.
struct Side {
  Matrix rows;
  const Rows* batch;
  std::vector<double> mean;     // m
  std::vector<float> centre;    // c
  std::vector<double> residue;  // m - c
  bool on_left = false;         // of a product
  float *left = nullptr, *right = nullptr;  // weighted panels of kMr, plain panels of kNr

  Side(const Matrix& given, const Rows& batch)
      : rows(given), batch(&batch), mean(given.cols), centre(given.cols), residue(given.cols) {}

  int64_t left_width() const { return on_left ? round_up(rows.cols, kMr) : 0; }
  int64_t width() const { return left_width() + round_up(rows.cols, kNr); }
};

using Sides = std::vector<Side*>;

// Columns and rows of a side that one thread works on.
struct Part {
  Side* side;
  int64_t column, columns, row, rows;
};

// All columns and rows [begin, end) of the sides, `step` rows at a time; and how many values that is.
std::vector<Part> split(const Sides& sides, int64_t begin, int64_t end, int64_t step, int64_t& values) {
  std::vector<Part> parts;
  values = 0;
  for (Side* side : sides) {
    const int64_t columns = side->rows.cols, last = std::min(end, side->batch->n);
    values += columns * (last - begin);
    for (int64_t row = begin; row < last; row += step)
      for (int64_t column = 0; column < columns; column += kGroup)
        parts.push_back({side, column, std::min(kGroup, columns - column), row, std::min(step, last - row)});
  }
  return parts;
}

void find_means(const Sides& sides) {
  int64_t values;
  const std::vector<Part> parts = split(sides, 0, INT64_MAX, kSumRows, values);
  std::vector<double> partial(parts.size() * kGroup);
#pragma omp parallel for schedule(static) if (values > kAlone)
  for (int64_t unit = 0; unit < int64_t(parts.size()); ++unit) {
    const Part& part = parts[unit];
    const Rows& batch = *part.side->batch;
    double* sums = partial.data() + unit * kGroup;
    with_type(part.side->rows, [&](auto* data) {
      for (int64_t k = part.row; k < part.row + part.rows; ++k) {
        const auto* row = data + (batch.index.empty() ? k : batch.index[k]) * part.side->rows.stride + part.column;
        const double weight = batch.weight.empty() ? 1.0 : batch.weight[k];
        for (int64_t j = 0; j < part.columns; ++j) sums[j] += weight * double(to_float(row[j]));
      }
    });
  }
  for (size_t unit = 0; unit < parts.size(); ++unit)
    for (int64_t j = 0; j < parts[unit].columns; ++j)
      parts[unit].side->mean[parts[unit].column + j] += partial[unit * kGroup + j];
  for (Side* side : sides)
    for (int64_t j = 0; j < side->rows.cols; ++j) {
      const double mean = side->mean[j] /= side->batch->total;
      side->centre[j] = float(mean);
      side->residue[j] = mean - double(side->centre[j]);
    }
}

// Packs rows [begin, begin + depth) of the batch into the sides' panels.
void pack_slab(const Sides& sides, int64_t begin, int64_t depth) {
  int64_t values;
  const std::vector<Part> parts = split(sides, begin, begin + depth, kPackRows, values);
#pragma omp parallel for schedule(dynamic) if (values > kAlone)
  for (int64_t unit = 0; unit < int64_t(parts.size()); ++unit) {
    const Part& part = parts[unit];
    const Side& side = *part.side;
    const int64_t k = part.row - begin;
    with_type(side.rows, [&](auto* data) {
      using T = std::remove_pointer_t<decltype(data)>;
      Operand<T> all{data, 1, side.rows.stride, side.centre.data()};
      if (!side.batch->index.empty()) all.index = side.batch->index.data(), all.weight = side.batch->weight.data();
      for (int64_t j = part.column; side.on_left && j < part.column + part.columns; j += kMr)
        pack_across<kMr>(all.from(j, part.row), side.rows.cols - j, part.rows, side.left + j * depth + k * kMr);
      all.weight = nullptr;
      for (int64_t j = part.column; j < part.column + part.columns; j += kNr)
        pack_across<kNr>(all.from(j, part.row), side.rows.cols - j, part.rows, side.right + j * depth + k * kNr);
    });
  }
}

// A set of moments, and what the batch does to it.
struct Layer {
  MomentsUpdate set;
  Side *x, *y;  // y: null where there is none
  std::vector<double> shift_x, shift_y;  // d
  double merge = 0, share = 0;           // f, n2 / (n1 + n2)

  Layer(const MomentsUpdate& set, Side* x, Side* y) : set(set), x(x), y(y) {
    x->on_left = true;
    if (full_y()) y->on_left = true;
  }

  // Once the sides' means are known.
  void start() {
    const double n1 = count(), n2 = x->batch->total, n = n1 + n2;
    merge = n1 * n2 / n, share = n2 / n;
    shift_x = shift(*x, set.mean_x);
    if (y) shift_y = shift(*y, set.mean_y);
  }

  double& count() const { return *static_cast<double*>(set.count.data); }
  bool full_y() const { return y && set.yy.rows == set.y.cols && set.y.cols > 1; }
  int64_t slab() const {
    const int64_t width = x->width() + (y ? y->width() : 0);
    return std::min({x->batch->n, kSlabRows, std::max<int64_t>(1, kSlabBytes / (4 * width * kKc)) * kKc});
  }

  static std::vector<double> shift(const Side& side, const Matrix& mean) {
    std::vector<double> shift(side.mean);
    for (size_t j = 0; j < shift.size(); ++j) shift[j] -= static_cast<double*>(mean.data)[j];
    return shift;
  }

  void finish() const {
    for (size_t j = 0; j < shift_x.size(); ++j) static_cast<double*>(set.mean_x.data)[j] += shift_x[j] * share;
    for (size_t j = 0; j < shift_y.size(); ++j) static_cast<double*>(set.mean_y.data)[j] += shift_y[j] * share;
    count() += x->batch->total;
  }
};

// out[i, j] (fp64) += a_i . b_j, for all j or for j >= i.
struct Product {
  const Layer* layer;
  const Side *a, *b;
  const double *shift_a, *shift_b;
  double* out;
  bool upper;
};
// A block of a product; without one, the squares of a panel of y.
struct Job {
  const Layer* layer;
  const Product* product;
  int64_t row_begin, row_end, column_begin, column_end;
};

std::vector<Product> products_of(const std::vector<Layer*>& layers) {
  std::vector<Product> products;
  for (const Layer* l : layers) {
    const double *dx = l->shift_x.data(), *dy = l->shift_y.data();
    products.push_back({l, l->x, l->x, dx, dx, static_cast<double*>(l->set.xx.data), true});
    if (l->y) products.push_back({l, l->x, l->y, dx, dy, static_cast<double*>(l->set.xy.data), false});
    if (l->full_y()) products.push_back({l, l->y, l->y, dy, dy, static_cast<double*>(l->set.yy.data), true});
  }
  return products;
}

// Splits the products into jobs that keep a few B panels in L2; small outputs into more jobs than there are threads.
std::vector<Job> plan(const std::vector<Layer*>& layers, const std::vector<Product>& products) {
  std::vector<Job> jobs;
  for (const Layer* layer : layers)
    for (int64_t j = 0; layer->y && !layer->full_y() && j < layer->y->rows.cols; j += kNr)
      jobs.push_back({layer, nullptr, 0, 0, j, std::min(layer->y->rows.cols, j + kNr)});
  for (const Product& p : products) {
    const int64_t m = p.a->rows.cols, n = p.b->rows.cols;
    const bool small = m <= 32 * kMr;
    const int64_t height = small ? kMr : 16 * kMr, width = small ? kNr : kBlockPanels * kNr;
    for (int64_t j = 0; j < n; j += width)
      for (int64_t i = 0; i < m && !(p.upper && i >= j + width); i += height)
        jobs.push_back({p.layer, &p, i, std::min(m, i + height), j, std::min(n, j + width)});
  }
  return jobs;
}

// `merge` and `total` are f and n2 for a batch's first slab, 0 for the others: the rank-one terms go in once.
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
        micro_kernel(p.a->left + i * depth + k * kMr, p.b->right + j * depth + k * kNr, kNr, std::min(kDot, depth - k), tile,
                     kNr, k > 0);
      for (int64_t r = 0; r < rows; ++r) {
        double* out = p.out + (i + r) * columns + j;
        const double shift = merge * p.shift_a[i + r], residue = total * p.a->residue[i + r];
        for (int64_t s = p.upper ? std::max<int64_t>(0, i + r - j) : 0; s < count; ++s)
          out[s] += tile[r * kNr + s] + (shift * p.shift_b[j + s] - residue * p.b->residue[j + s]);
      }
    }
}

// The diagonal alone of Q: squares of one packed panel.
void run_squares(const Job& job, int64_t begin, int64_t depth, double merge, double total) {
  const Side& y = *job.layer->y;
  const double* shift = job.layer->shift_y.data();
  const float* panel = y.right + job.column_begin * depth;
  double sums[kNr] = {}, *out = static_cast<double*>(job.layer->set.yy.data);
  for (int64_t k = 0; k < depth; ++k) {
    const double weight = y.batch->weight.empty() ? 1.0 : y.batch->weight[begin + k];
    for (int s = 0; s < kNr; ++s) sums[s] += weight * panel[k * kNr + s] * panel[k * kNr + s];
  }
  for (int64_t j = job.column_begin; j < job.column_end; ++j)
    out[j] += sums[j - job.column_begin] + merge * shift[j] * shift[j] - total * y.residue[j] * y.residue[j];
}

// Layers that are packed and multiplied together: narrow ones have too few jobs alone for many threads.
struct Team {
  std::vector<Layer*> layers;
  Sides sides;
  int64_t width = 0;

  Team with(Layer& layer) const {
    Team team = *this;
    team.layers.push_back(&layer);
    for (Side* side : {layer.x, layer.y})
      if (side && std::find(team.sides.begin(), team.sides.end(), side) == team.sides.end())
        team.sides.push_back(side), team.width += side->width();
    return team;
  }
};

std::vector<Team> teams_of(std::deque<Layer>& layers) {
  std::vector<Team> teams(1);
  for (Layer& layer : layers) {
    const Team &last = teams.back(), more = last.with(layer);
    const bool fits = 4 * more.width * layer.slab() <= kTeamBytes * omp_get_max_threads();
    const bool alike = last.layers.empty() ||
                       (fits && last.layers[0]->x->batch->n == layer.x->batch->n && last.layers[0]->slab() == layer.slab());
    if (alike) teams.back() = more;
    else teams.push_back(Team().with(layer));
  }
  return teams;
}

void update(const Team& team) {
  const auto& [layers, sides, width] = team;
  const int64_t n = layers[0]->x->batch->n, slab = layers[0]->slab();
  const std::vector<Product> products = products_of(layers);
  const std::vector<Job> jobs = plan(layers, products);
  int64_t multiply_adds = 0;
  for (const Product& p : products) multiply_adds += slab * p.a->rows.cols * p.b->rows.cols;
  const Buffer packed(width * slab);
  for (int64_t begin = 0; begin < n; begin += slab) {
    const int64_t depth = std::min(slab, n - begin);
    float* place = packed.get();
    for (Side* side : sides) {
      side->left = place, side->right = place + side->left_width() * depth;
      place += side->width() * depth;
    }
    pack_slab(sides, begin, depth);
#pragma omp parallel for schedule(dynamic) if (multiply_adds / 32 > kAlone)
    for (int64_t unit = 0; unit < int64_t(jobs.size()); ++unit) {
      const Job& job = jobs[unit];
      const double merge = begin ? 0 : job.layer->merge, total = begin ? 0 : job.layer->x->batch->total;
      if (job.product) run(job, depth, merge, total);
      else run_squares(job, begin, depth, merge, total);
    }
  }
}

// The rows that count and the sides that a call's layers have in common are found once.
const Rows& rows_of(const MomentsUpdate& set, std::deque<Rows>& known) {
  const auto* weight = static_cast<const float*>(set.weight.data);
  for (const Rows& rows : known)
    if (rows.given == weight && rows.all == set.x.rows) return rows;
  return known.emplace_back(set.x.rows, weight);
}
Side* side_of(const Matrix& given, const Rows& batch, std::deque<Side>& known) {
  for (Side& side : known) {
    const Matrix& m = side.rows;
    if (side.batch == &batch && m.data == given.data && m.cols == given.cols && m.stride == given.stride && m.dtype == given.dtype)
      return &side;
  }
  return &known.emplace_back(given, batch);
}

}  // namespace

void moments_update(const std::vector<MomentsUpdate>& sets) {
  std::deque<Rows> batches;
  std::deque<Side> known;
  std::deque<Layer> layers;
  for (const MomentsUpdate& set : sets) {
    const Rows& batch = rows_of(set, batches);
    if (batch.n == 0) continue;
    Side* x = side_of(set.x, batch, known);
    layers.emplace_back(set, x, set.y.data ? side_of(set.y, batch, known) : nullptr);
  }
  if (layers.empty()) return;
  Sides sides;
  for (Side& side : known) sides.push_back(&side);
  find_means(sides);
  for (Layer& layer : layers) layer.start();
  for (const Team& team : teams_of(layers)) update(team);
  for (const Layer& layer : layers) layer.finish();
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
