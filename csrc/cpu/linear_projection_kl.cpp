// projection_kl for logits that are products, Z = cap(H W^T + bias), and the gradients for H, W and the bias.
//
// Rows are taken in blocks of whole chunks; the logits of one block at a time exist, as [rows, V] floats:
//   Z = cap(H W^T + bias)        Z <- dloss/dZ by projection_kl, in place        dH = Z W,  dW += Z^T H
// Three products in all, each by tiles of the vocabulary that are packed, multiplied and added while they are in cache. A
// thread has the same range of tiles in all of them; the threads' parts of dH are added in order.
#include "cpu/gemm_bf16.h"
#include "cpu/logit_rows.h"

namespace chassis {
namespace CHASSIS_ISA {

void projection_kl(const ProjectionKL& args, const ProjectionKLResult& out);

namespace {

constexpr int64_t kTile = 384;   // tokens at a time: whole panels on either side of a product
constexpr int64_t kDepth = 256;  // products per running sum
constexpr int64_t kSlice = 128;  // hidden dimensions of the gradients at a time
static_assert(kTile % kNr == 0 && kTile % kMr == 0 && kSlice % kNr == 0, "panels must be whole");

// Asks for `bytes` from p on, to be written or read soon.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Rows whose logits exist together, with their chunks renumbered from 0 (-1: none).
struct Block { std::vector<int64_t> rows, chunk, chunks; };

// As few blocks as `most` rows in each allow, of about the same size; more where that splits a chunk, whose gradient needs
// all of its rows. Rows outside chunks are there for their labels.
std::vector<Block> blocks_of(const ProjectionKL& in, int64_t rows, int64_t most) {
  const Members student(in.student_chunk, rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
  auto paired = [&](int64_t c) { return student.count(c) > 0 && teacher.count(c) > 0; };
  std::vector<int64_t> labelled;
  for (int64_t i = 0; in.labels && i < rows; ++i)
    if (in.labels[i] >= 0 && (in.student_chunk[i] < 0 || !paired(in.student_chunk[i]))) labelled.push_back(i);
  int64_t total = labelled.size();
  for (int64_t c = 0; c < in.chunks; ++c) total += paired(c) ? student.count(c) : 0;
  const int64_t size = ceil_div(total, std::max<int64_t>(1, ceil_div(total, most)));
  std::vector<Block> blocks;
  auto open = [&]() -> Block& {
    if (blocks.empty() || int64_t(blocks.back().rows.size()) >= size) blocks.emplace_back();
    return blocks.back();
  };
  for (int64_t c = 0; c < in.chunks; ++c) {
    if (!paired(c)) continue;
    Block& block = open();
    const int64_t* first = &student.order[student.first[c]];
    block.rows.insert(block.rows.end(), first, first + student.count(c));
    block.chunk.insert(block.chunk.end(), student.count(c), block.chunks.size());
    block.chunks.push_back(c);
  }
  for (int64_t i : labelled) {
    Block& block = open();
    block.rows.push_back(i);
    block.chunk.push_back(-1);
  }
  return blocks;
}

struct Problem {
  const LinearProjectionKL& in;
  const LinearProjectionKLResult& out;
  const int64_t depth = in.hidden.cols, width = in.loss.width, tiles = ceil_div(width, kTile);
  const int64_t stride = round_up(width, kLanes), most, lines = round_up(most, kMr);
  const Multiplier way{in.hidden.dtype == DType::bf16 && in.weight.dtype == DType::bf16 && has_bf16_products()};
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), tiles)));
  Buffer z{most * stride}, dz{in.softcap > 0 && out.upstream ? most * stride : 0};  // the cap's derivative needs z
  Buffer hidden{most * depth}, left{lines * depth}, right{lines * round_up(depth, kNr)};
  Buffer grad_hidden{out.grad_hidden.data ? threads * most * depth : 0};
  std::vector<float> bias;

