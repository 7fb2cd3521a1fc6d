// KL between softmaxes over two vocabularies, chunk by chunk, through a sparse projection M; and its gradient. Per chunk c,
// with p_t = softmax(z_t / tau) of its student rows and the teacher columns J (see reference/projection_kl.py):
//
//   a[j] = sum_s pbar[s] M[s, J_j]     r = a / (sum a + eps)     l = log(r + eps)     Q = mean log_softmax(teacher[J] / tau)
//   forward KL = sum exp(Q) (Q - l)    reverse KL = sum (r + eps) (l - Q)    Jensen-Shannon likewise    g = dKL/dr
//   G[j] = (g[j] - sum g r) / (sum a + eps) / n      dKL/dz_t[s] = p_t[s] / tau * (B[s] - sum_s' p_t[s'] B[s']),  B = M[:, J] G
//
// and for a row with a label y, from the same read: nll = -log softmax(z)[y], dnll/dz[s] = softmax(z)[s] - [s = y].
//
// A thread takes a whole chunk: each student row is read from memory once (blocks of exponentials, relative to the maximum
// so far, are kept and rescaled), everything until the gradient's store happens in its cache. M[:, J] is one flat list of
// (row, position in J, weight), sorted by row: rows stream, positions stay in L1.
#include <numeric>
#include <vector>

