// What module.cpp knows of the kernels: plain structs and a table of function pointers.
#pragma once

#include <cstdint>

namespace fastkd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Rows [A, B, columns]: row r starts at (r / B) * outer + (r % B) * inner; strides in elements.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t b = 1;
  int64_t outer = 0;
  int64_t inner = 0;

  char* row(int64_t r) const { return data + ((r / b) * outer + (r % b) * inner) * size_of(dtype); }
};

// The K columns that a top-k teacher gives of a row (its support), and the tail. In: probabilities
// of both sides and their natural logarithms. Out: the value of the divergence and its slopes.
struct Points {
  // in
  double* logp = nullptr;  // [k], as the next three
  double* logq = nullptr;
  double* p = nullptr;
  double* q = nullptr;
  int64_t k = 0;
  double tail_logp = 0.0;
  double tail_logq = 0.0;
  double q_tail = 0.0;
  double total = 0.0;    // sum of the exponentials that q was made of
  bool no_tail = false;  // the terms of the support are the whole loss
  double param = 0.0;
  double centre = 0.0;  // see fastkd/divergence.py
  // out
  double* slope = nullptr;  // [k]: the gradient by the logit, times T
  double value = 0.0;
  double sum = 0.0;         // of all slopes
  double tail_slope = 0.0;  // the tail's own
};

// Arguments of the passes. `void*` is float* or double*, by the pass's accumulation type. A null
// pointer is an argument that is not given. fastkd/backends/base.py explains their meaning.
struct Args {
  Operand student;
  Operand teacher;
  Operand grad;
  int64_t vocab = 0;
  int64_t width = 0;  // columns of grad; those from vocab on are written 0
  int64_t classes = 0;
  bool stream = false;  // write the gradient past the caches
  const uint8_t* keep = nullptr;
  const int64_t* label = nullptr;
  const void* scale = nullptr;
  double factor = 1.0;
  double param = 0.0;
  double temperature = 1.0;
  double soft = 1.0;
  double hard = 0.0;
  double smoothing = 0.0;
  double z = 0.0;  // of the squared log-sum-exp of the student at T = 1
  const void* stats_s = nullptr;
  const void* stats_t = nullptr;
  const void* stats_hard = nullptr;
  const void* pairs = nullptr;  // [N, 2], what the passes `loss` have found, summed
  // of `topk`
  const void* logprobs = nullptr;  // [N, k], as indices
  const int64_t* indices = nullptr;
  const void* tail = nullptr;  // [N]
  int64_t k = 0;
  bool restricted = false;
  double centre = 0.0;
  void (*points)(Points&) = nullptr;
  void* out = nullptr;      // [N] of fused and topk, [N, 2] of loss, [N, 3] of stats
  void* outputs = nullptr;  // [N, kOutputs] of fused and topk, see outputs.h
  // of a vocabulary-parallel step (see vocab_parallel.h) for rows [first, first + rows)
  int64_t first = 0;
  int64_t rows = 0;
  int64_t ranks = 1;
  int64_t rank = 0;
  char* memory = nullptr;       // [rows, step_bytes(vocab)]
  void* sent = nullptr;         // sums or Rates [rows]
  const void* sums = nullptr;   // RowSums, or ExpectationSums, [ranks, rows]
  const void* rates = nullptr;  // Rates [ranks, rows]
  uint8_t* redo = nullptr;      // [N]: 1 where the row needs the passes stats, loss and grad

  // Whether the loss needs the student at T = 1.
  bool at_one() const { return hard != 0.0 || z != 0.0; }
};

// What a rank sends about its columns of a row, in the first exchange. The sums have bases of their
// own (see row_state.h). `label` is the student's logit at the label, or 0 where another rank holds
// the label's column. `columns` says how many columns `scores` sums; it is negative where the sums
// cannot be used.
struct RowSums {
  double s, t, hard;
  float s_base, t_base, hard_base, label, scores, columns;
};
// The same for a divergence that is an expectation.
struct ExpectationSums {
  RowSums row;
  double cross;
};

// What a rank sends in the second exchange, which an expectation does not need: the sum of values,
// and the sum of q times the rates, which are relative to `from`.
struct Rates {
  double value;
  float slope, from;
};
static_assert(sizeof(ExpectationSums) == 56 && sizeof(RowSums) + sizeof(Rates) == 64,
              "64 bytes at most for a row; fastkd/backends/cpu.py has the sizes too");

