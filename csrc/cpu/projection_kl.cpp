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
enum Divergence : int64_t { kForward, kReverse, kJensenShannon };
constexpr int64_t kKeep = 4;  // rows of a chunk whose probabilities stay in cache; longer chunks compute them again

// The first place of the largest of x[0..n), n a multiple of kLanes and below 2^31.
inline int64_t argmax(const float* x, int64_t n) {
  vf best = splat(-kInf);
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

// M[:, J] by row, within a row by position: each row's first entry, and the others.
struct Edges {
  std::vector<Edge> first, rest;
  explicit Edges(const ProjectionKL& in) {
    std::vector<int64_t> next(in.width + 1, 0);
    for (int64_t j = 0; j < in.k; ++j)
      for (int64_t e = in.start[in.columns[j]]; e < in.start[in.columns[j] + 1]; ++e) ++next[in.rows[e] + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    std::vector<Edge> all(next.back());
    for (int64_t j = 0; j < in.k; ++j)
      for (int64_t e = in.start[in.columns[j]]; e < in.start[in.columns[j] + 1]; ++e)
        all[next[in.rows[e]]++] = {in.rows[e], int32_t(j), in.weights[e]};
    int64_t filled = 0;
    for (int64_t s = 0, from = 0; s < in.width; from = next[s++]) filled += next[s] > from;
    first.reserve(filled);
    rest.reserve(all.size() - filled);
    for (size_t i = 0; i < all.size(); ++i) (i == 0 || all[i].row != all[i - 1].row ? first : rest).push_back(all[i]);
  }

  // a[J] += x M[:, J]
  void project(const float* x, float* a) const {
    for (const auto* part : {&first, &rest})
      each(*part, [=](const Edge& e) { a[e.position] += e.weight * x[e.row]; });
  }
  // back = M[:, J] G in the rows that have entries; the others are left alone.
  void pull(const float* G, float* back) const {
    each(first, [=](const Edge& e) { back[e.row] = e.weight * G[e.position]; });
    each(rest, [=](const Edge& e) { back[e.row] += e.weight * G[e.position]; });
  }

 private:
  template <class F>
  static void each(const std::vector<Edge>& edges, F f) {
    const Edge *e = edges.data(), *end = e + edges.size();
    for (; end - e >= 4; e += 4) f(e[0]), f(e[1]), f(e[2]), f(e[3]);
    for (; e < end; ++e) f(*e);
  }
};

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
  const Edges& edges;
  const std::vector<int32_t>& columns;
  const float inverse = 1 / in.temperature;
  Scratch p{kKeep + 2, in.width}, small{4, in.k + in.tail}, whole{1, in.tail ? in.vocabulary : 0};
  Ahead ahead{in.columns, in.k, in.teacher};
  float *sums = p.row(kKeep), *back = p.row(kKeep + 1);
  float *a = small.row(0), *Q = small.row(1), *t = small.row(2), *G = small.row(3);
  float lse = 0, tail = 0;

  Worker(const ProjectionKL& in, const ProjectionKLResult& out, const Edges& edges, const std::vector<int32_t>& columns)
      : in(in), out(out), edges(edges), columns(columns) {
    std::fill_n(back, p.stride, 0.0f);
  }

  void chunk(int64_t c, const Members& student, const Members& teacher) {
    const int64_t n = student.count(c), n_teacher = teacher.count(c);
    const float weight = out.weight ? out.weight[c] : 0;
    if (out.kl) out.kl[c] = 0, out.agree[c] = false;
    if (n == 0 || n_teacher == 0 || (!out.kl && weight == 0)) {
      for (int64_t i = 0; i < n; ++i) lone(student.row(c, i));
      return;
    }
    std::fill_n(a, small.stride, 0.0f);
    ahead.clear();
    for (int64_t i = 0; i < n_teacher; ++i) ahead.add(teacher.row(c, i));
    for (int64_t i = 0; i < n; ++i) add_student(student.row(c, i), i, n);
    edges.project(n == 1 ? slot(0) : sums, a);
    if (n == 1)
      for (int64_t j = 0; j < small.stride; j += kLanes) store(a + j, load(a + j) * out.row_scale[student.row(c, 0)]);
    std::fill_n(Q, small.stride, 0.0f);
    lse = tail = 0;
    for (int64_t i = 0; i < n_teacher; ++i)
      with_type(in.teacher, [&](auto* x) { add_teacher(x + teacher.row(c, i) * in.teacher.stride); });
    compare(float(n), float(n_teacher), weight * inverse, c);
    if (!out.grad.data) return;
    if (weight == 0) {
      for (int64_t i = 0; i < n; ++i) write(student.row(c, i), nullptr);
      return;
    }
    edges.pull(G, back);
    for (int64_t i = n - 1; i >= 0; --i) {
      const int64_t row = student.row(c, i);
      if (i >= kKeep - 1 && i < n - 1) exponentials(row, slot(i), out.row_max[row], inverse);
      write(row, slot(i));
    }
  }

  int64_t label(int64_t row) const { return in.labels ? in.labels[row] : -1; }

  // A row that nothing is compared with: it may have a label.
  void lone(int64_t row) {
    if (!out.known) {
      if (label(row) >= 0) softmax(row, p.row(0));
      else if (in.labels) out.row_max[row] = out.nll[row] = out.ce_scale[row] = 0;
      else out.row_max[row] = 0;
      out.row_scale[row] = 0;
    }
    if (out.grad.data) write(row, nullptr);
  }

  // The gradient of a row: p (back - p . back), with p = e row_scale, where its exponentials e are there; and its label's.
  void write(int64_t row, const float* e) {
    const int64_t y = label(row);
    const float w = y >= 0 && out.nll_weight ? out.nll_weight[row] : 0, scale = out.row_scale[row];
    const float dot = e ? scale * float(sum_blocks(p.stride, [&](int64_t s) { return load(e + s) * load(back + s); })) : 0;
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
      const float ce_scale = w == 0 ? 0 : w * out.ce_scale[row];
      auto kd = [&](auto read, int64_t i) { return read(e + i) * scale * (read(back + i) - shift); };
      auto ce = [&](auto read, int64_t i) { return exp_nonpositive(read(z + i) - best) * ce_scale; };
      if (!e) finish(ce);
      else if (w == 0 || in.temperature == 1) finish(kd);
      else finish([&](auto read, int64_t i) { return kd(read, i) + ce(read, i); });
    });
  }

  float* slot(int64_t i) const { return p.row(std::min(i, kKeep - 1)); }

  // Row i of n: its exponentials go to slot(i), and into the mean where it is not the only one.
  void add_student(int64_t row, int64_t i, int64_t n) {
    float* e = slot(i);
    if (out.known) exponentials(row, e, out.row_max[row], inverse);
    else softmax(row, e);
    if (n == 1) return;
    const float share = out.row_scale[row] / (float(n) + kEps);
    float* const to = sums;
    if (i == 0)
      for (int64_t s = 0; s < p.stride; s += kLanes) store(to + s, load(e + s) * share);
    else
      for (int64_t s = 0; s < p.stride; s += kLanes) store(to + s, load(to + s) + load(e + s) * share);
  }

  // e = exp((z - max) / tau), the row's numbers, and what is known of its label.
  void softmax(int64_t row, float* e) {
    const int64_t y = label(row);
    float best = 0, at_label = 0;
    with_type(in.student, [&](auto* z) {
      z += row * in.student.stride;
      best = largest(z, in.width);
      if (y >= 0) at_label = to_float(z[y]);
    });
    out.row_max[row] = best;
    const double total = exponentials(row, e, best, inverse);
    out.row_scale[row] = float(1 / total);
    if (!in.labels) return;
    const double ce_total = y < 0 || in.temperature == 1 ? total : exponentials(row, nullptr, best, 1);
    out.ce_scale[row] = y < 0 ? 0 : float(1 / ce_total);
    out.nll[row] = y < 0 ? 0 : float(std::log(ce_total) - (double(at_label) - best));
  }

  // sum exp((z - best) inverse) over a row; the terms go to e where it is there.
  double exponentials(int64_t row, float* e, float best, float inverse) {
    double total = 0;
    with_type(in.student, [&](auto* z) {
      z += row * in.student.stride;
      const int64_t whole = in.width / kLanes * kLanes;
      auto run = [&](auto keep) {
        total = sum_blocks(whole, [&](int64_t s) { return keep(s, exp_nonpositive((load(z + s) - best) * inverse)); });
      };
      if (e) run([&](int64_t s, vf v) { ahead.step(); store(e + s, v); return v; });
      else run([&](int64_t, vf v) { return v; });
      for (int64_t s = whole; s < in.width; ++s) {
        const float v = exp_nonpositive(splat((to_float(z[s]) - best) * inverse))[0];
        if (e) e[s] = v;
        total += v;
      }
    });
    return total;
  }

  // Q - lse += log_softmax(x[J] / tau); with the tail, log of the softmax over all of x, and tail += what it gives the others.
  template <class T>
  void add_teacher(const T* x) {
    vf top = splat(-FLT_MAX);
    for (int64_t j = 0; j < in.k; ++j) t[j] = to_float(x[columns[j]]);
    std::fill(t + in.k, t + small.stride, -kInf);
    for (int64_t j = 0; j < small.stride; j += kLanes) top = vmax(load(t + j), top);
    float* others = whole.row(0);
    if (in.tail) {
      for (int64_t i = 0; i < in.vocabulary; ++i) others[i] = to_float(x[i]);
      for (int64_t j = 0; j < in.k; ++j) others[columns[j]] = -kInf;
      std::fill(others + in.vocabulary, others + whole.stride, -kInf);
      for (int64_t i = 0; i < whole.stride; i += kLanes) top = vmax(load(others + i), top);
    }
    const float best = max(top);
    double total = sum_blocks(small.stride, [&](int64_t j) {
      vf v = (load(t + j) - best) * inverse;
      store(Q + j, load(Q + j) + v);
      return exp_nonpositive(v);
    });
    if (in.tail) {
      const double rest =
          sum_blocks(whole.stride, [&](int64_t i) { return exp_nonpositive((load(others + i) - best) * inverse); });
      total += rest;
      tail += float(std::log(rest / total + kEps));
    }
    lse += float(std::log(total));
  }

  // From a and the sums in Q: the chunk's divergence, whether both sides prefer the same column, and G * factor.
  void compare(float n, float n_teacher, float factor, int64_t c) {
    const float share = 1 / (n_teacher + kEps), floor = log_positive(splat(kEps))[0];
    for (int64_t j = 0; j < small.stride; j += kLanes) store(Q + j, (load(Q + j) - lse) * share);
    if (out.kl) std::fill(Q + in.k, Q + small.stride, -kInf);
    int64_t preferred = out.kl ? argmax(Q, small.stride) : 0;
    std::fill(Q + in.k, Q + small.stride, in.divergence == kJensenShannon ? -kInf : floor);  // with a = 0 adds exactly 0
    double sum_a = sum_blocks(small.stride, [&](int64_t j) { return load(a + j); }), sum_q = 0;
    if (in.tail) {
      Q[in.k] = tail * share;
      a[in.k] = float(std::max(0.0, 1 - sum_a));
      sum_a += a[in.k];
    }
    if (in.divergence == kJensenShannon)
      sum_q = sum_blocks(small.stride, [&](int64_t j) { return exp_nonpositive(load(Q + j)); });
    const float total = float(sum_a) + kEps, total_q = float(sum_q) + kEps;
    vf values = {};
    double kl = 0;
    const double centre = sum_blocks(small.stride, [&](int64_t j) {
      vf r = load(a + j) / total, q = load(Q + j), g, value;
      if (in.divergence == kReverse) {
        vf l = log_positive(r + kEps);
        value = (r + kEps) * (l - q);
        g = 1.0f + l - q;
      } else if (in.divergence == kForward) {
        vf e = exp_nonpositive(q);
        value = out.kl ? (e == vf{} ? vf{} : e * (q - log_positive(r + kEps))) : vf{};
        g = -e / (r + kEps);
      } else {
        vf u = r + kEps, v = exp_nonpositive(q) / total_q + kEps, m = 0.5f * (u + v);
        g = 0.5f * log_positive(u / m);
        value = u * g + 0.5f * v * log_positive(v / m);
      }
      values += value;
      if ((j + kLanes) % kBlock == 0 || j + kLanes == small.stride) kl += sum(values), values = vf{};
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

}  // namespace

void projection_kl(const ProjectionKL& in, const ProjectionKLResult& out) {
  const Members student(in.student_chunk, in.student.rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
  const Edges edges(in);
  const std::vector<int32_t> columns(in.columns, in.columns + in.k);
#pragma omp parallel
  {
    Worker worker(in, out, edges, columns);
    // Forward from the last chunk, backward from the first: what was read last may still be in a cache.
#pragma omp for schedule(dynamic) nowait
    for (int64_t c = 0; c < in.chunks; ++c) worker.chunk(out.known ? c : in.chunks - 1 - c, student, teacher);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < in.student.rows; ++i)
      if (in.student_chunk[i] < 0) worker.lone(i);
    fence();
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
