// KL between softmaxes over two vocabularies, chunk by chunk, through a sparse projection M; and its gradient. Per chunk c,
// with p_t = softmax(z_t / tau) of its student rows and the teacher columns J (see reference/projection_kl.py):
//
//   a[j] = sum_s pbar[s] M[s, J_j]     r = a / (sum a + eps)     l = log(r + eps)     Q = mean log_softmax(teacher[J] / tau)
//   forward KL = sum exp(Q) (Q - l)    reverse KL = sum (r + eps) (l - Q)    Jensen-Shannon likewise    g = dKL/dr
//   G[j] = (g[j] - sum g r) / (sum a + eps) / n      dKL/dz_t[s] = p_t[s] / tau * (B[s] - sum_s' p_t[s'] B[s']),  B = M[:, J] G
//
// and for a row with a label y, from the same read: nll = -log softmax(z)[y], dnll/dz[s] = softmax(z)[s] - [s = y].
//
// A block takes a whole chunk and reads each student row from memory once, for (max, sum). What follows looks only at the
// tokens that have entries in J, whose mean probabilities, and B after them, stay in shared memory beside a, Q and G; the
// gradient's pass runs from the row's end, where its logits are still in the second-level cache. Both products with M gather
// in a fixed order, so that no sum depends on the order in which threads run. Items are dealt out by a counter.
#include "cuda/rows.h"
#include "cuda/slice.h"

namespace chassis {
namespace cuda {
namespace {

enum Divergence : int { kForward, kReverse, kJensenShannon };
constexpr float kEps = 1e-10f;
constexpr int kReduction = 64;  // floats for block reductions, at the start of shared memory
static_assert(kThreads / 32 * sizeof(double) <= kReduction * sizeof(float));
constexpr int kHeavy = 32;  // entries from which a whole warp takes a teacher token

__device__ inline float* on_chip() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<float*>(shared_memory);
}

template <class T>
struct Block {
  const ProjectionKL& in;
  const ProjectionKLResult& out;
  float *reduction, *a, *Q;  // a and Q [outcomes]; after compare() Q holds G
  float* means;              // [touched] mean probabilities, then B; null where they do not fit
  int touched;
  float inverse, to_exp2;  // 1 / tau; exp(x / tau) = exp2(x to_exp2)

  __device__ const T* logits(int64_t row) const { return static_cast<const T*>(in.student.data) + row * in.student.stride; }
  __device__ T* gradient(int64_t row) const { return static_cast<T*>(out.grad.data) + row * out.grad.stride; }
  __device__ int width() const { return int(in.slice.width); }
  __device__ int k() const { return int(in.slice.k); }
  __device__ int outcomes() const { return k() + in.tail; }
  template <class X>
  __device__ X sum(X x) const { return reduce(x, Sum(), reduction); }
  __device__ bool labelled(int64_t row) const { return in.labels && in.labels[row] >= 0; }
  __device__ float probability(int64_t row, int s) const {
    return exp2f((to_float(logits(row)[s]) - out.row_max[row]) * to_exp2) * out.row_scale[row];
  }

  // A row's maximum and sums, and -log softmax(z)[label]; zeros for what a row has no use for.
  __device__ void statistics(int64_t row, bool compared) const {
    const bool label = labelled(row), apart = label && to_exp2 != kLog2e;
    float best = -FLT_MAX, total = 0, total_ce = 0;
    if (compared || label)
      for_packs<false, 4>(logits(row), width(), [&](int, const auto& x) {
        float top = x[0];
        for (float v : x) top = fmaxf(top, v);
        if (top > best) {
          total *= exp2f((best - top) * to_exp2);
          if (apart) total_ce *= exp2f((best - top) * kLog2e);
          best = top;
        }
        float part = 0, part_ce = 0;
        for (float v : x) part += exp2f((v - best) * to_exp2);
        if (apart)
          for (float v : x) part_ce += exp2f((v - best) * kLog2e);
        total += part;
        total_ce += part_ce;
      });
    const float top = reduce(best, Max(), reduction);
    total = sum(total * exp2f((best - top) * to_exp2));
    total_ce = apart ? sum(total_ce * exp2f((best - top) * kLog2e)) : total;
    if (threadIdx.x > 0) return;
    out.row_max[row] = compared || label ? top : 0;
    out.row_scale[row] = compared ? 1 / total : 0;
    if (!in.labels) return;
    out.ce_scale[row] = label ? 1 / total_ce : 0;
    out.nll[row] = label ? logf(total_ce) - (to_float(logits(row)[in.labels[row]]) - top) : 0;
  }