  Problem(const LinearProjectionKL& in, const LinearProjectionKLResult& out, int64_t most) : in(in), out(out), most(most) {
    if (in.bias.data)
      with_type(in.bias, [&](auto* b) {
        bias.resize(stride);
        for (int64_t j = 0; j < width; ++j) bias[j] = to_float(b[token(j)]);
      });
  }

  int64_t token(int64_t j) const { return in.ids ? in.ids[j] : j; }
  float* gradient() const { return in.softcap > 0 ? dz.get() : z.get(); }

  template <class F>
  void each_tile(F f) const {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t t = tiles * thread / team; t < tiles * (thread + 1) / team; ++t)
      f(t * kTile, std::min(kTile, width - t * kTile));
  }

  // The block's rows of H, together, then packed for H W^T and, where dW is wanted, for Z^T H.
  void pack_hidden(const Block& block) const {
    const int64_t n = block.rows.size();
    with_type(in.hidden, [&](auto* h) {
      using T = std::remove_pointer_t<decltype(h)>;
      T* rows = reinterpret_cast<T*>(hidden.get());
#pragma omp for
      for (int64_t i = 0; i < n; ++i) std::copy_n(h + block.rows[i] * in.hidden.stride, depth, rows + i * depth);
#pragma omp for nowait
      for (int64_t k = 0; k < depth; k += kDepth)
        way.pack_panels<kMr>(Operand<T>{rows + k, depth, 1}, n, std::min(kDepth, depth - k), left.get() + k * lines);
      if (!out.upstream || !out.grad_weight.data) return;
#pragma omp for nowait
      for (int64_t d = 0; d < depth; d += kSlice)
        way.pack_panels<kNr>(Operand<T>{rows + d, 1, depth}, std::min(kSlice, depth - d), n, right.get() + d * lines);
    });
#pragma omp barrier
  }

  void logits(int64_t n) const {
    Buffer piece(kTile * kDepth), tile(most * kTile), near(in.ids ? kTile * kDepth : 0);
    each_tile([&](int64_t column, int64_t columns) {
      if (depth == 0) std::fill_n(tile.get(), n * kTile, 0.0f);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t steps = std::min(kDepth, depth - k);
        with_type(in.weight, [&](auto* w) {
          using T = std::remove_pointer_t<decltype(w)>;
          Operand<T> rows{w + column * in.weight.stride + k, in.weight.stride, 1};
          if (in.ids) {
            T* copy = reinterpret_cast<T*>(near.get());
            for (int64_t j = 0; j < columns; ++j)
              std::copy_n(w + in.ids[column + j] * in.weight.stride + k, steps, copy + j * steps);
            rows = {copy, steps, 1};
          }
          way.pack_panels<kNr>(rows, columns, steps, piece.get());
        });
        way.multiply(left.get() + k * lines, n, piece.get(), columns, steps, tile.get(), kTile, k > 0);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
          vf v = load(tile.get() + i * kTile + j);
          if (!bias.empty()) v += load(bias.data() + column + j);
          if (in.softcap > 0) v = in.softcap * tanh(v / in.softcap);
          store(z.get() + i * stride + column + j, v);
        }
    });
  }

  // The loss of the block, and in place of its logits their gradient where it is wanted.
  void compare(const Block& block) const {
    const int64_t n = block.rows.size(), m = block.chunks.size();
    std::vector<int64_t> local(in.loss.chunks, -1), teacher(in.loss.teacher.rows), labels(n, -1);
    for (int64_t c = 0; c < m; ++c) local[block.chunks[c]] = c;
    for (size_t i = 0; i < teacher.size(); ++i)
      teacher[i] = in.loss.teacher_chunk[i] < 0 ? -1 : local[in.loss.teacher_chunk[i]];
    std::vector<float> kl(m), upstream(m), nll(n), row_max(n), row_scale(n), ce_scale(n), upstream_nll(n), at_label(n);
    std::unique_ptr<bool[]> agree(new bool[m]);
    ProjectionKL loss = in.loss;
    loss.student = {z.get(), n, width, stride, DType::fp32};
    loss.student_chunk = block.chunk.data(), loss.teacher_chunk = teacher.data(), loss.chunks = m;
    ProjectionKLResult result{kl.data(), agree.get(), nll.data(), row_max.data(), row_scale.data(), ce_scale.data()};
    if (in.loss.labels) {
      loss.labels = labels.data();
      for (int64_t i = 0; i < n; ++i) {
        labels[i] = in.loss.labels[block.rows[i]];
        if (labels[i] >= 0) at_label[i] = z[i * stride + labels[i]];
      }
    }
    if (out.upstream) {
      for (int64_t c = 0; c < m; ++c) upstream[c] = out.upstream[block.chunks[c]];
      for (int64_t i = 0; i < n && out.upstream_nll; ++i) upstream_nll[i] = out.upstream_nll[block.rows[i]];
      result.grad = {gradient(), n, width, stride, DType::fp32};
      result.weight = upstream.data();
      result.nll_weight = out.upstream_nll ? upstream_nll.data() : nullptr;
    }
    projection_kl(loss, result);
    for (int64_t c = 0; c < m; ++c) out.kl[block.chunks[c]] = kl[c], out.agree[block.chunks[c]] = agree[c];
    for (int64_t i = 0; i < n; ++i)
      if (labels[i] >= 0) out.nll[block.rows[i]] = nll[i], out.correct[block.rows[i]] = at_label[i] == row_max[i];
  }

  void gradients(int64_t n, bool first) const {
    float* mine = grad_hidden.get() + omp_get_thread_num() * most * depth;
    if (out.grad_hidden.data) std::fill_n(mine, n * depth, 0.0f);
    Buffer rounded(way.pairs ? n * kTile : 0), by_row(lines * kTile), by_token(kTile * n), piece(kTile * kSlice);
    each_tile([&](int64_t column, int64_t columns) {
      Matrix tile{gradient() + column, n, columns, stride, DType::fp32};
      finish(tile, column, first);
      if (way.pairs) {
        bf16* small = reinterpret_cast<bf16*>(rounded.get());
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < columns; j += kLanes)
            store_rounded(small + i * kTile + j, load(gradient() + i * stride + column + j));
        tile = {small, n, columns, kTile, DType::bf16};
      }
      with_type(tile, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        if (out.grad_hidden.data) way.pack_panels<kMr>(Operand<T>{t, tile.stride, 1}, n, columns, by_row.get());
        if (out.grad_weight.data) way.pack_panels<kMr>(Operand<T>{t, 1, tile.stride}, columns, n, by_token.get());
      });
      for (int64_t d = 0; d < depth; d += kSlice) {
        const int64_t slice = std::min(kSlice, depth - d);
        if (out.grad_hidden.data) {
          with_type(in.weight, [&](auto* w) {
            using T = std::remove_pointer_t<decltype(w)>;
            const T* from = w + d + (in.ids ? 0 : column * in.weight.stride);
            way.pack_panels<kNr>(Operand<T>{from, 1, in.weight.stride, nullptr, nullptr, nullptr, in.ids ? in.ids + column : nullptr},
                                 slice, columns, piece.get());
          });
          way.multiply(by_row.get(), n, piece.get(), slice, columns, mine + d, depth, true);
        }
        if (out.grad_weight.data) add_grad_weight(by_token.get(), column, columns, d, slice, n, first);
      }
    });
  }

  // dW[tile, slice] (+)= Z^T H, some rows at a time: the next ones, and the next slice of W, arrive while these are made.
  void add_grad_weight(const float* by_token, int64_t column, int64_t columns, int64_t d, int64_t slice, int64_t n,
                       bool first) const {
    float part[kMr * kSlice];
    auto row = [&](int64_t j) {
      return static_cast<float*>(out.grad_weight.data) + token(column + j) * out.grad_weight.stride + d;
    };
    const int64_t size = in.weight.dtype == DType::fp32 ? 4 : 2;
    for (int64_t j = 0; j < columns; j += kMr) {
      for (int64_t i = j; i < std::min(j + kMr, columns); ++i) {
        if (i + kMr < columns) prefetch(row(i + kMr), slice * 4);
        if (d + slice < depth)
          prefetch(static_cast<const char*>(in.weight.data) + (token(column + i) * in.weight.stride + d + slice) * size, slice * size);
      }
      const int64_t count = std::min<int64_t>(kMr, columns - j);
      way.multiply(by_token + j * way.steps(n), count, right.get() + d * lines, slice, n, part, kSlice, false);
      for (int64_t i = 0; i < count; ++i) {
        float* to = row(j + i);
        const float* from = part + i * kSlice;
        if (first) std::copy_n(from, slice, to);
        else for (int64_t k = 0; k < slice; ++k) to[k] += from[k];
      }
    }
  }

  // From the gradient for the capped logits to that for the products, and its sum for the bias.
  void finish(const Matrix& tile, int64_t column, bool first) const {
    if (in.softcap > 0)
      for (int64_t i = 0; i < tile.rows; ++i) {
        float* d = static_cast<float*>(tile.data) + i * stride;
        const float* capped = z.get() + i * stride + column;
        for (int64_t j = 0; j < tile.cols; j += kLanes) {
          vf share = load(capped + j) / in.softcap;
          store(d + j, load(d + j) * (1.0f - share * share));
        }
      }
    if (!out.grad_bias) return;
    float total[kTile] = {};
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < tile.cols; ++j) total[j] += static_cast<float*>(tile.data)[i * stride + j];
    for (int64_t j = 0; j < tile.cols; ++j) {
      float& to = out.grad_bias[token(column + j)];
      to = first ? total[j] : to + total[j];
    }
  }

  void add_grad_hidden(const Block& block) const {
    const int64_t n = block.rows.size();
#pragma omp for
    for (int64_t i = 0; i < n; ++i) {
      float* to = static_cast<float*>(out.grad_hidden.data) + block.rows[i] * out.grad_hidden.stride;
      for (int t = 0; t < omp_get_num_threads(); ++t)
        for (int64_t d = 0; d < depth; ++d) to[d] += grad_hidden[(t * most + i) * depth + d];
    }
  }
};

