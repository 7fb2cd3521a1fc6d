// What every kernel takes and which variants exist. Pointers and sizes only: tensors are checked in Python.
#pragma once
#include <cstdint>
#include <vector>

namespace chassis {

enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2, fp64 = 3 };

// A row-major matrix seen through its row stride (in elements); the last dimension is contiguous.
// An absent optional tensor has data == nullptr.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;
  DType dtype = DType::fp32;
};

// The moments of a layer, and the rows that it merges; mean_y, xy, yy and y are there together, or none of them.
struct MomentsUpdate { Matrix count, mean_x, xx, mean_y, xy, yy, x, y, weight; };

// S = Q T Q^T: T's diagonal [D] and off-diagonal [D - 1], Q as reflectors v [P, D], v_i = 0 up to coordinate i, in blocks of B
// with their factors [P, B]; C [D, T] the right-hand sides, for `solve` Q^T C; alphas [A], for `solve` one for each column.
// All fp64.
struct Tridiagonal { Matrix reflectors, factors, diagonal, off, C, alphas; };

// U [A, D, r], V [A, r, K] and cols [A, K] are the first adapter's and the step, in elements, to the next one's; for cols 0
// where all have the same.
struct DeltaLogits {
  Matrix logits, hidden, U, V, bias, mean;
  int64_t adapters, stride_U, stride_V, stride_cols;
  const int64_t *cols, *adapter_id;  // either may be null
};

// Side b is h_b W_b^T, or h_b itself without W_b; softcap 0 means none.
struct LinearKL {
  Matrix h_a, W_a, h_b, W_b, bias_a, bias_b, u, v, c;
  float softcap_a, softcap_b, scale_a, scale_b;
};
struct LinearKLResult {
  float* kl;
  double *lse_a, *lse_b;
  int64_t *argmax_a, *argmax_b;
};
// null: not wanted; v and c zeroed by the caller. Beside the KL they need `room` [rows, 2 V, whole tiles] for logits, else null.
struct LinearKLGradients { float *u, *v, *c; };

// student [N_s, >= width] and teacher [N_t, >= vocabulary] logits, the projection by teacher token (start [vocabulary + 1],
// rows, weights), the k teacher columns compared, the chunk of every row (-1: none), and the student rows' labels (null or
// -1: none).
struct ProjectionKL {
  Matrix student, teacher;
  const int64_t* start;
  const int32_t* rows;
  const float* weights;
  int64_t vocabulary;
  const int64_t* columns;
  int64_t k;
  const int64_t *student_chunk, *teacher_chunk, *labels;
  int64_t width, chunks;
  float temperature;
  int64_t divergence;  // 0 forward, 1 reverse, 2 Jensen-Shannon
  bool tail;
};
// kl and agree [chunks] and nll [N_s], all or none; row_max, row_scale and ce_scale [N_s], given where `known`, else written;
// the gradient of sum weight[c] kl[c] + sum nll_weight[i] nll[i] where grad is there, which may be the student logits
// themselves. nll, ce_scale and nll_weight count where there are labels; nll_weight may be null.
struct ProjectionKLResult {
  float* kl;
  bool* agree;
  float *nll, *row_max, *row_scale, *ce_scale;
  bool known;
  Matrix grad;
  const float *weight, *nll_weight;
};

// `loss` for student = cap(hidden weight^T + bias), its `student` left empty; row j of the head is weight[ids[j]] (null:
// weight[j]) for the loss's `width` tokens. softcap 0 means none.
struct LinearProjectionKL {
  Matrix hidden, weight, bias;
  const int64_t* ids;
  float softcap;
  ProjectionKL loss;
};
// kl and agree [chunks], nll and correct [N] with labels, all zeroed by the caller. Where upstream is there, the gradients of
// sum upstream[c] kl[c] + sum upstream_nll[t] nll[t] for hidden [N, D] (zeroed by the caller), weight [.., D] and bias [..],
// those that are there, in fp32; weight's also in bf16 where hidden and weight are. The logits of about `block` rows exist at
// a time, and for a gradient in bf16 those of all rows' logits, in bf16.
struct LinearProjectionKLResult {
  float* kl;
  bool* agree;
  float* nll;
  bool* correct;
  const float *upstream, *upstream_nll;
  Matrix grad_hidden, grad_weight;
  float* grad_bias;
  int64_t block;
};

