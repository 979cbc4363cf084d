// The extension module fastkd._C. It picks the instruction set, turns addresses into pointers,
// releases the GIL and spreads rows over threads. torch is not used here: fastkd/backends/cpu.py
// checks the tensors and passes their addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define FASTKD_ISA baseline
#include "arguments.h"
#include "divergence.h"
#include "host_loops.h"
#include "isas.h"
#include "kernels.h"
#include "threads.h"

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

// Only the baseline's table has float64.
const Kernels& table(bool wide) { return wide ? *baseline::kernels() : *running; }

// Runs a pass over all rows, without the GIL.
void run(Pass pass, const Args& a, int64_t rows, int threads) {
  py::gil_scoped_release release;
  over_rows(rows, 1, threads,
            [&](int64_t begin, int64_t end, const ThreadPool&) { pass(a, begin, end); });
}
void run(ThreadedPass pass, const Args& a, int64_t rows, int threads) {
  py::gil_scoped_release release;
  over_rows(rows, a.vocab, threads,
            [&](int64_t begin, int64_t end, const ThreadPool& pool) { pass(a, begin, end, pool); });
}

// ---- the passes

// The dtype that all operands have in common, if they have one; else blocks are converted to the
// accumulation type.
DType block_dtype(const Args& a, int wide) {
  const bool same = a.student.dtype == a.teacher.dtype &&
                    (a.grad.data == nullptr || a.grad.dtype == a.student.dtype);
  return same ? a.student.dtype : wide ? DType::f64 : DType::f32;
}

void fused(int wide, int64_t rows, int threads, const OperandTuple& student,
           const OperandTuple& teacher, const SpecTuple& spec, Address keep, Address label,
           Address scale, double factor, const OperandTuple& grad, int64_t width, Address out,
           Address outputs) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(grad);
  const Passes& passes = table(wide).passes[set_spec(a, spec)];
  a.width = width;
  set_rows(a, keep, label, scale, factor);
  a.out = at<void>(out);
  a.outputs = at<void>(outputs);
  a.stream = streams(a, rows);
  run(passes.fused[static_cast<int>(block_dtype(a, wide))], a, rows, threads);
}

// teacher: (logprobs, indices, tail, k, restricted).
void topk(int wide, int64_t rows, int threads, const OperandTuple& student,
          const py::tuple& teacher, double centre, const SpecTuple& spec, Address keep,
          Address label, Address scale, double factor, const OperandTuple& grad, int64_t width,
          Address out, Address outputs) {
  Args a;
  a.student = operand(student);
  a.grad = operand(grad);
  a.points = table(true).passes[set_spec(a, spec)].points;
  Items next(teacher, 5);
  a.logprobs = at<const void>(next.address());
  a.indices = at<const int64_t>(next.address());
  a.tail = at<const void>(next.address());
  a.k = next.integer();
  a.restricted = next.integer() != 0;
  a.centre = centre;
  a.width = width;
  set_rows(a, keep, label, scale, factor);
  a.out = at<void>(out);
  a.outputs = at<void>(outputs);
  a.stream = streams(a, rows);
  // `wide` says that sums and the teacher's numbers are doubles, whatever the student's dtype is
  const bool native = (a.student.dtype == DType::f64) == (wide != 0) &&
                      (a.grad.data == nullptr || a.grad.dtype == a.student.dtype);
  const DType kind = native ? a.student.dtype : wide ? DType::f64 : DType::f32;
  run(table(wide).topk[static_cast<int>(kind)], a, rows, threads);
}

void stats(int wide, int64_t rows, int threads, const OperandTuple& x, double temperature,
           int64_t vocab, Address keep, Address out) {
  Args a;
  a.student = operand(x);
  a.temperature = temperature;
  a.vocab = vocab;
  a.keep = at<const uint8_t>(keep);
  a.out = at<void>(out);
  run(table(wide).stats[wide], a, rows, threads);
}

void loss(int wide, int64_t rows, int threads, const OperandTuple& student,
          const OperandTuple& teacher, const SpecTuple& spec, Address stats_s, Address stats_t,
          Address keep, Address out) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  const Passes& passes = table(wide).passes[set_spec(a, spec)];
  a.stats_s = at<const void>(stats_s);
  a.stats_t = at<const void>(stats_t);
  a.keep = at<const uint8_t>(keep);
  a.out = at<void>(out);
  run(passes.loss[wide], a, rows, threads);
}

void grad(int wide, int64_t rows, int threads, const OperandTuple& student,
          const OperandTuple& teacher, const SpecTuple& spec, Address stats_s, Address stats_t,
          Address stats_hard, Address pairs, Address keep, Address label, Address scale,
          double factor, const OperandTuple& out, int64_t width) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(out);
  const Passes& passes = table(wide).passes[set_spec(a, spec)];
  a.width = width;
  a.stats_s = at<const void>(stats_s);
  a.stats_t = at<const void>(stats_t);
  a.stats_hard = at<const void>(stats_hard);
  a.pairs = at<const void>(pairs);
  set_rows(a, keep, label, scale, factor);
  run(passes.grad[wide], a, rows, threads);
}

