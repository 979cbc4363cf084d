// The Python side: which instruction set this processor has, pointers in, the GIL released, rows
// over threads. No torch here: tensors come as addresses that fastkd/backends/cpu.py has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define FASTKD_ISA baseline
#include "divergence.h"
#include "isas.h"
#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace fastkd {

#define FASTKD_NAME(name, Struct) #name,
const char* const kDivergences[] = {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
const int kDivergenceCount = sizeof(kDivergences) / sizeof(kDivergences[0]);

namespace {

const Kernels* running = nullptr;

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all_isas())
    if (isa.runs) names.push_back(isa.name);
  return names;
}

void use_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : all_isas()) {
    if (isa.name == name) {
      if (!isa.runs) throw std::invalid_argument("isa: this processor does not have " + name);
      running = isa.kernels();
      return;
    }
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("isa: got '" + name + "', expected one of " + known);
}

std::vector<std::string> divergences() {
  return std::vector<std::string>(kDivergences, kDivergences + kDivergenceCount);
}

// float64 is in the baseline's table only.
const Kernels& table(bool wide) { return wide ? *baseline::kernels() : *running; }

using Address = uintptr_t;

// (address, dtype, rows to the inner dimension, outer stride, inner stride)
using Rows5 = py::tuple;
// (divergence, param, temperature, soft, hard, smoothing, vocab, classes)
using Plan8 = py::tuple;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The items of a tuple of numbers, one after the other. Taken out by hand: conversion to a
// std::tuple costs as much at every call as the arithmetic of a small loss.
class Items {
 public:
  Items(const py::tuple& from, Py_ssize_t size) : from_(from.ptr()) {
    if (PyTuple_GET_SIZE(from_) != size) throw std::invalid_argument("a tuple of another size");
  }
  int64_t whole() { return checked(PyLong_AsLongLong(PyTuple_GET_ITEM(from_, at_++))); }
  double real() { return checked(PyFloat_AsDouble(PyTuple_GET_ITEM(from_, at_++))); }

