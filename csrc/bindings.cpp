// The Python module chassis_kernels._C: turns (pointer, shape, stride, dtype) tuples into kernel arguments, releases the
// interpreter lock and calls the variant for this processor. Arguments are checked in Python, before they come here, except
// those of delta_logits_, which a decoding model calls for every token.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"
#include "dlpack.h"

namespace py = pybind11;
using chassis::DType;
using chassis::Matrix;

namespace {

// (data_ptr, rows, cols, row_stride, dtype) or None
Matrix matrix(const py::object& given) {
  if (given.is_none()) return {};
  auto t = given.cast<py::tuple>();
  return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>(), static_cast<DType>(t[4].cast<int>())};
}

template <class T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// nine tensors, then softcap_a, softcap_b (0: none), scale_a, scale_b
chassis::LinearKL linear_kl_args(const py::tuple& t) {
  return {matrix(t[0]), matrix(t[1]), matrix(t[2]), matrix(t[3]), matrix(t[4]), matrix(t[5]), matrix(t[6]), matrix(t[7]),
          matrix(t[8]), t[9].cast<float>(), t[10].cast<float>(), t[11].cast<float>(), t[12].cast<float>()};
}

template <class T>
T* at(const py::tuple& pointers, int i) { return pointer<T>(pointers[i].cast<uintptr_t>()); }

chassis::LinearKLGradients linear_kl_gradients(const py::tuple& t) { return {at<float>(t, 0), at<float>(t, 1), at<float>(t, 2)}; }

// teacher, (start, rows, weights, teacher tokens), (columns, how many), (student_chunk, teacher_chunk, how many), labels,
// width, (temperature, divergence, tail); the student comes apart
chassis::ProjectionKL projection_kl_args(const py::tuple& t) {
  auto projection = t[1].cast<py::tuple>(), columns = t[2].cast<py::tuple>(), chunks = t[3].cast<py::tuple>(),
       options = t[6].cast<py::tuple>();
  return {{}, matrix(t[0]), at<int64_t>(projection, 0), at<int32_t>(projection, 1), at<float>(projection, 2),
          projection[3].cast<int64_t>(), at<int64_t>(columns, 0), columns[1].cast<int64_t>(), at<int64_t>(chunks, 0),
          at<int64_t>(chunks, 1), at<int64_t>(t, 4), t[5].cast<int64_t>(), chunks[2].cast<int64_t>(), options[0].cast<float>(),
          options[1].cast<int64_t>(), options[2].cast<bool>()};
}

// reflectors, factors, diagonal, off, C, alphas
chassis::Tridiagonal tridiagonal_args(const py::tuple& t) {
  return {matrix(t[0]), matrix(t[1]), matrix(t[2]), matrix(t[3]), matrix(t[4]), matrix(t[5])};
}