// Vocabulary-parallel steps of a call (see vocab_parallel.h). number 0 or 1: that step for the rows
// `some`. number 2: the last step for `some`, and after each of these rows the first step for one
// of `others`, which takes over the row's memory while the cache holds it. place: (ranks, rank,
// threads, rows of the whole call).
void vocab_parallel_step(int number, const py::tuple& place, const OperandTuple& student,
                         const OperandTuple& teacher, const SpecTuple& spec, Address keep,
                         Address label, Address scale, double factor, const OperandTuple& grad,
                         int64_t width, Address out, Address redo, Address memory,
                         const py::tuple& some, const py::tuple& others) {
  Args a;
  a.student = operand(student);
  a.teacher = operand(teacher);
  a.grad = operand(grad);
  const Passes& passes = running->passes[set_spec(a, spec)];
  a.width = width;
  Items next(place, 4);
  a.ranks = next.integer();
  a.rank = next.integer();
  const int threads = static_cast<int>(next.integer());
  a.stream = streams(a, next.integer());
  set_rows(a, keep, label, scale, factor);
  a.memory = at<char>(memory);
  a.out = at<void>(out);
  a.redo = at<uint8_t>(redo);
  const int kind = static_cast<int>(block_dtype(a, 0));
  Args b = a;
  StepRows(some).into(a);
  StepRows(others).into(b);
  const auto step = passes.steps[number][kind], first_step = passes.steps[0][kind];
  py::gil_scoped_release release;
  over_rows(a.rows > b.rows ? a.rows : b.rows, a.vocab, threads,
            [&](int64_t begin, int64_t end, const ThreadPool& pool) {
              for (int64_t i = begin; i < end; ++i) {
                if (i < a.rows) step(a, a.first + i, a.first + i + 1, pool);
                if (i < b.rows) first_step(b, b.first + i, b.first + i + 1, pool);
              }
            });
}

// ---- beside the passes

std::tuple<int, int64_t, int64_t> validate_topk(int wide, int64_t rows, int64_t k, Address logprobs,
                                                Address indices, Address keep, int64_t vocab) {
  const int64_t* index = at<const int64_t>(indices);
  const uint8_t* kept = at<const uint8_t>(keep);
  return wide ? validate_topk_rows(rows, k, at<const double>(logprobs), index, kept, vocab)
              : validate_topk_rows(rows, k, at<const float>(logprobs), index, kept, vocab);
}

std::pair<int64_t, int64_t> count_labels(int64_t n, Address labels, int64_t ignore, int64_t vocab,
                                         Address keep) {
  return count_label_rows(n, at<const int64_t>(labels), ignore, vocab, at<uint8_t>(keep));
}

void row_scale(int wide, int64_t n, Address keep, Address weight, bool mean, Address scale) {
  const uint8_t* kept = at<const uint8_t>(keep);
  if (wide) {
    row_scales(n, kept, at<const double>(weight), mean, at<double>(scale));
  } else {
    row_scales(n, kept, at<const float>(weight), mean, at<float>(scale));
  }
}

void weighted_sum(int wide, Address loss, Address scale, double factor, int64_t n, Address out) {
  if (wide) {
    *at<double>(out) = weighted_sum_of(at<const double>(loss), at<const double>(scale), factor, n);
  } else {
    *at<float>(out) = weighted_sum_of(at<const float>(loss), at<const float>(scale), factor, n);
  }
}

// `fused` and `weighted_sum` in one call, so that the losses of the rows need no tensor. The
// gradient is that of `upstream` times the sum.
void fused_total(int wide, int64_t rows, int threads, const OperandTuple& student,
                 const OperandTuple& teacher, const SpecTuple& spec, Address keep, Address label,
                 Address scale, double factor, const OperandTuple& grad, int64_t width, Address out,
                 Address outputs, double upstream) {
  const std::unique_ptr<char[]> memory(new char[rows * (wide ? sizeof(double) : sizeof(float))]);
  const Address losses = reinterpret_cast<Address>(memory.get());
  fused(wide, rows, threads, student, teacher, spec, keep, label, scale, factor * upstream, grad,
        width, losses, outputs);
  weighted_sum(wide, losses, scale, factor, rows, out);
}

// ---- losses of one logit each

Factor factor_of(const py::tuple& tuple) {
  Items next(tuple, 3);
  Factor f;
  f.data = at<const void>(next.address());
  f.repeat = next.integer();
  f.count = next.integer();
  return f;
}

// sides: (student, dtype, teacher, dtype, labels, kind). spec: (divergence, param, temperature,
// soft, hard, factor). grads: of student and teacher, in their dtypes.
BernoulliArgs bernoulli_args(int wide, const py::tuple& sides, const std::vector<int64_t>& ignored,
                             const py::tuple& weight) {
  BernoulliArgs a;
  a.read_labels = table(true).read_labels[wide];
  Items next(sides, 6);
  a.student = at<const char>(next.address());
  a.student_dtype = static_cast<DType>(next.integer());
  a.teacher = at<const char>(next.address());
  a.teacher_dtype = static_cast<DType>(next.integer());
  a.labels = at<const void>(next.address());
  a.label_kind = static_cast<LabelKind>(next.integer());
  a.ignored = ignored.data();
  a.ignored_count = static_cast<int64_t>(ignored.size());
  a.weight = factor_of(weight);
  return a;
}