// student and teacher [N, V] logits, the k columns compared (null: the first k), the rows to compare (null: all).
struct TokenKL {
  Matrix student, teacher;
  const int64_t* columns;
  int64_t k;
  const bool* keep;
  float temperature;
  bool reverse;
};
// kl [N] where it is there; the gradient of sum weight[i] kl[i] where grad is there, which may be the student logits themselves.
struct TokenKLResult {
  float* kl;
  const float* weight;
  Matrix grad;
};

// student [N_s, V_s] and teacher [N_t, V_t] logits, the mapped tokens (one to one), and the chunk of every row (-1: none).
struct GoldKL {
  Matrix student, teacher;
  const int64_t *students, *teachers;
  int64_t pairs;
  const int64_t *student_chunk, *teacher_chunk;
  int64_t chunks, uncommon_topk;
  float temperature;
  bool reverse;
};
// common, l1 and agree [chunks], all or none; the gradient of sum weight_common[c] common[c] + weight_l1[c] l1[c] where grad is
// there, which may be the student logits themselves.
struct GoldKLResult {
  float *common, *l1;
  bool* agree;
  const float *weight_common, *weight_l1;
  Matrix grad;
};

// `count` rows. Row n reads logits[index[s]] with weight exp(log_weight[s]) for the states s of index_start[n] ..
// index_start[n + 1] (null: for s = n alone; index null: logits[s]; log_weight null: 1), of their first `width` columns, which
// are the table's first rows, and has the probabilities exp(log_probs[i]) of the table's rows ids[i] (-1: none) for the i of
// listed_start[n] .. listed_start[n + 1] (null: none). The table by base token (start [n_base + 1], rows, weights) and by row
// (row_sum, spread). Which list of blocked base tokens holds for each row, -1 none; null: no lists. `floor` [n_base] may be null.
struct BridgeProject {
  Matrix logits;
  const int64_t *index, *index_start;
  const float *log_weight, *log_probs;
  const int64_t *ids, *listed_start, *start;
  const int32_t* rows;
  const float *weights, *row_sum, *spread;
  const int64_t* blocked_start;
  const int32_t* blocked;
  const int64_t* previous;
  const float* floor;
  int64_t count, entries, n_rows, n_base, width;
  float temperature;
  bool normalize;
};
struct BridgeProjectResult { float *log_q, *mass, *uncertainty; };

// op(name, arguments...): declared for each instruction set that setup.py compiles, defined in cpu/<op>.cpp.
#define CHASSIS_DECLARE_OPS                                                                                      \
  void exp_nonpositive(const float* x, float* out, int64_t n);                                                   \
  void convert(const Matrix& x, const Matrix& out);                                                              \
  void moments_update(const std::vector<MomentsUpdate>& layers);                                                 \
  void tridiagonal_reduce_(const Matrix& S, double* diagonal, double* off, double* scales);                      \
  void tridiagonal_path(const Tridiagonal& args, const Matrix& R, double* dots, double* squares, double* traces); \
  void tridiagonal_solve(const Tridiagonal& args, const Matrix& W);                                              \
  void delta_logits_(const DeltaLogits& args);                                                                   \
  void linear_kl(const LinearKL& args, const LinearKLResult& out, const LinearKLGradients& grads,               \
                 const Matrix& room);                                                                            \
  void linear_kl_backward(const LinearKL& args, const float* grad, const double* lse_a, const double* lse_b,     \
                          const LinearKLGradients& out);                                                         \
  void projection_kl(const ProjectionKL& args, const ProjectionKLResult& out);                                   \
  void linear_projection_kl(const LinearProjectionKL& args, const LinearProjectionKLResult& out);                \
  void top_columns(const Matrix& logits, const uint8_t* keep, int64_t k, int64_t* out);                          \
  void token_kl(const TokenKL& args, const TokenKLResult& out);                                                  \
  void gold_kl(const GoldKL& args, const GoldKLResult& out);                                                     \
  void bridge_project(const BridgeProject& args, const BridgeProjectResult& out);                                \
  void log_sums(const Matrix& logits, float temperature, float* out);

#ifdef CHASSIS_HAVE_AVX512
namespace avx512 { CHASSIS_DECLARE_OPS }
#endif
#ifdef CHASSIS_HAVE_AVX2
namespace avx2 { CHASSIS_DECLARE_OPS }
#endif
namespace portable { CHASSIS_DECLARE_OPS }

}  // namespace chassis