#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {
namespace {

constexpr float kEps = 1e-10f;
const float kInfinity = std::numeric_limits<float>::infinity();
enum Divergence : int64_t { kForward, kReverse, kJensenShannon };
constexpr int64_t kKeep = 4;  // rows of a chunk whose probabilities stay in cache; longer chunks compute them again

// The first place of the largest of x[0..n), n a multiple of kLanes and below 2^31.
inline int64_t argmax(const float* x, int64_t n) {
  vf best = splat(-kInfinity);
  vi where = {}, now;
  for (int i = 0; i < kLanes; ++i) now[i] = i;
  for (int64_t i = 0; i < n; i += kLanes, now += kLanes) {
    vf v = load(x + i);
    where = v > best ? now : where;
    best = vmax(v, best);
  }
  int lane = 0;
  for (int i = 1; i < kLanes; ++i)
    if (best[i] > best[lane] || (best[i] == best[lane] && where[i] < where[lane])) lane = i;
  return where[lane];
}

struct Edge { int32_t row, position; float weight; };

// M[:, J] by row, within a row by position.
std::vector<Edge> slice(const ProjectionKL& in) {
  std::vector<int32_t> next(in.width + 1, 0);
  for (int64_t j = 0; j < in.k; ++j)
    for (int64_t e = in.start[in.columns[j]]; e < in.start[in.columns[j] + 1]; ++e) ++next[in.rows[e] + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<Edge> edges(next.back());
  for (int64_t j = 0; j < in.k; ++j)
    for (int64_t e = in.start[in.columns[j]]; e < in.start[in.columns[j] + 1]; ++e)
      edges[next[in.rows[e]]++] = {in.rows[e], int32_t(j), in.weights[e]};
  return edges;
}

// out[i] = value(read, i) for i < width and 0 up to head; read(pointer + i) makes a vector, of equal values at the edges.
template <class T, class F>
void write_row(T* out, int64_t width, int64_t head, F value) {
  int64_t i = 0;
  auto one = [&] { from_float(value([](auto* from) { return splat(to_float(*from)); }, i)[0], out[i]); };
  for (; i < width && reinterpret_cast<uintptr_t>(out + i) % 64; ++i) one();
  for (; i + kLanes <= width; i += kLanes) stream(out + i, value([](auto* from) { return load(from); }, i));
  for (; i < width; ++i) one();
  std::fill(out + width, out + head, T{});
}

// What one thread works with.
struct Worker {
  const ProjectionKL& in;
  const ProjectionKLResult& out;
  const std::vector<Edge>& edges;
  const std::vector<int32_t>& columns;
  const float inverse = 1 / in.temperature;
  Scratch p{kKeep + 2, in.width}, small{4, in.k + in.tail}, whole{1, in.tail ? in.vocabulary : 0};
  std::vector<float> maxima = std::vector<float>(ceil_div(in.width, kBlock));  // what each block's exponentials refer to
  float *sums = p.row(kKeep), *back = p.row(kKeep + 1);
  float *a = small.row(0), *Q = small.row(1), *t = small.row(2), *G = small.row(3);
  const float* mean = nullptr;

  void chunk(int64_t c, const Members& student, const Members& teacher) {
    const int64_t n = student.count(c), n_teacher = teacher.count(c);
    const float weight = out.weight ? out.weight[c] : 0;
    if (out.kl) out.kl[c] = 0, out.agree[c] = false;
    if (n == 0 || n_teacher == 0 || (!out.kl && weight == 0)) {
      for (int64_t i = 0; i < n; ++i) lone(student.row(c, i));
      return;
    }
    for (int64_t i = 0; i < n; ++i) add_student(student.row(c, i), i, n);
    std::fill_n(a, small.stride, 0.0f);
    for (const Edge& e : edges) a[e.position] += e.weight * mean[e.row];
    std::fill_n(Q, small.stride, 0.0f);
    for (int64_t i = 0; i < n_teacher; ++i)
      with_type(in.teacher, [&](auto* x) { add_teacher(x + teacher.row(c, i) * in.teacher.stride); });
    compare(float(n), float(n_teacher), weight * inverse, c);
    if (!out.grad.data) return;
    if (weight == 0) {
      for (int64_t i = 0; i < n; ++i) write(student.row(c, i), nullptr);
      return;
    }
    std::fill_n(back, p.stride, 0.0f);
    for (const Edge& e : edges) back[e.row] += e.weight * G[e.position];
    for (int64_t i = n - 1; i >= 0; --i) {
      const int64_t row = student.row(c, i);
      if (i >= kKeep - 1 && i < n - 1)
        with_type(in.student, [&](auto* z) { softmax_known(z + row * in.student.stride, slot(i), row); });
      write(row, slot(i));
    }
  }

  int64_t label(int64_t row) const { return in.labels ? in.labels[row] : -1; }

  // A row that nothing is compared with: it may have a label.
  void lone(int64_t row) {
    if (!out.known) {
      if (label(row) >= 0) with_type(in.student, [&](auto* z) { softmax(z + row * in.student.stride, p.row(0), row); });
      else out.row_max[row] = 0;
      if (in.labels && label(row) < 0) out.nll[row] = out.ce_scale[row] = 0;
      out.row_scale[row] = 0;
    }
    if (out.grad.data) write(row, nullptr);
  }

  // The gradient of a row: e (back - e . back) where e, its probabilities, is there, and its label's part.
  void write(int64_t row, const float* e) {
    const int64_t y = label(row);
    const float w = y >= 0 && out.nll_weight ? out.nll_weight[row] : 0, dot = e ? float(sum_blocks(p.stride, [&](int64_t s) {
      return load(e + s) * load(back + s);
    })) : 0;
    with_type(out.grad, [&](auto* g) {
      const auto* z = static_cast<decltype(g)>(in.student.data) + row * in.student.stride;
      g += row * out.grad.stride;
      if (!e && w == 0) {
        std::memset(g, 0, out.grad.cols * sizeof *g);
        return;
      }
      // Rounded once: the label's part is there before its row is overwritten, and goes last.
      auto finish = [&](auto value) {
        const float at_label = w == 0 ? 0 : value([](auto* from) { return splat(to_float(*from)); }, y)[0] - w;
        write_row(g, in.width, out.grad.cols, value);
        if (w != 0) from_float(at_label, g[y]);
      };
      const float shift = in.temperature == 1 ? dot - w : dot, best = out.row_max[row];
      const float scale = w == 0 ? 0 : w * out.ce_scale[row];
      auto kd = [&](auto read, int64_t i) { return read(e + i) * (read(back + i) - shift); };
      auto ce = [&](auto read, int64_t i) { return exp_nonpositive(read(z + i) - best) * scale; };
      if (!e) finish(ce);
      else if (w == 0 || in.temperature == 1) finish(kd);
      else finish([&](auto read, int64_t i) { return kd(read, i) + ce(read, i); });
    });
  }

  float* slot(int64_t i) const { return p.row(std::min(i, kKeep - 1)); }

  // Row i of n: its probabilities go to slot(i), and into the mean.
  void add_student(int64_t row, int64_t i, int64_t n) {
    float* e = slot(i);
    with_type(in.student, [&](auto* z) {
      if (out.known) softmax_known(z + row * in.student.stride, e, row);
      else softmax(z + row * in.student.stride, e, row);
    });
    mean = n == 1 ? e : sums;
    if (n == 1) return;
    const float share = 1 / (float(n) + kEps);
    for (int64_t s = 0; s < p.stride; s += kLanes)
      store(sums + s, i == 0 ? load(e + s) * share : load(sums + s) + load(e + s) * share);
  }

  template <class T>
  void softmax(const T* z, float* e, int64_t row) {
    const bool apart = label(row) >= 0 && in.temperature != 1;  // the label's sum is another one
    double total = 0, ce_total = 0;
    float best = -FLT_MAX;
    for (int64_t b = 0, from = 0; from < in.width; ++b, from += kBlock) {
      int64_t n = std::min(kBlock, in.width - from), i = 0;
      vf top = splat(best);
      for (; i + kLanes <= n; i += kLanes) top = vmax(load(z + from + i), top);
      float here = max(top);
      for (; i < n; ++i) here = std::max(here, to_float(z[from + i]));
      total *= exp_nonpositive(splat((best - here) * inverse))[0];
      if (apart) ce_total *= exp_nonpositive(splat(best - here))[0];
      maxima[b] = best = here;
      vf part = {};
      for (i = 0; i + kLanes <= n; i += kLanes) {
        vf v = exp_nonpositive((load(z + from + i) - best) * inverse);
        store(e + from + i, v);
        part += v;
      }
      total += sum(part);
      for (; i < n; ++i) total += e[from + i] = exp_nonpositive(splat((to_float(z[from + i]) - best) * inverse))[0];
      if (!apart) continue;
      part = vf{};
      for (i = 0; i + kLanes <= n; i += kLanes) part += exp_nonpositive(load(z + from + i) - best);
      ce_total += sum(part);
      for (; i < n; ++i) ce_total += exp_nonpositive(splat(to_float(z[from + i]) - best))[0];
    }
    out.row_max[row] = best;
    out.row_scale[row] = float(1 / total);
    if (in.labels) {
      const bool labelled = label(row) >= 0;
      if (!apart) ce_total = total;
      out.ce_scale[row] = labelled ? float(1 / ce_total) : 0;
      out.nll[row] = labelled ? float(std::log(ce_total) - (double(to_float(z[label(row)])) - best)) : 0;
    }
    for (int64_t b = 0, from = 0; from < in.width; ++b, from += kBlock) {
      float factor = exp_nonpositive(splat((maxima[b] - best) * inverse))[0] * out.row_scale[row];
      for (int64_t i = from; i < std::min(from + kBlock, in.width); i += kLanes) store(e + i, load(e + i) * factor);
    }
  }

  template <class T>
  void softmax_known(const T* z, float* e, int64_t row) const {
    const float best = out.row_max[row], scale = out.row_scale[row];
    int64_t i = 0;
    for (; i + kLanes <= in.width; i += kLanes) store(e + i, exp_nonpositive((load(z + i) - best) * inverse) * scale);
    for (; i < in.width; ++i) e[i] = exp_nonpositive(splat((to_float(z[i]) - best) * inverse))[0] * scale;
  }

  // Q += log_softmax(x[J] / tau); with the tail, log of the softmax over all of x and of what it gives the others.
  template <class T>
  void add_teacher(const T* x) {
    vf top = splat(-FLT_MAX);
    for (int64_t j = 0; j < in.k; ++j) t[j] = to_float(x[columns[j]]);
    std::fill(t + in.k, t + small.stride, -kInfinity);
    for (int64_t j = 0; j < small.stride; j += kLanes) top = vmax(load(t + j), top);
    float* others = whole.row(0);
    if (in.tail) {
      for (int64_t i = 0; i < in.vocabulary; ++i) others[i] = to_float(x[i]);
      for (int64_t j = 0; j < in.k; ++j) others[columns[j]] = -kInfinity;
      std::fill(others + in.vocabulary, others + whole.stride, -kInfinity);
      for (int64_t i = 0; i < whole.stride; i += kLanes) top = vmax(load(others + i), top);
    }
    const float best = max(top);
    double total = sum_blocks(small.stride, [&](int64_t j) {
      vf v = (load(t + j) - best) * inverse;
      store(t + j, v);
      return exp_nonpositive(v);
    });
    if (in.tail) {
      const double rest =
          sum_blocks(whole.stride, [&](int64_t i) { return exp_nonpositive((load(others + i) - best) * inverse); });
      total += rest;
      Q[in.k] += float(std::log(rest / total + kEps));
    }
    const float lse = float(std::log(total));
    int64_t j = 0;
    for (; j + kLanes <= in.k; j += kLanes) store(Q + j, load(Q + j) + (load(t + j) - lse));
    for (; j < in.k; ++j) Q[j] += t[j] - lse;
  }

  // From a and the sums in Q: the chunk's divergence, whether both sides prefer the same column, and G * factor.
  void compare(float n, float n_teacher, float factor, int64_t c) {
    const float share = 1 / (n_teacher + kEps), floor = log_positive(splat(kEps))[0];
    for (int64_t j = 0; j < small.stride; j += kLanes) store(Q + j, load(Q + j) * share);
    const float tail = in.tail ? Q[in.k] : floor;
    if (out.kl) std::fill(Q + in.k, Q + small.stride, -kInfinity);
    int64_t preferred = out.kl ? argmax(Q, small.stride) : 0;
    std::fill(Q + in.k, Q + small.stride, in.divergence == kJensenShannon ? -kInfinity : floor);  // with a = 0 adds exactly 0
    double sum_a = sum_blocks(small.stride, [&](int64_t j) { return load(a + j); }), sum_q = 0;
    if (in.tail) {
      Q[in.k] = tail;
      a[in.k] = float(std::max(0.0, 1 - sum_a));
      sum_a += a[in.k];
    }
    if (in.divergence == kJensenShannon)
      sum_q = sum_blocks(small.stride, [&](int64_t j) { return exp_nonpositive(load(Q + j)); });
    const float total = float(sum_a) + kEps, total_q = float(sum_q) + kEps;
    double kl = 0;
    const double centre = sum_blocks(small.stride, [&](int64_t j) {
      vf r = load(a + j) / total, q = load(Q + j), g, value;
      if (in.divergence == kReverse) {
        vf l = log_positive(r + kEps);
        value = (r + kEps) * (l - q);
        g = 1.0f + l - q;
      } else if (in.divergence == kForward) {
        vf e = exp_nonpositive(q);
        value = e == vf{} ? vf{} : e * (q - log_positive(r + kEps));
        g = -e / (r + kEps);
      } else {
        vf u = r + kEps, v = exp_nonpositive(q) / total_q + kEps, m = 0.5f * (u + v);
        g = 0.5f * log_positive(u / m);
        value = u * g + 0.5f * v * log_positive(v / m);
      }
      kl += sum(value);
      store(a + j, r);
      store(G + j, g);
      return g * r;
    });
    const float scale = factor / total / (n + kEps), mid = float(centre);
    const float outside = in.tail && a[in.k] > 0 ? G[in.k] : mid;  // the tail shrinks as any column grows
    for (int64_t j = 0; j < small.stride; j += kLanes) store(G + j, (load(G + j) - outside) * scale);
    if (!out.kl) return;
    if (in.tail) a[in.k] = 0;
    out.kl[c] = float(kl);
    out.agree[c] = in.k > 0 && argmax(a, small.stride) == preferred;
  }
};

template <class T>
void raise_maxima(const T* x, int64_t n, float* best) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(best + j, vmax(load(x + j), load(best + j)));
  for (; j < n; ++j) best[j] = std::max(best[j], to_float(x[j]));
}

}  // namespace

