// What the CUDA kernels take. Pointers, sizes and a stream: tensors are allocated and checked in Python.
#pragma once
#include "cpu/ops.h"

namespace chassis {
namespace cuda {

// The rows of chunk c are order[first[c]] .. order[first[c + 1] - 1]; those of no chunk come first in `order`.
struct Members {
  const int64_t *first, *order;
};

// Which 32 student tokens have entries in the columns compared, and how many tokens before them have.
struct Word { uint32_t mask; int32_t before; };
struct Entry { int32_t position; float weight; };

// The projection by teacher token (start [V_t + 1], rows, weights [nnz]), cut to the teacher columns J [k], which are
// ascending: `place` is where each stood as given. The rest is written by `slice_rows`: the U student tokens that have entries
// in J (`ids`), each one's entries (`begin` [U + 1]), every stored entry's place in `ids` (`slot`), and `words`.
struct Slice {
  const int64_t* start;
  const int32_t* rows;
  const float* weights;
  const int64_t* columns;
  const int32_t* place;
  int64_t k, width;
  int32_t *count, *ends, *rank;  // [width] entries of a student token, and inclusive sums of the entries and of the tokens
  Word* words;                   // [ceil(width / 32) + 1]
  int32_t *ids, *begin, *slot;
  Entry* entries;    // [nnz]
  uint32_t* chosen;  // [ceil(V_t / 32)] which teacher tokens are in J, a bit each; null: not wanted
};

struct ProjectionKL {
  Matrix student, teacher;
  Slice slice;
  Members student_members, teacher_members;
  const int64_t* labels;  // [N_s], -1: none; may be null
  int64_t chunks, vocabulary;  // vocabulary: V_t
  float temperature;
  int divergence;
  bool tail;
};
// kl and agree [chunks], both or neither; row statistics [N_s], given where `known`, else written; the gradient of
// sum weight[c] kl[c] + sum nll_weight[t] nll[t] where grad is there, which may be the student logits themselves.
struct ProjectionKLResult {
  float* kl;
  bool* agree;
  float *nll, *row_max, *row_scale, *ce_scale;
  bool known;
  Matrix grad;
  const float *weight, *nll_weight;
};
// Blocks to launch, their shared memory in bytes, and the floats of global memory that each needs beside it.
struct Launch {
  int blocks;
  int64_t shared, scratch;
};

// This library's own CUDA runtime does not see which device another one made current.
void set_device(int device);
void count_rows(const Slice& slice, void* stream);  // fills `count` and `chosen`, which are zero before
void slice_rows(const Slice& slice, void* stream);  // the rest, from `count`, `ends` and `rank`; leaves `count` zero
Launch projection_kl_launch(DType student, int64_t outcomes, int64_t touched);  // at most `touched` student tokens
// next: a zero, from which blocks count the chunks that they take.
void projection_kl(const ProjectionKL& in, const ProjectionKLResult& out, const Launch& launch, float* scratch, int32_t* next,
                   void* stream);

}  // namespace cuda
}  // namespace chassis
