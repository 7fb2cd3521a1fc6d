// Cuts a projection, stored by teacher token, to chosen columns, and turns it round: the student tokens that have entries
// there, each one's entries, and where to find them. Counted and placed with integer atomics, then sorted, so that the same
// projection always gives the same lists.
#include "cuda/slice.h"

namespace chassis {
namespace cuda {
namespace {

// f(e, j) for the entries e of teacher token J_j, a warp to a token.
template <class F>
__device__ inline void for_entries(const Slice& m, F f) {
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t j = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; j < m.k; j += warps)
    if (first_of_equals(m, j))
      for (int64_t e = m.start[m.columns[j]] + threadIdx.x % 32; e < m.start[m.columns[j] + 1]; e += 32) f(e, j);
}

__global__ void count_kernel(const __grid_constant__ Slice m) {
  for_entries(m, [&](int64_t e, int64_t) { atomicAdd(m.count + m.rows[e], 1); });
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m.chosen && j < m.k) atomicOr(m.chosen + m.columns[j] / 32, 1u << m.columns[j] % 32);
}

__global__ void index_kernel(const __grid_constant__ Slice m) {
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool has = s < m.width && m.count[s] > 0;
  const uint32_t mask = __ballot_sync(kAll, has);
  if (s % 32 == 0 && s / 32 <= (m.width + 31) / 32) m.words[s / 32] = {mask, s == 0 ? 0 : m.rank[min(s, m.width) - 1]};
  if (has) {
    m.ids[m.rank[s] - 1] = int32_t(s);
    m.begin[m.rank[s]] = m.ends[s];
  }
  if (s == 0) m.begin[0] = 0;
}

// Places within a token are taken in any order here; sort_kernel makes it one order.
__global__ void scatter_kernel(const __grid_constant__ Slice m) {
  for_entries(m, [&](int64_t e, int64_t j) {
    const int32_t s = m.rows[e];
    m.slot[e] = m.rank[s] - 1;
    m.entries[m.ends[s] - atomicSub(m.count + s, 1)] = {int32_t(j), m.weights[e]};
  });
}

__global__ void sort_kernel(const __grid_constant__ Slice m) {
  const int64_t u = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (u >= m.rank[m.width - 1]) return;
  for (int32_t i = m.begin[u] + 1; i < m.begin[u + 1]; ++i) {
    const Entry entry = m.entries[i];
    int32_t at = i;
    for (; at > m.begin[u]; --at) {
      const Entry other = m.entries[at - 1];
      if (other.position < entry.position || (other.position == entry.position && other.weight <= entry.weight)) break;
      m.entries[at] = other;
    }
    m.entries[at] = entry;
  }
}

}  // namespace

void set_device(int device) { check(cudaSetDevice(device)); }

void count_rows(const Slice& slice, void* stream) {
  launch(count_kernel, blocks_for(slice.k, kThreads / 32), 0, stream, slice);
}

void slice_rows(const Slice& slice, void* stream) {
  launch(index_kernel, blocks_for(slice.width + 32, kThreads), 0, stream, slice);
  launch(scatter_kernel, blocks_for(slice.k, kThreads / 32), 0, stream, slice);
  launch(sort_kernel, blocks_for(slice.width, kThreads), 0, stream, slice);
}

}  // namespace cuda
}  // namespace chassis