 private:
  template <class T>
  static T checked(T x) {
    if (x == T(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return x;
  }

  PyObject* from_;
  Py_ssize_t at_ = 0;
};

Operand operand(const Rows5& tuple) {
  Items next(tuple, 5);
  Operand x;
  x.data = at<char>(static_cast<Address>(next.whole()));
  x.dtype = static_cast<DType>(next.whole());
  x.b = next.whole();
  x.outer = next.whole();
  x.inner = next.whole();
  return x;
}

// Returns the index of the divergence.
int64_t take(Args& a, const Plan8& plan) {
  Items next(plan, 8);
  const int64_t divergence = next.whole();
  a.param = next.real();
  a.temperature = next.real();
  a.soft = next.real();
  a.hard = next.real();
  a.smoothing = next.real();
  a.vocab = next.whole();
  a.classes = next.whole();
  return divergence;
}

// Bytes from which a gradient is written past the caches: a smaller one is wanted there by the
// matrix product that comes next.
constexpr int64_t kStreamFrom = int64_t{1} << 24;

bool streams(const Args& a, int64_t rows) {
  return a.grad.data != nullptr && a.grad.data != a.student.data &&
         rows * a.width * size_of(a.grad.dtype) >= kStreamFrom;
}

void fused(int wide, int64_t rows, int threads, const Rows5& student, const Rows5& teacher,
           const Plan8& plan, Address keep, Address label, Address scale, double factor,
           const Rows5& grad, int64_t width, Address out) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(grad);
  const Passes& passes = table(wide).passes[take(a, plan)];
  a.width = width;
  a.keep = at<const uint8_t>(keep);
  a.label = at<const int64_t>(label);
  a.scale = at<const void>(scale);
  a.factor = factor;
  a.out = at<void>(out);
  a.stream = streams(a, rows);
  const bool same = a.student.dtype == a.teacher.dtype &&
                    (a.grad.data == nullptr || a.grad.dtype == a.student.dtype);
  const DType kind = same ? a.student.dtype : wide ? DType::f64 : DType::f32;
  const auto run = passes.fused[static_cast<int>(kind)];
  py::gil_scoped_release release;
  share(rows, a.vocab, threads,
        [&](int64_t begin, int64_t end, const Team& team) { run(a, begin, end, team); });
}

// The rows of a stored teacher: (logprobs, indices, tail, k, restricted).
void topk(int wide, int64_t rows, int threads, const Rows5& student, const py::tuple& teacher,
            double centre, const Plan8& plan, Address keep, Address label, Address scale,
            double factor, const Rows5& grad, int64_t width, Address out) {
  Args a;
  a.student = operand(student);
  a.grad = operand(grad);
  a.points = table(true).passes[take(a, plan)].points;
  Items next(teacher, 5);
  a.logprobs = at<const void>(static_cast<Address>(next.whole()));
  a.indices = at<const int64_t>(static_cast<Address>(next.whole()));
  a.tail = at<const void>(static_cast<Address>(next.whole()));
  a.k = next.whole();
  a.restricted = next.whole() != 0;
  a.centre = centre;
  a.width = width;
  a.keep = at<const uint8_t>(keep);
  a.label = at<const int64_t>(label);
  a.scale = at<const void>(scale);
  a.factor = factor;
  a.out = at<void>(out);
  a.stream = streams(a, rows);
  // sums and what the teacher gives are doubles where `wide`, whatever the student is
  const bool native = (a.student.dtype == DType::f64) == (wide != 0) &&
                      (a.grad.data == nullptr || a.grad.dtype == a.student.dtype);
  const DType kind = native ? a.student.dtype : wide ? DType::f64 : DType::f32;
  const auto run = table(wide).topk[static_cast<int>(kind)];
  py::gil_scoped_release release;
  share(rows, a.vocab, threads,
        [&](int64_t begin, int64_t end, const Team& team) { run(a, begin, end, team); });
}

// The first kept row of a stored teacher with a fault: (0 none, 1 index, 2 twice, 3 value; row,
// place).
template <class T>
std::tuple<int, int64_t, int64_t> admit_as(int64_t rows, int64_t k, const T* logprobs,
                                           const int64_t* indices, const uint8_t* keep,
                                           int64_t vocab) {
  std::vector<uint64_t> seen(static_cast<size_t>(vocab / 64 + 1));
  for (int64_t r = 0; r < rows; ++r) {
    if (keep != nullptr && !keep[r]) continue;
    const T* logp = logprobs + r * k;
    const int64_t* at = indices + r * k;
    int fault = 0;
    int64_t i = 0;
    for (; i < k && fault == 0; ++i) {
      if (at[i] == -1) continue;
      if (at[i] < -1 || at[i] >= vocab) {
        fault = 1;
        break;
      }
      const uint64_t bit = uint64_t{1} << (at[i] % 64);
      uint64_t& word = seen[static_cast<size_t>(at[i] / 64)];
      if (word & bit) fault = 2;
      if (fault == 0 && !(logp[i] <= T(0))) fault = 3;
      if (fault != 0) break;
      word |= bit;
    }
    if (fault != 0) return {fault, r, i};
    for (i = 0; i < k; ++i)
      if (at[i] >= 0) seen[static_cast<size_t>(at[i] / 64)] = 0;
  }
  return {0, -1, -1};
}

std::tuple<int, int64_t, int64_t> admit(int wide, int64_t rows, int64_t k, Address logprobs,
                                        Address indices, Address keep, int64_t vocab) {
  const int64_t* index = at<const int64_t>(indices);
  const uint8_t* kept = at<const uint8_t>(keep);
  return wide ? admit_as(rows, k, at<const double>(logprobs), index, kept, vocab)
              : admit_as(rows, k, at<const float>(logprobs), index, kept, vocab);
}

void stats(int wide, int64_t rows, int threads, const Rows5& x, double temperature, int64_t vocab,
           Address keep, Address out) {
  Args a;
  a.student = operand(x);
  a.temperature = temperature;
  a.vocab = vocab;
  a.keep = at<const uint8_t>(keep);
  a.out = at<void>(out);
  const auto run = table(wide).stats[wide];
  py::gil_scoped_release release;
  share(rows, 1, threads, [&](int64_t begin, int64_t end, const Team&) { run(a, begin, end); });
}

void loss(int wide, int64_t rows, int threads, const Rows5& student, const Rows5& teacher,
          const Plan8& plan, Address stats_s, Address stats_t, Address keep, Address out) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  const Passes& passes = table(wide).passes[take(a, plan)];
  a.stats_s = at<const void>(stats_s);
  a.stats_t = at<const void>(stats_t);
  a.keep = at<const uint8_t>(keep);
  a.out = at<void>(out);
  const auto run = passes.loss[wide];
  py::gil_scoped_release release;
  share(rows, 1, threads, [&](int64_t begin, int64_t end, const Team&) { run(a, begin, end); });
}

