// The logits of linear_kl, a block of rows by a tile of columns at a time: packed operands, their products, and what makes
// logits of them: shifts, scale and softcap.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/gemm_bf16.h"
#include "cpu/tensor.h"

namespace chassis {
namespace CHASSIS_ISA {

constexpr int64_t kTile = 128;              // columns
constexpr int64_t kBlock = 96 / kMr * kMr;  // rows
constexpr int64_t kSum = 128;               // additions per running sum: longer ones lose digits
constexpr int64_t kPairSum = 1024;          // the same for pairs of bf16, which have fewer to lose
static_assert(kTile % kNr == 0, "panels must be whole");

// One term of the logits: left [rows, depth] times right, which is [columns, depth] or, across, [depth, columns].
struct Product {
  Matrix left, right;
  bool across;
  Multiplier way;

  Product(const Matrix& left, const Matrix& right, bool across)
      : left(left), right(right), across(across),
        way{!across && left.dtype == DType::bf16 && right.dtype == DType::bf16 && has_bf16_products()} {}

  void pack_left(int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) const {
    pack_operand<kMr>(left, row, rows, k, depth, left.stride, 1, out);
  }
  void pack_right(int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) const {
    pack_operand<kNr>(right, column, columns, k, depth, across ? 1 : right.stride, across ? right.stride : 1, out);
  }
  // out [rows, kNr] (+)= a packed panel of `columns` columns; meanwhile rows [next, end) of `right` are fetched for these steps.
  void multiply(const float* a, int64_t rows, const float* b, int64_t columns, int64_t k, int64_t depth, float* out,
                bool accumulate, int64_t next, int64_t end) const {
    const int64_t steps = way.steps(depth);
    for (int64_t i = 0; i < rows; i += kMr) {
      const int64_t here = std::min<int64_t>(kMr, rows - i);
      if (!across) fetch(next + (end - next) * i / rows, next + (end - next) * (i + here) / rows, k, depth);
      way.multiply(a + i * steps, here, b, columns, depth, out + i * kTile, kTile, accumulate);
    }
  }

 private:
  void fetch(int64_t first, int64_t last, int64_t k, int64_t depth) const {
    const int64_t size = right.dtype == DType::fp32 ? 4 : 2;
    for (int64_t row = first; row < std::min(last, right.rows); ++row)
      for (int64_t at = 0; at < depth * size; at += 64)
        __builtin_prefetch(static_cast<const char*>(right.data) + (row * right.stride + k) * size + at, 0, 2);
  }

  template <int kWidth>
  void pack_operand(const Matrix& m, int64_t i, int64_t n, int64_t k, int64_t depth, int64_t stride, int64_t depth_stride,
                    float* out) const {
    with_type(m, [&](auto* p) {
      Operand<std::remove_pointer_t<decltype(p)>> operand{p, stride, depth_stride};
      way.pack_panels<kWidth>(operand.from(i, k), n, depth, out);
    });
  }
};

// One of the two distributions: the products that make its logits, or the logits themselves.
class Side {
 public:
  Side(const Matrix& h, const Matrix& W, const Matrix& u, const Matrix& v, const Matrix& bias, const Matrix& c, float softcap,
       float scale, int64_t vocabulary)
      : softcap(softcap), scale(scale), given(W.data ? Matrix{} : h) {
    if (W.data) products.emplace_back(h, W, false);
    if (u.data) products.emplace_back(u, v, true);
    for (const Product& product : products) depth += product.left.cols;
    if (!bias.data && !c.data) return;
    shift.assign(vocabulary, 0.0f);
    for (const Matrix& term : {bias, c})
      with_type(term, [&](auto* p) {
        for (int64_t j = 0; p && j < vocabulary; ++j) shift[j] += to_float(p[j]);
      });
  }

  const float softcap, scale;
  int64_t depth = 0;

  int64_t rows_size() const { return kBlock * depth; }  // floats for a packed block of rows, and for a panel of columns
  int64_t panel_size() const { return kNr * depth; }

  void pack_rows(int64_t row, int64_t rows, float* out) const {
    each_depth([&](const Product& p, int64_t k, int64_t steps, int64_t at) { p.pack_left(row, rows, k, steps, out + at * kBlock); });
  }
  void pack_panel(int64_t column, int64_t columns, float* out) const {
    each_depth([&](const Product& p, int64_t k, int64_t steps, int64_t at) {
      p.pack_right(column, columns, k, steps, out + at * kNr);
    });
  }
  // z [rows, columns] (row stride kTile) = the products of a packed block and a packed panel; rows [next, end) of the head are
  // fetched meanwhile.
  void multiply(const float* block, int64_t rows, const float* panel, int64_t columns, float* z, int64_t next, int64_t end) const {
    each_depth([&](const Product& p, int64_t k, int64_t steps, int64_t at) {
      p.multiply(block + at * kBlock, rows, panel + at * kNr, columns, k, steps, z, at > 0, next, end);
    });
  }

  // z [rows, kTile]: makes logits of a tile of products, -inf beyond its columns.
  void finish(int64_t row, int64_t rows, int64_t column, int64_t columns, float* z) const {
    if (depth == 0) std::fill_n(z, rows * kTile, 0.0f);
    if (!given.data && shift.empty() && scale == 1 && softcap == 0 && columns == kTile) return;
    for (int64_t i = 0; i < rows; ++i, z += kTile) {
      if (given.data)
        with_type(given, [&](auto* p) {
          p += (row + i) * given.stride + column;
          for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load_line(p + j, 1, columns - j));
        });
      if (!shift.empty())
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load(z + j) + load_line(shift.data() + column + j, 1, columns - j));
      if (scale != 1)
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, load(z + j) * scale);
      if (softcap > 0)
        for (int64_t j = 0; j < columns; j += kLanes) store(z + j, softcap * tanh(load(z + j) / softcap));
      std::fill(z + columns, z + kTile, -kInf);
    }
  }

 private:
  const Matrix given;
  std::vector<Product> products;
  std::vector<float> shift;

  template <class F>
  void each_depth(F f) const {
    int64_t at = 0;
    for (const Product& product : products)
      for (int64_t k = 0, steps; k < product.left.cols; k += steps, at += steps) {
        steps = std::min(product.way.pairs ? 2 * kPairSum : kSum, product.left.cols - k);
        f(product, k, steps, at);
      }
  }
};

}  // namespace CHASSIS_ISA
}  // namespace chassis