// Zeroes the rows of the weight's gradient that no block will write.
void clear_untouched(const LinearProjectionKL& in, const LinearProjectionKLResult& out, bool all) {
  std::vector<bool> written(out.grad_weight.rows, false);
  for (int64_t j = 0; j < in.loss.width && !all; ++j) written[in.ids ? in.ids[j] : j] = true;
#pragma omp parallel for
  for (int64_t i = 0; i < out.grad_weight.rows; ++i)
    if (!written[i]) std::fill_n(static_cast<float*>(out.grad_weight.data) + i * out.grad_weight.stride, out.grad_weight.cols, 0.0f);
}

}  // namespace

void linear_projection_kl(const LinearProjectionKL& in, const LinearProjectionKLResult& out) {
  const std::vector<Block> blocks = blocks_of(in.loss, in.hidden.rows, out.block);
  if (out.grad_weight.data) clear_untouched(in, out, blocks.empty());
  size_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.rows.size());
  const Problem problem(in, out, most);
  for (const Block& block : blocks) {
    const int64_t n = block.rows.size();
#pragma omp parallel num_threads(problem.threads)
    {
      problem.pack_hidden(block);
      problem.logits(n);
    }
    problem.compare(block);
    if (!out.upstream) continue;
#pragma omp parallel num_threads(problem.threads)
    {
      problem.gradients(n, &block == &blocks.front());
#pragma omp barrier
      if (out.grad_hidden.data) problem.add_grad_hidden(block);
    }
  }
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