void grad(int wide, int64_t rows, int threads, const Rows5& student, const Rows5& teacher,
          const Plan8& plan, Address stats_s, Address stats_t, Address stats_hard, Address slope,
          Address keep, Address label, Address scale, double factor, const Rows5& out,
          int64_t width) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(out);
  const Passes& passes = table(wide).passes[take(a, plan)];
  a.width = width;
  a.stats_s = at<const void>(stats_s);
  a.stats_t = at<const void>(stats_t);
  a.stats_hard = at<const void>(stats_hard);
  a.slope = at<const void>(slope);
  a.keep = at<const uint8_t>(keep);
  a.label = at<const int64_t>(label);
  a.scale = at<const void>(scale);
  a.factor = factor;
  const auto run = passes.grad[wide];
  py::gil_scoped_release release;
  share(rows, 1, threads, [&](int64_t begin, int64_t end, const Team&) { run(a, begin, end); });
}

// The rows of a stage, and what it reads and writes of theirs alone.
struct Turn {
  explicit Turn(const py::tuple& tuple) {
    Items next(tuple, 5);
    first = next.whole();
    count = next.whole();
    sent = at<void>(static_cast<Address>(next.whole()));
    sums = at<const void>(static_cast<Address>(next.whole()));
    rates = at<const void>(static_cast<Address>(next.whole()));
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

// Stages of a call over ranks (see vocab_parallel.h): number 0 or 1 of the rows `some`; or 2 of `some`, and
// after each row 0 of one of `others`, which takes over its memory while the cache has it.
// place: (ranks, rank, threads, rows of the whole call).
void stage(int number, const py::tuple& place, const Rows5& student, const Rows5& teacher,
           const Plan8& plan, Address keep, Address label, Address scale, double factor,
           const Rows5& grad, int64_t width, Address out, Address redo, Address memory,
           const py::tuple& some, const py::tuple& others) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(grad);
  const Passes& passes = running->passes[take(a, plan)];
  a.width = width;
  Items next(place, 4);
  a.ranks = next.whole();
  a.rank = next.whole();
  const int threads = static_cast<int>(next.whole());
  a.stream = streams(a, next.whole());
  a.keep = at<const uint8_t>(keep);
  a.label = at<const int64_t>(label);
  a.scale = at<const void>(scale);
  a.factor = factor;
  a.memory = at<char>(memory);
  a.out = at<void>(out);
  a.redo = at<uint8_t>(redo);
  const bool same = a.student.dtype == a.teacher.dtype &&
                    (a.grad.data == nullptr || a.grad.dtype == a.student.dtype);
  const int kind = static_cast<int>(same ? a.student.dtype : DType::f32);
  Args b = a;
  Turn(some).into(a);
  Turn(others).into(b);
  const auto run = passes.stages[number][kind], begin_one = passes.stages[0][kind];
  py::gil_scoped_release release;
  share(a.rows > b.rows ? a.rows : b.rows, a.vocab, threads,
        [&](int64_t begin, int64_t end, const Team& team) {
          for (int64_t i = begin; i < end; ++i) {
            if (i < a.rows) run(a, a.first + i, a.first + i + 1, team);
            if (i < b.rows) begin_one(b, b.first + i, b.first + i + 1, team);
          }
        });
}

// keep = label is not ignored. Returns the first row whose label is out of range, or -1, and the
// number of rows kept.
std::pair<int64_t, int64_t> count(int64_t n, Address labels, int64_t ignore, int64_t vocab,
                                  Address keep) {
  const int64_t* label = at<const int64_t>(labels);
  uint8_t* out = at<uint8_t>(keep);
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = label[i] != ignore;
    if (kept && (label[i] < 0 || label[i] >= vocab)) return {i, sum};
    if (out != nullptr) out[i] = kept;
    sum += kept;
  }
  return {-1, sum};
}