  // Mean over n rows of p[s].
  __device__ float mean(const int64_t* rows, int n, int s) const {
    float total = 0;
    for (int i = 0; i < n; ++i) total += probability(rows[i], s);
    return total / (n + kEps);
  }
  __device__ float project_back(int u) const {
    float b = 0;
    for (int32_t i = in.slice.begin[u]; i < in.slice.begin[u + 1]; ++i)
      b += in.slice.entries[i].weight * Q[in.slice.entries[i].position];
    return b;
  }

  // a = M[:, J]^T pbar. Thread j sums column j; a column with many entries is summed by its whole warp.
  __device__ void project(const int64_t* rows, int n) const {
    const Slice& m = in.slice;
    if (means)
      for (int u = threadIdx.x; u < touched; u += blockDim.x) means[u] = mean(rows, n, m.ids[u]);
    __syncthreads();
    auto term = [&](int64_t e) { return m.weights[e] * (means ? means[m.slot[e]] : mean(rows, n, m.rows[e])); };
    const int lane = threadIdx.x % 32;
    for (int from = threadIdx.x - lane; from < k(); from += blockDim.x) {
      const int j = from + lane;
      const int64_t first = j < k() ? m.start[m.columns[j]] : 0, last = j < k() ? m.start[m.columns[j] + 1] : 0;
      float total = 0;
      if (last - first < kHeavy)
        for (int64_t e = first; e < last; ++e) total += term(e);
      for (uint32_t heavy = __ballot_sync(kAll, last - first >= kHeavy); heavy; heavy &= heavy - 1) {
        const int owner = __ffs(heavy) - 1;
        const int64_t end = __shfl_sync(kAll, last, owner);
        float part = 0;
        for (int64_t e = __shfl_sync(kAll, first, owner) + lane; e < end; e += 32) part += term(e);
        for (int step = 16; step; step /= 2) part += __shfl_xor_sync(kAll, part, step);
        if (lane == owner) total = part;
      }
      if (j < k()) a[j] = total;
    }
  }

  // Q = mean over n rows of log_softmax(teacher[J] / tau); with the tail, log of the softmax over all tokens and of what it
  // gives those outside J. Here and in compare() a thread writes and reads only its own outcomes.
  __device__ void teacher(const int64_t* rows, int n) const {
    const Slice& m = in.slice;
    const int read = in.tail ? int(in.vocabulary) : k();
    for (int j = threadIdx.x; j < outcomes(); j += blockDim.x) Q[j] = 0;
    for (int i = 0; i < n; ++i) {
      float best = -FLT_MAX, total = 0, rest = 0;
      auto logit = [&](int j) { return value(in.teacher, rows[i], in.tail ? j : m.columns[j]); };
      for (int j = threadIdx.x; j < read; j += blockDim.x) best = fmaxf(best, logit(j));
      best = reduce(best, Max(), reduction);
      for (int j = threadIdx.x; j < read; j += blockDim.x) {
        const float e = exp2f((logit(j) - best) * to_exp2);
        (in.tail && !(m.chosen[j / 32] >> j % 32 & 1) ? rest : total) += e;
      }
      rest = sum(rest);
      total = sum(total) + rest;
      const float log_total = logf(total);
      for (int j = threadIdx.x; j < k(); j += blockDim.x)
        Q[j] += (value(in.teacher, rows[i], m.columns[j]) - best) * inverse - log_total;
      if (in.tail && threadIdx.x == k() % blockDim.x) Q[k()] += logf(rest / total + kEps);
    }
    for (int j = threadIdx.x; j < outcomes(); j += blockDim.x) Q[j] /= n + kEps;
  }

  // The place, as given, of the largest of f(j) over J; the first of equals.
  template <class F>
  __device__ int argmax(F f) const {
    float best = -INFINITY;
    int place = INT32_MAX;
    for (int j = threadIdx.x; j < k(); j += blockDim.x) best = fmaxf(best, f(j));
    best = reduce(best, Max(), reduction);
    for (int j = threadIdx.x; j < k(); j += blockDim.x)
      if (f(j) == best) place = min(place, in.slice.place[j]);
    return reduce(place, Min(), reduction);
  }

