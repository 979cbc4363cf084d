// Fills the table for the instruction set that the including file is compiled for.
#include "rows.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

template <class T, class D>
constexpr Passes passes_of() {
  return {fused<T, D>, loss<T, D>, grad<T, D>};
}

#define FASTKD_ROW(name, Struct) {passes_of<float, Struct>(), passes_of<double, Struct>()},
const Passes kPasses[][2] = {FASTKD_DIVERGENCES(FASTKD_ROW)};
#undef FASTKD_ROW

const Rows kStats[2] = {stats<float>, stats<double>};

void multiply(char* data, DType dtype, int64_t n, double by) {
  if (dtype == DType::f64) {
    multiply_as<double>(data, dtype, n, by);
  } else {
    multiply_as<float>(data, dtype, n, by);
  }
}

void exp2_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = exp2(x[i]);
}

void log_array(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = log(x[i]);
}

#define FASTKD_TEXT(x) #x
#define FASTKD_NAME(x) FASTKD_TEXT(x)
const Kernels kTable = {FASTKD_NAME(FASTKD_ISA), kPasses, kStats, multiply, exp2_array, log_array};

}  // namespace

const Kernels* kernels() { return &kTable; }

}  // namespace FASTKD_ISA
}  // namespace fastkd
