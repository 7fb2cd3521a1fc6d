// projection_kl for logits that are products, Z = cap(H W^T + bias), and the gradients for H, W and the bias.
//
// Rows are taken in blocks of whole chunks; the logits of one block at a time exist, as [rows, V] floats:
//   Z = cap(H W^T + bias)        Z <- dloss/dZ by projection_kl, in place        dH = Z W,  dW += Z^T H
// Three products in all, each by tiles of the vocabulary that are packed, multiplied and added while they are in cache. A
// thread has the same range of tiles in all of them; the threads' parts of dH are added in order.
// Where H and W are bf16, so is dZ in its products. Where dW is to be bf16 too, the dZ of all blocks are kept: a tile of dW is
// then summed over all rows at once, in registers, and rounded once.
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

// Rows whose logits exist together, with their chunks renumbered from 0 (-1: none). `at` counts the rows of the blocks before
// it that dZ is kept of, in whole panels.
struct Block {
  std::vector<int64_t> rows, chunk, chunks;
  int64_t at = 0;

  int64_t size() const { return rows.size(); }
  int64_t lines() const { return round_up(size(), kMr); }
};

// As few blocks as about `most` rows in each allow, of the same size but for whole panels and chunks: a chunk's gradient needs
// all of its rows. Rows outside chunks are there for their labels.
std::vector<Block> blocks_of(const ProjectionKL& in, int64_t rows, int64_t most) {
  const Members student(in.student_chunk, rows, in.chunks), teacher(in.teacher_chunk, in.teacher.rows, in.chunks);
  auto paired = [&](int64_t c) { return student.count(c) > 0 && teacher.count(c) > 0; };
  std::vector<int64_t> labelled;
  for (int64_t i = 0; in.labels && i < rows; ++i)
    if (in.labels[i] >= 0 && (in.student_chunk[i] < 0 || !paired(in.student_chunk[i]))) labelled.push_back(i);
  int64_t total = labelled.size();
  for (int64_t c = 0; c < in.chunks; ++c) total += paired(c) ? student.count(c) : 0;
  const int64_t number = std::max<int64_t>(1, ceil_div(total, most)), size = round_up(ceil_div(total, number), kMr);
  std::vector<Block> blocks;
  auto open = [&](int64_t more) -> Block& {
    if (blocks.empty() || (blocks.back().size() + more > size && int64_t(blocks.size()) < number)) blocks.emplace_back();
    return blocks.back();
  };
  for (int64_t c = 0; c < in.chunks; ++c) {
    if (!paired(c)) continue;
    Block& block = open(student.count(c));
    const int64_t* first = &student.order[student.first[c]];
    block.rows.insert(block.rows.end(), first, first + student.count(c));
    block.chunk.insert(block.chunk.end(), student.count(c), block.chunks.size());
    block.chunks.push_back(c);
  }
  for (int64_t i : labelled) {
    Block& block = open(1);
    block.rows.push_back(i);
    block.chunk.push_back(-1);
  }
  return blocks;
}

struct Problem {
  const LinearProjectionKL& in;
  const LinearProjectionKLResult& out;
  const int64_t depth = in.hidden.cols, width = in.loss.width, tiles = ceil_div(width, kTile), stride = round_up(width, kLanes);
  const bool narrow = in.hidden.dtype == DType::bf16 && in.weight.dtype == DType::bf16;
  const Multiplier way{narrow && has_bf16_products()};
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), tiles)));
  const int64_t most, lines;  // rows of a block, and those that dZ is kept of, at most
  Buffer z{most * stride}, dz{in.softcap > 0 && out.upstream ? most * stride : 0};  // the cap's derivative needs z
  Buffer rounded{narrow && out.upstream ? ceil_div(lines * stride, 2) : 0};         // dZ in bf16
  Buffer hidden{most * depth}, left{round_up(most, kMr) * depth}, right{lines * round_up(depth, kNr)};
  Buffer grad_hidden{out.grad_hidden.data ? threads * lines * round_up(depth, kSlice) : 0};  // [threads, slices, lines, kSlice]
  std::vector<float> bias;

  Problem(const LinearProjectionKL& in, const LinearProjectionKLResult& out, int64_t most, int64_t lines)
      : in(in), out(out), most(most), lines(lines) {
    if (in.bias.data)
      with_type(in.bias, [&](auto* b) {
        bias.resize(stride);
        for (int64_t j = 0; j < width; ++j) bias[j] = to_float(b[token(j)]);
      });
  }

  int64_t token(int64_t j) const { return in.ids ? in.ids[j] : j; }
  float* gradient() const { return in.softcap > 0 ? dz.get() : z.get(); }
  float* hidden_slice(const Block& block, int64_t d) const {
    return right.get() + block.at * round_up(depth, kNr) + d * block.lines();
  }
  float* grad_hidden_slice(const Block& block, int64_t thread, int64_t d) const {
    return grad_hidden.get() + thread * lines * round_up(depth, kSlice) + d * lines + block.at * kSlice;
  }
  // The block's dZ from `column` on, as the products take it.
  Matrix gradient(const Block& block, int64_t column, int64_t columns) const {
    if (!narrow) return {gradient() + column, block.size(), columns, stride, DType::fp32};
    return {reinterpret_cast<bf16*>(rounded.get()) + block.at * stride + column, block.size(), columns, stride, DType::bf16};
  }

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
        way.pack_panels<kMr>(Operand<T>{rows + k, depth, 1}, n, std::min(kDepth, depth - k), left.get() + k * block.lines());
      if (!out.upstream || !out.grad_weight.data) return;