// The arguments of delta_logits_ from what Python was given; false unless each lies as the kernel reads it and all fit.
bool delta_logits_args(const py::object (&given)[8], chassis::DeltaLogits& args) {
  enum { logits, hidden, U, V, bias, mean, cols, ids };
  chassis::DLTensor t[8];
  for (int i = 0; i < 8; ++i) {
    if (given[i].is_none() ? i < bias : !chassis::borrow(given[i].ptr(), t[i])) return false;
  }
  auto there = [&](int i) { return !given[i].is_none(); };
  if (!as_rows(t[logits], args.logits) || !as_rows(t[hidden], args.hidden) || t[logits].dims != t[hidden].dims) return false;
  if (!std::equal(t[logits].shape, t[logits].shape + t[logits].dims - 1, t[hidden].shape)) return false;
  if (args.logits.rows > 1 && args.logits.stride < args.logits.cols) return false;  // rows that share memory
  const bool stacked = t[U].dims == 3;
  if ((!stacked && t[U].dims != 2) || t[V].dims != t[U].dims) return false;
  const int64_t n = args.logits.rows, width = args.hidden.cols, rank = t[U].shape[t[U].dims - 1];
  const int64_t columns = t[V].shape[t[V].dims - 1], adapters = stacked ? t[U].shape[0] : 1;
  auto fits = [&](int i, std::initializer_list<int64_t> one, std::initializer_list<int64_t> all) {
    return is_dense(t[i], stacked ? all : one);
  };
  auto vectors = [&](int i, int64_t size, Matrix& out) {
    return !there(i) || (fits(i, {size}, {adapters, size}) && as_matrix(t[i], out));
  };
  if (!fits(U, {width, rank}, {adapters, width, rank}) || !as_matrix(t[U], args.U)) return false;
  if (!fits(V, {rank, columns}, {adapters, rank, columns}) || !as_matrix(t[V], args.V)) return false;
  if (!vectors(bias, columns, args.bias) || !vectors(mean, width, args.mean)) return false;
  args.adapters = adapters;
  args.stride_U = stacked ? t[U].stride[0] : 0;
  args.stride_V = stacked ? t[V].stride[0] : 0;
  args.stride_cols = 0;
  args.cols = args.adapter_id = nullptr;
  if (there(cols)) {
    const bool own = stacked && t[cols].dims == 2;
    if (!(is_dense(t[cols], {columns}) || (own && is_dense(t[cols], {adapters, columns}))) || !is_int64(t[cols])) return false;
    args.stride_cols = own ? t[cols].stride[0] : 0;
    args.cols = static_cast<int64_t*>(t[cols].data);
  } else if (columns != args.logits.cols) {
    return false;
  }
  if (!there(ids)) return adapters == 1;
  args.adapter_id = static_cast<int64_t*>(t[ids].data);
  return stacked && adapters > 0 && is_dense(t[ids], {n}) && is_int64(t[ids]);
}

enum class Isa { portable, avx2, avx512 };

Isa detect() {
  Isa best = Isa::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
#ifdef CHASSIS_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = Isa::avx2;
#endif
#ifdef CHASSIS_HAVE_AVX512
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
#endif
  return best;
}

// CHASSIS_CPU_ISA=portable|avx2|avx512 lowers the choice (tests run every variant); asking for more than there is raises.
Isa chosen() {
  static const Isa isa = [] {
    Isa best = detect();
    const char* asked = std::getenv("CHASSIS_CPU_ISA");
    if (!asked || !*asked) return best;
    Isa wanted;
    if (!std::strcmp(asked, "portable")) wanted = Isa::portable;
    else if (!std::strcmp(asked, "avx2")) wanted = Isa::avx2;
    else if (!std::strcmp(asked, "avx512")) wanted = Isa::avx512;
    else throw std::runtime_error(std::string("CHASSIS_CPU_ISA=") + asked + ": expected portable, avx2 or avx512");
    if (wanted > best)
      throw std::runtime_error(std::string("CHASSIS_CPU_ISA=") + asked + " is not available on this processor or build");
    return wanted;
  }();
  return isa;
}