// scale = keep * weight, divided by its sum where `mean` (0 where that is 0).
template <class T>
void weigh_as(int64_t n, const uint8_t* keep, const T* weight, bool mean, T* scale) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    scale[i] = keep == nullptr || keep[i] ? weight[i] : T(0);
    sum += scale[i];
  }
  if (mean)
    for (int64_t i = 0; i < n; ++i)
      scale[i] = sum == 0.0 ? T(0) : static_cast<T>(scale[i] / sum);
}

void weigh(int wide, int64_t n, Address keep, Address weight, bool mean, Address scale) {
  const uint8_t* kept = at<const uint8_t>(keep);
  if (wide) {
    weigh_as(n, kept, at<const double>(weight), mean, at<double>(scale));
  } else {
    weigh_as(n, kept, at<const float>(weight), mean, at<float>(scale));
  }
}

// factor * sum of scale * loss, in double and in the order of the rows.
template <class T>
void total_as(Address loss, Address scale, double factor, int64_t n, Address out) {
  const T* values = at<const T>(loss);
  const T* scales = at<const T>(scale);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i)
    sum += scales == nullptr ? values[i] : static_cast<double>(values[i]) * scales[i];
  *at<T>(out) = static_cast<T>(sum * factor);
}

void total(int wide, Address loss, Address scale, double factor, int64_t n, Address out) {
  if (wide) {
    total_as<double>(loss, scale, factor, n, out);
  } else {
    total_as<float>(loss, scale, factor, n, out);
  }
}

// fused and total in one call, for which the losses of the rows need no tensor.
void fused_total(int wide, int64_t rows, int threads, const Rows5& student, const Rows5& teacher,
                 const Plan8& plan, Address keep, Address label, Address scale, double factor,
                 const Rows5& grad, int64_t width, Address out) {
  const std::unique_ptr<char[]> memory(new char[rows * (wide ? sizeof(double) : sizeof(float))]);
  const Address losses = reinterpret_cast<Address>(memory.get());
  fused(wide, rows, threads, student, teacher, plan, keep, label, scale, factor, grad, width,
        losses);
  total(wide, losses, scale, factor, rows, out);
}

// Rows [outer, inner, width] of a gradient *= the number at `by`.
void multiply(const Rows5& grad, int64_t rows, int64_t width, int threads, int wide, Address by) {
  const double factor = wide ? *at<const double>(by) : static_cast<double>(*at<const float>(by));
  if (factor == 1.0) return;
  const Operand x = operand(grad);
  const Kernels* kernels = running;
  py::gil_scoped_release release;
  share(rows, 1, threads, [&](int64_t begin, int64_t end, const Team&) {
    for (int64_t r = begin; r < end; ++r) kernels->multiply(x.row(r), x.dtype, width, factor);
  });
}

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(_C, m) {
  using namespace fastkd;
  use_isa(isas().back());
  m.doc() = "Row passes of fastkd in C++; the caller is fastkd/backends/cpu.py, which checks everything.";
  m.def("isas", &isas, "Instruction sets this processor can run, best last.");
  m.def("isa", [] { return running->isa; }, "The instruction set in use.");
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("divergences", &divergences, "Names, in the order of their indices.");
  m.def("openmp", &openmp);
  m.def("compiler", [] { return __VERSION__; });
  m.def("math_error_bounds", [] {
    py::dict bounds;
    bounds["exp2"] = kExp2Ulp;
    bounds["log"] = kLogUlp;
    return bounds;
  });
  m.def("fused", &fused);
  m.def("topk", &topk);
  m.def("admit", &admit);
  m.def("stats", &stats);
  m.def("loss", &loss);
  m.def("grad", &grad);
  m.def("stage", &stage);
  m.def("slot", [](int64_t vocab, bool kept) { return running->slot(vocab, kept); });
  m.attr("most_columns") = kMostColumns;
  m.def("scratch", [](int64_t bytes) { return reinterpret_cast<Address>(scratch(bytes)); });
  m.def("fused_total", &fused_total);
  m.def("count", &count);
  m.def("weigh", &weigh);
  m.def("total", &total);
  m.def("multiply", &multiply);
  m.def("exp2", [](Address x, Address y, int64_t n) {
    running->exp2(at<const float>(x), at<float>(y), n);
  });
  m.def("log", [](Address x, Address y, int64_t n) {
    running->log(at<const float>(x), at<float>(y), n);
  });
}
