// Python's side of a call: tuples of numbers in, the arguments of a pass out. The numbers are
// addresses, shapes and strides that fastkd/backends/cpu.py has checked.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "kernels.h"

namespace fastkd {

namespace py = pybind11;

using Address = uintptr_t;

// (address, dtype, rows to the inner dimension, outer stride, inner stride)
using OperandTuple = py::tuple;
// (divergence, param, temperature, soft, hard, smoothing, vocab, classes, z)
using SpecTuple = py::tuple;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The items of a tuple of numbers, one after the other. They are taken out by hand: a conversion to
// std::tuple costs as much at every call as the arithmetic of a small loss.
class Items {
 public:
  Items(const py::tuple& from, Py_ssize_t size) : from_(from.ptr()) {
    if (PyTuple_GET_SIZE(from_) != size) throw std::invalid_argument("a tuple of another size");
  }
  int64_t integer() { return checked(PyLong_AsLongLong(PyTuple_GET_ITEM(from_, at_++))); }
  double real() { return checked(PyFloat_AsDouble(PyTuple_GET_ITEM(from_, at_++))); }
  Address address() { return static_cast<Address>(integer()); }

 private:
  template <class T>
  static T checked(T x) {
    if (x == T(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return x;
  }

  PyObject* from_;
  Py_ssize_t at_ = 0;
};

inline Operand operand(const OperandTuple& tuple) {
  Items next(tuple, 5);
  Operand x;
  x.data = at<char>(next.address());
  x.dtype = static_cast<DType>(next.integer());
  x.b = next.integer();
  x.outer = next.integer();
  x.inner = next.integer();
  return x;
}

// Sets the arguments that the loss spec gives, and returns the index of its divergence.
inline int64_t set_spec(Args& a, const SpecTuple& spec) {
  Items next(spec, 9);
  const int64_t divergence = next.integer();
  a.param = next.real();
  a.temperature = next.real();
  a.soft = next.real();
  a.hard = next.real();
  a.smoothing = next.real();
  a.vocab = next.integer();
  a.classes = next.integer();
  a.z = next.real();
  return divergence;
}

// What every pass with a gradient takes per row.
inline void set_rows(Args& a, Address keep, Address label, Address scale, double factor) {
  a.keep = at<const uint8_t>(keep);
  a.label = at<const int64_t>(label);
  a.scale = at<const void>(scale);
  a.factor = factor;
}

// A gradient of at least so many bytes is written past the caches. A smaller one is wanted in them
// by the matrix product that comes next.
constexpr int64_t kStreamFrom = int64_t{1} << 24;

inline bool streams(const Args& a, int64_t rows) {
  return a.grad.data != nullptr && a.grad.data != a.student.data &&
         rows * a.width * size_of(a.grad.dtype) >= kStreamFrom;
}

// The rows of a vocabulary-parallel step, and what the step reads and writes for these rows alone.
struct StepRows {
  explicit StepRows(const py::tuple& tuple) {
    Items next(tuple, 5);
    first = next.integer();
    count = next.integer();
    sent = at<void>(next.address());
    sums = at<const void>(next.address());
    rates = at<const void>(next.address());
  }
  void into(Args& a) const {
    a.first = first;
    a.rows = count;
    a.sent = sent;
    a.sums = sums;
    a.rates = rates;
  }
  int64_t first, count;
  void* sent;
  const void* sums;
  const void* rates;
};

}  // namespace fastkd
