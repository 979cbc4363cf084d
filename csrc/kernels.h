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

  char* row(int64_t r) const {
    return data + ((r / b) * outer + (r % b) * inner) * size_of(dtype);
  }
};

// The K points of a row against a teacher that names so many of its columns, and the tail's. In:
// both sides' probabilities and their natural logarithms. Out: the value, the sum of slopes, the
// tail's own, and in `slope` each column's gradient by its logit times T.
struct Points {
  double* logp = nullptr;
  double* logq = nullptr;
  double* p = nullptr;
  double* q = nullptr;
  double* slope = nullptr;
  int64_t k = 0;
  double tail_p = 0.0;
  double tail_q = 0.0;
  double q_tail = 0.0;
  double total = 0.0;  // of the exponentials that q was made of
  bool alone = false;  // no tail: the terms of the named columns are the whole loss
  double param = 0.0;
  double centre = 0.0;  // see fastkd/divergence.py
  double value = 0.0;
  double sum = 0.0;
  double of_tail = 0.0;
};

// Arguments of the passes; `void*` is float* or double* by the kernel's accumulation type, and a
// null pointer is an argument that is not given. See fastkd/backends/base.py for their meaning.
struct Args {
  Operand student;
  Operand teacher;
  Operand grad;
  int64_t vocab = 0;
  int64_t width = 0;  // columns of grad, those from vocab on are written 0
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
  const void* stats_s = nullptr;
  const void* stats_t = nullptr;
  const void* stats_hard = nullptr;
  const void* slope = nullptr;
  const void* logprobs = nullptr;  // [N, k], as indices; of `topk`
  const int64_t* indices = nullptr;
  const void* tail = nullptr;  // [N]
  int64_t k = 0;
  bool restricted = false;
  double centre = 0.0;
  void (*points)(Points&) = nullptr;
  void* out = nullptr;  // loss [N] of fused, [N, 2] of loss, [N, 3] of stats
  // of the stages (see vocab_parallel.h), for the rows from `first` on, `rows` of them
  int64_t first = 0;
  int64_t rows = 0;
  int64_t ranks = 1;
  int64_t rank = 0;
  char* memory = nullptr;        // [rows, slot(vocab)]
  void* sent = nullptr;          // sums or Rates [rows]
  const void* sums = nullptr;    // RowSums, or WeighedSums of an expectation, [ranks, rows]
  const void* rates = nullptr;   // Rates [ranks, rows]
  uint8_t* redo = nullptr;       // [N]: 1 where the row takes the split passes
};

// What a rank tells the others about its columns of a row: sums under bases of its own (see
// pass_fused.h), the student's logit at the label (0 on every other rank), and of how many columns the
// scores are; fewer than 0 where the sums are of no use.
struct RowSums {
  double s, t, hard;
  float s_base, t_base, hard_base, label, scores, columns;
};
struct WeighedSums {  // of an expectation
  RowSums row;
  double cross;
};

// And, of a divergence that is no expectation, in a second exchange: the sum of values, and that of
// q times the rates above `from`.
struct Rates {
  double value;
  float slope, from;
};
static_assert(sizeof(WeighedSums) == 56 && sizeof(RowSums) + sizeof(Rates) == 64,
              "64 bytes at most for a row; fastkd/backends/cpu.py has the sizes too");

// Threads for the tasks of one call: task(argument, i) for each i < tasks, in any order.
struct Team {
  int threads = 1;
  void (*run)(int threads, int64_t tasks, void (*task)(void* argument, int64_t i),
              void* argument) = nullptr;
};

// Columns that a thread takes at a time where a row is shared; sums start afresh with each.
constexpr int64_t kChunk = 8192;

// Of a row with a scratch: 2 MB of floats.
constexpr int64_t kMostColumns = int64_t{1} << 18;

// Memory of this thread, the caller's until it asks again; null if there is none. See threads.cpp.
char* scratch(int64_t bytes);

using Rows = void (*)(const Args&, int64_t begin, int64_t end);
using TeamRows = void (*)(const Args&, int64_t begin, int64_t end, const Team&);

// Indices: of fused, the dtype that both operands and the gradient have, or float32 (float64 where
// an operand is) that blocks are converted to; of the others, float and double.
struct Passes {
  TeamRows fused[4];
  TeamRows stages[3][4];  // a null pointer: no such stage
  Rows loss[2];
  Rows grad[2];
  void (*points)(Points&);  // of `topk`; the baseline's only
};

// One table per instruction set; what takes float64 stands in the baseline's only.
struct Kernels {
  const char* isa;
  const Passes* passes;  // by divergence, in the order of kDivergences
  const Rows* stats;     // [2]
  TeamRows topk[4];    // by dtype, as fused
  int64_t (*slot)(int64_t vocab, bool kept);  // bytes of the stages' memory of a row
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