#pragma omp for nowait
      for (int64_t d = 0; d < depth; d += kSlice)
        way.pack_panels<kNr>(Operand<T>{rows + d, 1, depth}, std::min(kSlice, depth - d), n, hidden_slice(block, d));
    });
#pragma omp barrier
  }

  void logits(const Block& block) const {
    const int64_t n = block.size();
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
        way.multiply(left.get() + k * block.lines(), n, piece.get(), columns, steps, tile.get(), kTile, k > 0);
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

  // From the gradient for the capped logits to that for the products, its sum for the bias, and its rounding.
  void finish(const Block& block, bool first) const {
    if (!narrow && in.softcap == 0 && !out.grad_bias) return;
    each_tile([&](int64_t column, int64_t columns) {
      float total[kTile] = {};
      bf16* small = narrow ? static_cast<bf16*>(gradient(block, column, columns).data) : nullptr;
      for (int64_t i = 0; i < block.size(); ++i) {
        float* d = gradient() + i * stride + column;
        const float* capped = z.get() + i * stride + column;
        for (int64_t j = 0; j < columns; j += kLanes) {
          const vf share = in.softcap > 0 ? load(capped + j) / in.softcap : vf{}, v = load(d + j) * (1.0f - share * share);
          store(total + j, load(total + j) + v);
          if (narrow) store_rounded(small + i * stride + j, v);
          else store(d + j, v);
        }
      }
      for (int64_t j = 0; out.grad_bias && j < columns; ++j) {
        float& to = out.grad_bias[token(column + j)];
        to = first ? total[j] : to + total[j];
      }
    });
  }

  // Of the blocks from `from` up to `to`, the first of all where `first`.
  void gradients(const Block* from, const Block* to, bool first) const {
    Buffer by_row(lines * kTile), by_token(lines * kTile), piece(kTile * kSlice);
    for (const Block* block = from; block < to && out.grad_hidden.data; ++block)
      for (int64_t d = 0; d < depth; d += kSlice)
        std::fill_n(grad_hidden_slice(*block, omp_get_thread_num(), d), block->size() * kSlice, 0.0f);
    each_tile([&](int64_t column, int64_t columns) {
      for (const Block* block = from; block < to; ++block) {
        const Matrix tile = gradient(*block, column, columns);
        with_type(tile, [&](auto* t) {
          using T = std::remove_pointer_t<decltype(t)>;
          const int64_t n = tile.rows, at = block->at * kTile;
          if (out.grad_hidden.data) way.pack_panels<kMr>(Operand<T>{t, stride, 1}, n, columns, by_row.get() + at);
          if (out.grad_weight.data) way.pack_panels<kMr>(Operand<T>{t, 1, stride}, columns, n, by_token.get() + at);
        });
      }
      for (int64_t d = 0; d < depth; d += kSlice) {
        const int64_t slice = std::min(kSlice, depth - d);
        if (out.grad_hidden.data) {
          with_type(in.weight, [&](auto* w) {
            using T = std::remove_pointer_t<decltype(w)>;
            const T* start = w + d + (in.ids ? 0 : column * in.weight.stride);
            way.pack_panels<kNr>(Operand<T>{start, 1, in.weight.stride, nullptr, nullptr, nullptr, in.ids ? in.ids + column : nullptr},
                                 slice, columns, piece.get());
          });
          for (const Block* block = from; block < to; ++block)
            way.multiply(by_row.get() + block->at * kTile, block->size(), piece.get(), slice, columns,
                         grad_hidden_slice(*block, omp_get_thread_num(), d), kSlice, true);
        }
        if (out.grad_weight.data) add_grad_weight(by_token.get(), from, to, column, columns, d, slice, first);
      }
    });
    fence();
  }

  // dW[tile, slice] (+)= Z^T H, some tokens at a time: the next ones, and the next slice of W, arrive while these are made.
  void add_grad_weight(const float* by_token, const Block* from, const Block* to, int64_t column, int64_t columns, int64_t d,
                       int64_t slice, bool first) const {
    constexpr int64_t kMost = 4 * kMr;
    const int64_t some = way.pairs ? kMost : kMr;  // as many as leave room in L1 for the panels that are multiplied
    alignas(64) float part[kMost * kSlice];
    with_type(out.grad_weight, [&](auto* grad) {
      using T = std::remove_pointer_t<decltype(grad)>;
      auto row = [&](int64_t j) { return grad + token(column + j) * out.grad_weight.stride + d; };
      const int64_t size = in.weight.dtype == DType::fp32 ? 4 : 2;
      for (int64_t j = 0; j < columns; j += some) {
        for (int64_t i = j; i < std::min(j + some, columns); ++i) {
          if (i + some < columns && sizeof(T) == 4) prefetch(row(i + some), slice * sizeof(T));
          if (d + slice < depth)
            prefetch(static_cast<const char*>(in.weight.data) + (token(column + i) * in.weight.stride + d + slice) * size, slice * size);
        }
        const int64_t count = std::min<int64_t>(some, columns - j);
        for (const Block* block = from; block < to; ++block)
          way.multiply(by_token + block->at * kTile + j * way.steps(block->size()), count, hidden_slice(*block, d), slice,
                       block->size(), part, kSlice, block > from);
        for (int64_t i = 0; i < count; ++i) add_row(part + i * kSlice, slice, first, row(j + i));
      }
    });
  }
  static void add_row(const float* from, int64_t n, bool first, float* to) {
    if (first) std::copy_n(from, n, to);
    else for (int64_t k = 0; k < n; ++k) to[k] += from[k];
  }
  template <class T>
  static void add_row(const float* from, int64_t n, bool, T* to) {
    int64_t k = 0;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(T)) == 0;
    for (; k + kLanes <= n; k += kLanes) aligned ? stream(to + k, load(from + k)) : store_rounded(to + k, load(from + k));
    for (; k < n; ++k) from_float(from[k], to[k]);
  }

  void add_grad_hidden(const Block* from, const Block* to) const {
    for (const Block* block = from; block < to; ++block)
#pragma omp for nowait
      for (int64_t i = 0; i < block->size(); ++i) {
        float* row = static_cast<float*>(out.grad_hidden.data) + block->rows[i] * out.grad_hidden.stride;
        for (int t = 0; t < omp_get_num_threads(); ++t)
          for (int64_t d = 0; d < depth; ++d) row[d] += grad_hidden_slice(*block, t, d / kSlice * kSlice)[i * kSlice + d % kSlice];
      }
  }
};