// A factor of elements: element i has number (i / repeat) % count of data, of the accumulation
// type.
struct Factor {
  const void* data = nullptr;
  int64_t repeat = 1;
  int64_t count = 1;
};

enum class LabelKind : int { f32 = 0, bf16, f16, f64, i64, i32, i16, i8, u8, none };

// Arguments of the losses of one logit each (see bernoulli.h): elements without gaps, in one order.
struct BernoulliArgs {
  const char* student = nullptr;
  const char* teacher = nullptr;
  DType student_dtype = DType::f32;
  DType teacher_dtype = DType::f32;
  const void* labels = nullptr;
  LabelKind label_kind = LabelKind::none;
  // [at, at + n) in the accumulation type, NaN where one is left out; whether all others are right
  bool (*read_labels)(const BernoulliArgs&, int64_t at, int64_t n, void* to) = nullptr;
  const int64_t* ignored = nullptr;
  int64_t ignored_count = 0;
  Factor weight;
  Factor pos_weight;
  int divergence = 1;  // 1 kl, 2 reverse_kl, 3 js
  double param = 0.0;
  double temperature = 1.0;
  double soft = 1.0;
  double hard = 0.0;
  double factor = 1.0;             // of the gradients
  const void* upstream = nullptr;  // one more of each value and gradient
  char* grad_s = nullptr;
  char* grad_t = nullptr;
  void* values = nullptr;
};

// Of the elements [begin, end): the sum of the values times their weights.
using ElementPass = double (*)(const BernoulliArgs&, int64_t begin, int64_t end);

// The threads of one call. `run` does task(argument, i) for each i < tasks, in any order.
struct ThreadPool {
  int threads = 1;
  void (*run)(int threads, int64_t tasks, void (*task)(void* argument, int64_t i),
              void* argument) = nullptr;
};

// Columns of a chunk. Where threads share a row, each takes whole chunks; a chunk has its own sums.
constexpr int64_t kChunk = 8192;

// Columns of the widest row that gets a scratch: 2 MB of floats.
constexpr int64_t kMostColumns = int64_t{1} << 18;

// Memory of this thread, valid until the thread's next call; null if there is none. See
// threads.cpp.
char* scratch(int64_t bytes);

using Pass = void (*)(const Args&, int64_t begin, int64_t end);
using ThreadedPass = void (*)(const Args&, int64_t begin, int64_t end, const ThreadPool&);

// The passes of one divergence. `fused` and `steps` are indexed by the dtype of the blocks: the one
// that both operands and the gradient have, else float32 or float64, to which blocks are converted.
// The others are indexed by the accumulation type: 0 float, 1 double.
struct Passes {
  ThreadedPass fused[4];
  ThreadedPass steps[3][4];  // null: the divergence needs no such step
  Pass loss[2];
  Pass grad[2];
  void (*points)(Points&);  // of `topk`; in the baseline's table only
};

// One table per instruction set. Passes in float64 stand in the baseline's table only.
struct Kernels {
  const char* isa;
  const Passes* passes;                             // by divergence, in the order of kDivergences
  const Pass* stats;                                // [2]
  ThreadedPass topk[4];                             // by dtype, as fused
  int64_t (*step_bytes)(int64_t vocab, bool kept);  // memory of a row between the steps
  ElementPass bernoulli[2];                         // by accumulation type
  ElementPass counted[2];  // sums the weights of the labels that count, -inf for a bad one; as
                           // the next, in the baseline's table only
  bool (*read_labels[2])(const BernoulliArgs&, int64_t at, int64_t n, void* to);
  void (*multiply)(char* data, DType dtype, int64_t n, double by);
  void (*exp2)(const float*, float*, int64_t);
  void (*log)(const float*, float*, int64_t);
};

// Largest error of exp2 and log in vec.h, in units in the last place.
constexpr double kExp2Ulp = 1.5;
constexpr double kLogUlp = 2.0;

extern const char* const kDivergences[];
extern const int kDivergenceCount;

namespace baseline {
const Kernels* kernels();
}
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}

}  // namespace fastkd