// A chunk's sum is its own, so that the bits do not depend on the number of threads.
std::vector<double> over_chunks(ElementPass pass, const BernoulliArgs& a, int64_t n, int threads) {
  std::vector<double> sums(static_cast<size_t>((n + kChunk - 1) / kChunk));
  py::gil_scoped_release release;
  over_rows(static_cast<int64_t>(sums.size()), 1, threads,
            [&](int64_t begin, int64_t end, const ThreadPool&) {
              for (int64_t i = begin; i < end; ++i)
                sums[static_cast<size_t>(i)] =
                    pass(a, i * kChunk, (i + 1) * kChunk < n ? (i + 1) * kChunk : n);
            });
  return sums;
}

double bernoulli(int wide, int64_t n, int threads, const py::tuple& sides,
                 const std::vector<int64_t>& ignored, const py::tuple& weight,
                 const py::tuple& pos_weight, const py::tuple& spec, Address upstream,
                 Address grad_s, Address grad_t, Address values) {
  BernoulliArgs a = bernoulli_args(wide, sides, ignored, weight);
  a.pos_weight = factor_of(pos_weight);
  Items next(spec, 6);
  a.divergence = static_cast<int>(next.integer());
  a.param = next.real();
  a.temperature = next.real();
  a.soft = next.real();
  a.hard = next.real();
  a.factor = next.real();
  a.upstream = at<const void>(upstream);
  a.grad_s = at<char>(grad_s);
  a.grad_t = at<char>(grad_t);
  a.values = at<void>(values);
  double sum = 0.0;
  for (double x : over_chunks(table(wide).bernoulli[wide], a, n, threads)) sum += x;
  return sum;
}

// -inf where a label is not from 0 to 1.
double count_elements(int wide, int64_t n, int threads, const py::tuple& sides,
                      const std::vector<int64_t>& ignored, const py::tuple& weight) {
  const BernoulliArgs a = bernoulli_args(wide, sides, ignored, weight);
  double sum = 0.0;
  for (double x : over_chunks(table(true).counted[wide], a, n, threads)) sum += x;
  return sum;
}

// [a, b, c] -> [a, c, b], of elements of so many bytes.
void transpose(int64_t a, int64_t b, int64_t c, int64_t bytes, int threads, Address from,
               Address to) {
  const int64_t tiles = (c + kTile - 1) / kTile;
  py::gil_scoped_release release;
  over_rows(a * tiles, 1, threads, [&](int64_t first, int64_t last, const ThreadPool&) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % tiles * kTile, end = begin + kTile < c ? begin + kTile : c;
      const int64_t at = i / tiles * b * c * bytes;
      const char* x = fastkd::at<const char>(from) + at;
      char* y = fastkd::at<char>(to) + at;
      transpose_columns(bytes, x, y, b, c, begin, end);
    }
  });
}

// Rows [outer, inner, width] of a gradient *= the number at `by`.
void multiply(const OperandTuple& grad, int64_t rows, int64_t width, int threads, int wide,
              Address by) {
  const double factor = wide ? *at<const double>(by) : static_cast<double>(*at<const float>(by));
  if (factor == 1.0) return;
  const Operand x = operand(grad);
  const Kernels* kernels = running;
  py::gil_scoped_release release;
  over_rows(rows, 1, threads, [&](int64_t begin, int64_t end, const ThreadPool&) {
    for (int64_t r = begin; r < end; ++r) kernels->multiply(x.row(r), x.dtype, width, factor);
  });
}

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(_C, m) {
  using namespace fastkd;
  use_isa(isas().back());
  m.doc() =
      "Passes over rows in C++. The caller is fastkd/backends/cpu.py, which checks everything.";
  m.def("isas", &isas, "Instruction sets that this processor runs, best last.");
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
  m.def("stats", &stats);
  m.def("loss", &loss);
  m.def("grad", &grad);
  m.attr("most_columns") = kMostColumns;
  m.def("vocab_parallel_step", &vocab_parallel_step);
  m.def("step_bytes", [](int64_t vocab, bool kept) { return running->step_bytes(vocab, kept); });
  m.def("scratch", [](int64_t bytes) { return reinterpret_cast<Address>(scratch(bytes)); });
  m.def("fused_total", &fused_total);
  m.def("validate_topk", &validate_topk);
  m.def("count_labels", &count_labels);
  m.def("row_scale", &row_scale);
  m.def("weighted_sum", &weighted_sum);
  m.def("transpose", &transpose);
  m.def("bernoulli", &bernoulli);
  m.def("count_elements", &count_elements);
  m.def("multiply", &multiply);
  m.def("exp2", [](Address x, Address y, int64_t n) {
    running->exp2(at<const float>(x), at<float>(y), n);
  });
  m.def("log",
        [](Address x, Address y, int64_t n) { running->log(at<const float>(x), at<float>(y), n); });
}