  // From a and Q: the chunk's divergence, whether both sides prefer the same column, and G * factor in place of Q.
  __device__ void compare(int n, float factor, int64_t c) const {
    const int k = this->k();
    double sum_a = 0;
    for (int j = threadIdx.x; j < k; j += blockDim.x) sum_a += a[j];
    sum_a = sum(sum_a);
    const float outside = in.tail ? fmaxf(0.0f, float(1 - sum_a)) : 0, total = float(sum_a) + outside + kEps;
    if (in.tail && threadIdx.x == k % blockDim.x) a[k] = outside;
    if (out.kl) {
      const bool agree = k > 0 && argmax([&](int j) { return a[j] / total; }) == argmax([&](int j) { return Q[j]; });
      if (threadIdx.x == 0) out.agree[c] = agree;
    }
    float sum_q = 0, kl = 0, centre = 0;
    if (in.divergence == kJensenShannon) {
      for (int j = threadIdx.x; j < outcomes(); j += blockDim.x) sum_q += expf(Q[j]);
      sum_q = sum(sum_q) + kEps;
    }
    for (int j = threadIdx.x; j < outcomes(); j += blockDim.x) {
      const float r = a[j] / total, u = r + kEps, q = Q[j], e = expf(q);
      float g;
      if (in.divergence == kForward) {
        kl += e == 0 ? 0 : e * (q - logf(u));
        g = -e / u;
      } else if (in.divergence == kReverse) {
        const float l = logf(u);
        kl += u * (l - q);
        g = 1 + l - q;
      } else {
        const float v = e / sum_q + kEps, m = 0.5f * (u + v);
        g = 0.5f * logf(u / m);
        kl += u * g + 0.5f * v * logf(v / m);
      }
      centre += g * r;
      Q[j] = g;
    }
    kl = sum(kl);
    if (out.kl && threadIdx.x == 0) out.kl[c] = kl;
    if (!out.grad.data) return;
    centre = sum(centre);  // its barriers also make Q[k] everyone's
    const float shift = outside > 0 ? Q[k] : centre, scale = factor / total / (n + kEps);  // the tail shrinks as a grows
    for (int j = threadIdx.x; j < k; j += blockDim.x) Q[j] = (Q[j] - shift) * scale;
    __syncthreads();
    for (int j = threadIdx.x; j < k; j += blockDim.x)
      if (first_of_equals(in.slice, j))
        for (int i = j + 1; i < k && in.slice.columns[i] == in.slice.columns[j]; ++i) Q[j] += Q[i];
    __syncthreads();
  }

  // n student rows against n_teacher teacher rows. c < 0: rows of no chunk, which may have labels.
  __device__ void chunk(int64_t c, const int64_t* rows, int n, const int64_t* teacher_rows, int n_teacher) const {
    const float weight = c >= 0 && out.weight ? out.weight[c] : 0;
    const bool compared = n > 0 && n_teacher > 0 && (out.kl || weight != 0), back = compared && weight != 0;
    if (!out.known)
      for (int i = 0; i < n; ++i) statistics(rows[i], compared);
    __syncthreads();
    if (compared) {
      project(rows, n);
      teacher(teacher_rows, n_teacher);
      compare(n, weight * inverse, c);
    } else if (c >= 0 && out.kl && threadIdx.x == 0) {
      out.kl[c] = 0;
      out.agree[c] = false;
    }
    if (!out.grad.data) return;
    const bool kept = means && n == 1;
    float dot = 0;
    if (means && back)
      for (int u = threadIdx.x; u < touched; u += blockDim.x) {
        const float b = project_back(u);
        if (kept) dot += means[u] * b;
        means[u] = b;
      }
    __syncthreads();
    for (int i = n - 1; i >= 0; --i) {
      if (!kept && back) {
        dot = 0;
        for (int u = threadIdx.x; u < touched; u += blockDim.x)
          dot += probability(rows[i], in.slice.ids[u]) * (means ? means[u] : project_back(u));
      }
      write_gradient(rows[i], back, sum(dot));
    }
  }

  // B[s] for the N tokens from s on.
  template <bool OnChip, int N>
  __device__ void back(int s, float (&b)[N]) const {
    const Word word = in.slice.words[s / 32];
    const int shift = s % 32;
    uint32_t bits = word.mask >> shift;
    if (shift + N > 32) bits |= in.slice.words[s / 32 + 1].mask << (32 - shift);
    int32_t u = word.before + __popc(word.mask & ((1u << shift) - 1));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      b[i] = 0;
      if (bits >> i & 1) {
        b[i] = OnChip ? means[u] : project_back(u);
        ++u;
      }
    }
  }