void projection_kl(const ProjectionKL& in, const ProjectionKLResult& out) {
  const Members student(in.student_chunk, in.student.rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
  const std::vector<Edge> edges = slice(in);
  const std::vector<int32_t> columns(in.columns, in.columns + in.k);
  if (out.known) prefer_large_pages(out.grad);
#pragma omp parallel
  {
    Worker worker{in, out, edges, columns};
#pragma omp for schedule(dynamic) nowait
    for (int64_t c = 0; c < in.chunks; ++c) worker.chunk(c, student, teacher);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < in.student.rows; ++i)
      if (in.student_chunk[i] < 0) worker.lone(i);
    fence();
  }
}

// The k columns with the largest maxima over the rows kept (null: all), ascending; ties go to the lowest columns.
void top_columns(const Matrix& logits, const uint8_t* keep, int64_t k, int64_t* out) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), logits.rows));
  const int64_t stride = ceil_div(logits.cols, kLanes) * kLanes;
  std::vector<float> best(threads * stride, -std::numeric_limits<float>::infinity());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part)
    for (int64_t i = logits.rows * part / threads; i < logits.rows * (part + 1) / threads; ++i)
      if (!keep || keep[i])
        with_type(logits, [&](auto* x) { raise_maxima(x + i * logits.stride, logits.cols, best.data() + part * stride); });
  for (int64_t part = 1; part < threads; ++part) raise_maxima(best.data() + part * stride, logits.cols, best.data());
  std::vector<int32_t> ids(logits.cols);
  std::iota(ids.begin(), ids.end(), 0);
  auto before = [&](int32_t i, int32_t j) { return best[i] > best[j] || (best[i] == best[j] && i < j); };
  if (k < logits.cols) std::nth_element(ids.begin(), ids.begin() + k, ids.end(), before);
  std::sort(ids.begin(), ids.begin() + k);
  std::copy_n(ids.begin(), k, out);
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
