// The Python module chassis_kernels._CUDA: turns tuples of pointers and sizes into kernel arguments and launches on the stream
// given. Arguments are checked in Python, before they come here.
#include <pybind11/pybind11.h>

#include "cuda/ops.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(const py::handle& address) { return reinterpret_cast<T*>(address.cast<uintptr_t>()); }

// (data_ptr, rows, cols, row_stride, dtype) or None
chassis::Matrix matrix(const py::handle& given) {
  if (given.is_none()) return {};
  auto t = py::reinterpret_borrow<py::tuple>(given);
  return {pointer<void>(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          static_cast<chassis::DType>(t[4].cast<int>())};
}

chassis::cuda::Members members(const py::handle& given) {
  auto t = py::reinterpret_borrow<py::tuple>(given);
  return {pointer<int64_t>(t[0]), pointer<int64_t>(t[1])};
}

// the projection (start, rows, weights), J (columns, place), k, width, and the nine pointers that are written
chassis::cuda::Slice slice(const py::tuple& t) {
  return {pointer<int64_t>(t[0]),  pointer<int32_t>(t[1]),  pointer<float>(t[2]),
          pointer<int64_t>(t[3]),  pointer<int32_t>(t[4]),  t[5].cast<int64_t>(),
          t[6].cast<int64_t>(),    pointer<int32_t>(t[7]),  pointer<int32_t>(t[8]),
          pointer<int32_t>(t[9]),  pointer<chassis::cuda::Word>(t[10]), pointer<int32_t>(t[11]),
          pointer<int32_t>(t[12]), pointer<int32_t>(t[13]), pointer<chassis::cuda::Entry>(t[14]),
          pointer<uint32_t>(t[15])};
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "CUDA kernels of chassis_kernels; call them through the ops, which check their arguments.";
  m.def("set_device", &chassis::cuda::set_device);
  m.def("count_rows", [](const py::tuple& s, uintptr_t stream) {
    chassis::cuda::count_rows(slice(s), reinterpret_cast<void*>(stream));
  });
  m.def("slice_rows", [](const py::tuple& s, uintptr_t stream) {
    chassis::cuda::slice_rows(slice(s), reinterpret_cast<void*>(stream));
  });
  m.def("projection_kl_launch", [](int student, int64_t outcomes, int64_t touched) {
    const auto plan = chassis::cuda::projection_kl_launch(static_cast<chassis::DType>(student), outcomes, touched);
    return py::make_tuple(plan.blocks, plan.shared, plan.scratch);
  });
  m.def("projection_kl", [](const py::object& student, const py::object& teacher, const py::tuple& s, const py::tuple& chunks,
                            const py::tuple& options, const py::tuple& result, bool known, const py::object& grad,
                            const py::tuple& weights, const py::tuple& launch, const py::tuple& work, uintptr_t stream) {
    const chassis::cuda::ProjectionKL in{matrix(student), matrix(teacher), slice(s), members(chunks[0]), members(chunks[1]),
                                         pointer<int64_t>(chunks[2]), chunks[3].cast<int64_t>(), chunks[4].cast<int64_t>(),
                                         options[0].cast<float>(), options[1].cast<int>(), options[2].cast<bool>()};
    const chassis::cuda::ProjectionKLResult out{
        pointer<float>(result[0]), pointer<bool>(result[1]), pointer<float>(result[2]), pointer<float>(result[3]),
        pointer<float>(result[4]), pointer<float>(result[5]), known, matrix(grad),
        pointer<float>(weights[0]), pointer<float>(weights[1])};
    chassis::cuda::projection_kl(in, out, {launch[0].cast<int>(), launch[1].cast<int64_t>(), launch[2].cast<int64_t>()},
                                 pointer<float>(work[0]), pointer<int32_t>(work[1]), reinterpret_cast<void*>(stream));
  });
}