  __device__ void write_gradient(int64_t row, bool compared, float dot) const {
    const T* z = logits(row);
    T* to = gradient(row);
    const int label = labelled(row) ? int(in.labels[row]) : -1;
    const float nll_weight = label >= 0 && out.nll_weight ? out.nll_weight[row] : 0;
    if (!compared && nll_weight == 0) return fill_zero(to, 0, int(out.grad.cols));
    const float best = out.row_max[row], scale = compared ? out.row_scale[row] : 0;
    const float ce_scale = nll_weight == 0 ? 0 : out.ce_scale[row];
    const bool aligned = (reinterpret_cast<uintptr_t>(z) - reinterpret_cast<uintptr_t>(to)) % 16 == 0;
    auto write = [&](int s, const auto& x, auto& y) {  // y holds B
      constexpr int n = sizeof(y) / sizeof(float);
      for (int i = 0; i < n; ++i) y[i] = compared ? exp2f((x[i] - best) * to_exp2) * scale * (y[i] - dot) : 0;
      if (nll_weight != 0)
        for (int i = 0; i < n; ++i) y[i] += nll_weight * (exp2f((x[i] - best) * kLog2e) * ce_scale - (s + i == label));
      store(to + s, y, aligned);
    };
    if (means)
      for_packs<true, 4>(z, width(), [&](int s, const auto& x) {
        float y[sizeof(x) / sizeof(float)];
        back<true>(s, y);
        write(s, x, y);
      });
    else
      for_packs<true, 1>(z, width(), [&](int s, const auto& x) {
        float y[sizeof(x) / sizeof(float)];
        back<false>(s, y);
        write(s, x, y);
      });
    fill_zero(to, width(), int(out.grad.cols));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) projection_kl_kernel(const __grid_constant__ ProjectionKL in,
                                                                 const __grid_constant__ ProjectionKLResult out,
                                                                 const int64_t shared, float* scratch, int32_t* next) {
  const int64_t pair = 2 * (in.slice.k + in.tail);
  const int touched = in.slice.rank[in.slice.width - 1];
  float *reduction = on_chip(), *end = reduction + shared / sizeof(float), *free = reduction + kReduction;
  float* a = scratch ? scratch + pair * blockIdx.x : free;
  if (!scratch) free += pair;
  float* means = touched <= end - free ? free : nullptr;
  const Block<T> block{in, out, reduction, a, a + pair / 2, means, touched, 1 / in.temperature, kLog2e / in.temperature};
  const Members &student = in.student_members, &teacher = in.teacher_members;
  for (;;) {
    int item = threadIdx.x == 0 ? atomicAdd(next, 1) : 0;
    item = reduce(item, Sum(), reduction);
    if (item >= in.chunks + student.first[0]) return;
    const bool chunk = item < in.chunks;  // else a row of none
    const int64_t c = chunk ? item : -1, first = chunk ? student.first[c] : item - in.chunks;
    const int n = chunk ? int(student.first[c + 1] - first) : 1;
    const int64_t first_teacher = chunk ? teacher.first[c] : 0;
    const int n_teacher = chunk ? int(teacher.first[c + 1] - first_teacher) : 0;
    block.chunk(c, student.order + first, n, teacher.order + first_teacher, n_teacher);
  }
}

template <class F>
void with_kernel(DType student, F f) {
  if (student == DType::fp32) f(projection_kl_kernel<float>);
  else if (student == DType::bf16) f(projection_kl_kernel<bf16>);
  else f(projection_kl_kernel<fp16>);
}

}  // namespace

Launch projection_kl_launch(DType student, int64_t outcomes, int64_t touched) {
  int device, limit, processors, resident;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t fixed = kReduction * sizeof(float), pair = 2 * outcomes * sizeof(float);
  Launch plan{0, limit, 0};
  if (fixed + pair > limit) plan.scratch = 2 * outcomes;
  const int64_t wanted = fixed + (plan.scratch ? 0 : pair) + touched * sizeof(float);
  if (wanted < limit) plan.shared = wanted;
  with_kernel(student, [&](auto kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, size_t(plan.shared)));
  });
  if (resident == 0) throw std::runtime_error("CUDA: a block of projection_kl does not fit this device");
  plan.blocks = processors * resident;
  return plan;
}

void projection_kl(const ProjectionKL& in, const ProjectionKLResult& out, const Launch& plan, float* scratch, int32_t* next,
                   void* stream) {
  with_kernel(in.student.dtype, [&](auto kernel) {
    launch(kernel, plan.blocks, plan.shared, stream, in, out, plan.shared, plan.scratch ? scratch : nullptr, next);
  });
}

}  // namespace cuda
}  // namespace chassis
