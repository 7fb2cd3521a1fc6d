// torch's tensors seen from C++ without its headers: the C exchange API of DLPack 1, which every supported torch offers as
// `torch.Tensor.__dlpack_c_exchange_api__` (https://dmlc.github.io/dlpack/latest/c_api.html). Asking seven tensors for their
// attributes in Python costs as much as a small kernel; this costs next to nothing.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/ops.h"

namespace chassis {

struct DLTensor {
  void* data;
  int32_t device, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *stride;
  uint64_t offset;
};

struct DLExchange {
  uint32_t major, minor;
  const void* earlier;
  void *allocate, *own, *wrap;
  int (*borrow)(void* object, DLTensor* out);
  void* stream;
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// A tensor's memory and shape, borrowed from the object. False for anything but a torch.Tensor, or a Parameter, that lies in
// the memory of the processor: subclasses and what torch wraps are for its dispatcher.
inline bool borrow(PyObject* object, DLTensor& out) {
  namespace py = pybind11;
  struct Torch { PyTypeObject *tensor, *parameter; const DLExchange* exchange; };
  static const Torch torch = [] {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    py::object parameter = py::module_::import("torch.nn").attr("Parameter");
    py::capsule exchange = tensor.attr("__dlpack_c_exchange_api__");
    auto* found = static_cast<const DLExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->major != 1 || !found->borrow)
      throw std::runtime_error("torch speaks DLPack " + std::to_string(found->major) + ": expected 1, with borrowed tensors");
    return Torch{reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
                 reinterpret_cast<PyTypeObject*>(parameter.release().ptr()), found};
  }();
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  if (torch.exchange->borrow(object, &out) == 0) return out.device == kCpu && out.lanes == 1 && out.offset == 0;
  PyErr_Clear();
  return false;
}

inline bool is_int64(const DLTensor& t) { return t.code == kInt && t.bits == 64; }

// Whether t has this shape and its last dimension is contiguous.
inline bool is_dense(const DLTensor& t, std::initializer_list<int64_t> shape) {
  if (t.dims != int64_t(shape.size()) || !std::equal(shape.begin(), shape.end(), t.shape)) return false;
  return t.dims == 0 || t.shape[t.dims - 1] <= 1 || t.stride[t.dims - 1] == 1;
}

// t's last two dimensions, of its first entry where there are more, in fp32, bf16 or fp16; false for other dtypes.
inline bool as_matrix(const DLTensor& t, Matrix& out) {
  int last = t.dims - 1;
  out = {t.data, last > 0 ? t.shape[last - 1] : 1, t.shape[last], last > 0 ? t.stride[last - 1] : 0};
  out.dtype = t.code == kBfloat ? DType::bf16 : t.bits == 16 ? DType::fp16 : DType::fp32;
  return t.bits == (out.dtype == DType::fp32 ? 32 : 16) && (t.code == kFloat || t.code == kBfloat);
}

// t [..., columns] as one matrix; false where its leading dimensions do not merge, or the last is not contiguous.
inline bool as_rows(const DLTensor& t, Matrix& out) {
  if (t.dims < 1 || !as_matrix(t, out) || (out.cols > 1 && t.stride[t.dims - 1] != 1)) return false;
  out.rows = 1;
  out.stride = out.cols;
  for (int d = t.dims - 2; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (out.rows == 1) out.stride = t.stride[d];
    else if (t.stride[d] != out.stride * out.rows) return false;
    out.rows *= t.shape[d];
  }
  return true;
}

}  // namespace chassis