#ifdef CHASSIS_HAVE_AVX512
#define CASE_AVX512(CALL) case Isa::avx512: chassis::avx512::CALL; break;
#else
#define CASE_AVX512(CALL)
#endif
#ifdef CHASSIS_HAVE_AVX2
#define CASE_AVX2(CALL) case Isa::avx2: chassis::avx2::CALL; break;
#else
#define CASE_AVX2(CALL)
#endif
#define DISPATCH(CALL)                              \
  do {                                              \
    Isa isa = chosen();                             \
    py::gil_scoped_release unlocked;                \
    switch (isa) {                                  \
      CASE_AVX512(CALL) CASE_AVX2(CALL)             \
      default: chassis::portable::CALL;             \
    }                                               \
  } while (0)

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of chassis_kernels; call them through the ops, which check their arguments.";
  m.def("isa", [] { return chosen() == Isa::avx512 ? "avx512" : chosen() == Isa::avx2 ? "avx2" : "portable"; });
  m.def("exp_nonpositive", [](uintptr_t x, uintptr_t out, int64_t n) {
    DISPATCH(exp_nonpositive(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), n));
  });
  m.def("convert", [](const py::object& x, const py::object& out) {
    Matrix from = matrix(x), to = matrix(out);
    DISPATCH(convert(from, to));
  });
  m.def("moments_update", [](const py::list& layers) {
    std::vector<chassis::MomentsUpdate> sets;
    for (const auto& layer : layers) {
      auto t = layer.cast<py::tuple>();
      sets.push_back({matrix(t[0]), matrix(t[1]), matrix(t[2]), matrix(t[3]), matrix(t[4]), matrix(t[5]), matrix(t[6]),
                      matrix(t[7]), matrix(t[8])});
    }
    DISPATCH(moments_update(sets));
  });
  m.def("tridiagonal_reduce_", [](const py::object& symmetric, uintptr_t diagonal, uintptr_t off, uintptr_t scales) {
    Matrix S = matrix(symmetric);
    DISPATCH(tridiagonal_reduce_(S, pointer<double>(diagonal), pointer<double>(off), pointer<double>(scales)));
  });
  m.def("tridiagonal_path", [](const py::tuple& inputs, const py::object& rotated, const py::tuple& sums) {
    chassis::Tridiagonal args = tridiagonal_args(inputs);
    Matrix R = matrix(rotated);
    double *dots = at<double>(sums, 0), *squares = at<double>(sums, 1), *traces = at<double>(sums, 2);
    DISPATCH(tridiagonal_path(args, R, dots, squares, traces));
  });
  m.def("tridiagonal_solve", [](const py::tuple& inputs, const py::object& out) {
    chassis::Tridiagonal args = tridiagonal_args(inputs);
    Matrix W = matrix(out);
    DISPATCH(tridiagonal_solve(args, W));
  });
  // The tensors themselves; returns false, with nothing done, unless they fit and a kernel can read them as they lie.
  m.def("delta_logits_", [](const py::object& logits, const py::object& hidden, const py::object& U, const py::object& V,
                            const py::object& bias, const py::object& mean, const py::object& cols, const py::object& ids) {
    chassis::DeltaLogits args{};
    if (!delta_logits_args({logits, hidden, U, V, bias, mean, cols, ids}, args)) return false;
    DISPATCH(delta_logits_(args));
    return true;
  });
  m.def("linear_kl", [](const py::tuple& inputs, const py::tuple& result, const py::tuple& grads, const py::object& room) {
    chassis::LinearKL args = linear_kl_args(inputs);
    chassis::LinearKLResult out{at<float>(result, 0), at<double>(result, 1), at<double>(result, 2), at<int64_t>(result, 3),
                                at<int64_t>(result, 4)};
    chassis::LinearKLGradients wanted = linear_kl_gradients(grads);
    Matrix kept = matrix(room);
    DISPATCH(linear_kl(args, out, wanted, kept));
  });
  m.def("linear_kl_backward", [](const py::tuple& inputs, uintptr_t grad, uintptr_t lse_a, uintptr_t lse_b,
                                 const py::tuple& grads) {
    chassis::LinearKL args = linear_kl_args(inputs);
    chassis::LinearKLGradients wanted = linear_kl_gradients(grads);
    DISPATCH(linear_kl_backward(args, pointer<float>(grad), pointer<double>(lse_a), pointer<double>(lse_b), wanted));
  });
  m.def("projection_kl", [](const py::object& student, const py::tuple& inputs, const py::tuple& result, bool known,
                            const py::object& grad, const py::tuple& upstream) {
    chassis::ProjectionKL args = projection_kl_args(inputs);
    args.student = matrix(student);
    chassis::ProjectionKLResult out{at<float>(result, 0), at<bool>(result, 1), at<float>(result, 2), at<float>(result, 3),
                                    at<float>(result, 4), at<float>(result, 5), known, matrix(grad), at<float>(upstream, 0),
                                    at<float>(upstream, 1)};
    DISPATCH(projection_kl(args, out));
  });
  m.def("linear_projection_kl", [](const py::tuple& head, const py::tuple& inputs, const py::tuple& result,
                                   const py::tuple& upstream, const py::tuple& gradients, int64_t block) {
    chassis::LinearProjectionKL args{matrix(head[0]), matrix(head[1]), matrix(head[2]), at<int64_t>(head, 3),
                                     head[4].cast<float>(), projection_kl_args(inputs)};
    chassis::LinearProjectionKLResult out{at<float>(result, 0), at<bool>(result, 1), at<float>(result, 2), at<bool>(result, 3),
                                          at<float>(upstream, 0), at<float>(upstream, 1), matrix(gradients[0]),
                                          matrix(gradients[1]), at<float>(gradients, 2), block};
    DISPATCH(linear_projection_kl(args, out));
  });
  m.def("top_columns", [](const py::object& logits, uintptr_t keep, int64_t k, uintptr_t out) {
    Matrix from = matrix(logits);
    DISPATCH(top_columns(from, pointer<uint8_t>(keep), k, pointer<int64_t>(out)));
  });
  m.def("token_kl", [](const py::object& student, const py::object& teacher, uintptr_t columns, int64_t k, uintptr_t keep,
                       float temperature, bool reverse, uintptr_t kl, uintptr_t weight, const py::object& grad) {
    chassis::TokenKL args{matrix(student), matrix(teacher), pointer<int64_t>(columns), k, pointer<bool>(keep),
                          temperature, reverse};
    chassis::TokenKLResult out{pointer<float>(kl), pointer<float>(weight), matrix(grad)};
    DISPATCH(token_kl(args, out));
  });
  m.def("gold_kl", [](const py::object& student, const py::object& teacher, const py::tuple& pairs, const py::tuple& chunks,
                      float temperature, int64_t uncommon_topk, bool reverse, const py::tuple& result, const py::tuple& weights,
                      const py::object& grad) {
    auto at = [](const py::tuple& pointers, int i) { return pointers[i].cast<uintptr_t>(); };
    chassis::GoldKL args{matrix(student), matrix(teacher), pointer<int64_t>(at(pairs, 0)), pointer<int64_t>(at(pairs, 1)),
                         pairs[2].cast<int64_t>(), pointer<int64_t>(at(chunks, 0)), pointer<int64_t>(at(chunks, 1)),
                         chunks[2].cast<int64_t>(), uncommon_topk, temperature, reverse};
    chassis::GoldKLResult out{pointer<float>(at(result, 0)), pointer<float>(at(result, 1)), pointer<bool>(at(result, 2)),
                              pointer<float>(at(weights, 0)), pointer<float>(at(weights, 1)), matrix(grad)};
    DISPATCH(gold_kl(args, out));
  });
  m.def("bridge_project", [](const py::object& logits, const py::tuple& pointers, const py::tuple& sizes, float temperature,
                             bool normalize, const py::tuple& result) {
    auto at = [&](int i) { return pointers[i].cast<uintptr_t>(); };
    auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
    auto output = [&](int i) { return pointer<float>(result[i].cast<uintptr_t>()); };
    chassis::BridgeProject args{matrix(logits), pointer<int64_t>(at(0)), pointer<int64_t>(at(1)), pointer<float>(at(2)),
                                pointer<float>(at(3)), pointer<int64_t>(at(4)), pointer<int64_t>(at(5)),
                                pointer<int64_t>(at(6)), pointer<int32_t>(at(7)), pointer<float>(at(8)),
                                pointer<float>(at(9)), pointer<float>(at(10)), pointer<int64_t>(at(11)),
                                pointer<int32_t>(at(12)), pointer<int64_t>(at(13)), pointer<float>(at(14)), size(0), size(1),
                                size(2), size(3), size(4), temperature, normalize};
    chassis::BridgeProjectResult out{output(0), output(1), output(2)};
    DISPATCH(bridge_project(args, out));
  });
  m.def("log_sums", [](const py::object& logits, float temperature, uintptr_t out) {
    chassis::Matrix args = matrix(logits);
    DISPATCH(log_sums(args, temperature, pointer<float>(out)));
  });
}