// Zeroes the rows of the weight's gradient that no block will write.
void clear_untouched(const LinearProjectionKL& in, const LinearProjectionKLResult& out, bool all) {
  std::vector<bool> written(out.grad_weight.rows, false);
  for (int64_t j = 0; j < in.loss.width && !all; ++j) written[in.ids ? in.ids[j] : j] = true;
  with_type(out.grad_weight, [&](auto* grad) {
#pragma omp parallel for
    for (int64_t i = 0; i < out.grad_weight.rows; ++i)
      if (!written[i]) std::memset(grad + i * out.grad_weight.stride, 0, out.grad_weight.cols * sizeof *grad);
  });
}

}  // namespace

void linear_projection_kl(const LinearProjectionKL& in, const LinearProjectionKLResult& out) {
  std::vector<Block> blocks = blocks_of(in.loss, in.hidden.rows, out.block);
  if (out.grad_weight.data) clear_untouched(in, out, blocks.empty());
  if (blocks.empty()) return;
  const bool at_once = out.grad_weight.data && out.grad_weight.dtype != DType::fp32;
  int64_t most = 0, lines = 0;
  for (Block& block : blocks) {
    most = std::max(most, block.size());
    block.at = at_once ? lines : 0;
    lines = std::max(lines, block.at + block.lines());
  }
  const Problem problem(in, out, most, lines);
  auto make_gradients = [&](const Block* from, const Block* to, bool first) {
#pragma omp parallel num_threads(problem.threads)
    {
      problem.gradients(from, to, first);
#pragma omp barrier
      if (out.grad_hidden.data) problem.add_grad_hidden(from, to);
    }
  };
  for (const Block& block : blocks) {
    const bool first = &block == &blocks.front();
#pragma omp parallel num_threads(problem.threads)
    {
      problem.pack_hidden(block);
      problem.logits(block);
    }
    problem.compare(block);
    if (!out.upstream) continue;
#pragma omp parallel num_threads(problem.threads)
    problem.finish(block, first);
    if (!at_once) make_gradients(&block, &block + 1, first);
  }
  if (out.upstream && at_once) make_gradients(blocks.data(), blocks.data() + blocks.size(), true);
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
