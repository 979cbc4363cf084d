// Fills the table for the instruction set that the including file is compiled for.
#include "bernoulli.h"
#include "topk.h"
#include "vocab_parallel.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// float64 is compiled once: every instruction set would compute it one column at a time.
#define FASTKD_ALL_OF(Struct)                                                                  \
  {{fused<DType::f32, Struct>, fused<DType::bf16, Struct>, fused<DType::f16, Struct>,          \
    FASTKD_WIDE((fused<DType::f64, Struct>))},                                                 \
   {FASTKD_STEP(sum_step, Struct), FASTKD_RATE_STEP(Struct), FASTKD_STEP(close_step, Struct)}, \
   {loss<float, Struct>, FASTKD_WIDE((loss<double, Struct>))},                                 \
   {grad<float, Struct>, FASTKD_WIDE((grad<double, Struct>))},                                 \
   FASTKD_WIDE(points_of<Struct>)},
#if defined(FASTKD_WITH_F64)
#define FASTKD_WIDE(x) x
#else
#define FASTKD_WIDE(x) nullptr
#endif
// in float only: float64 takes the passes stats, loss and grad
#define FASTKD_STEP(step, Struct) \
  {step<DType::f32, Struct>, step<DType::bf16, Struct>, step<DType::f16, Struct>, nullptr}
#define FASTKD_RATE_STEP(Struct)                                            \
  {rate_step_of<DType::f32, Struct>(), rate_step_of<DType::bf16, Struct>(), \
   rate_step_of<DType::f16, Struct>(), nullptr}
template <DType K, class D>
constexpr ThreadedPass rate_step_of() {
  if constexpr (D::expectation == Expectation::none) return rate_step<K, D>;
  return nullptr;
}
#define FASTKD_ROW(name, Struct) FASTKD_ALL_OF(Struct)
const Passes kPasses[] = {FASTKD_DIVERGENCES(FASTKD_ROW)};

const Pass kStats[2] = {stats<float>, FASTKD_WIDE(stats<double>)};

void multiply(char* data, DType dtype, int64_t n, double by) {
  switch (dtype) {
    case DType::f32: return multiply_as<DType::f32>(data, n, by);
    case DType::bf16: return multiply_as<DType::bf16>(data, n, by);
    case DType::f16: return multiply_as<DType::f16>(data, n, by);
    case DType::f64: return multiply_as<DType::f64>(data, n, by);
  }
}

template <class F>
void map(const float* x, float* y, int64_t n, F f) {
  const Flush flush;  // as the passes do
  for (int64_t i = 0; i < n; i += kLanes) {
    float block[kLanes] = {};
    const uint64_t bytes = static_cast<uint64_t>(least(kLanes, n - i)) * sizeof(float);
    __builtin_memcpy(block, x + i, bytes);
    storeu(block, f(loadu<::fastkd::FASTKD_ISA::F>(block)));
    __builtin_memcpy(y + i, block, bytes);
  }
}

void exp2_array(const float* x, float* y, int64_t n) {
  map(x, y, n, [](::fastkd::FASTKD_ISA::F v) { return exp2(v); });
}

void log_array(const float* x, float* y, int64_t n) {
  map(x, y, n, [](::fastkd::FASTKD_ISA::F v) { return log(v); });
}

#define FASTKD_TEXT(x) #x
#define FASTKD_NAME(x) FASTKD_TEXT(x)
const Kernels kTable = {
    FASTKD_NAME(FASTKD_ISA),
    kPasses,
    kStats,
    {topk<DType::f32>, topk<DType::bf16>, topk<DType::f16>, FASTKD_WIDE(topk<DType::f64>)},
    step_bytes,
    {bernoulli<float>, FASTKD_WIDE(bernoulli<double>)},
    {FASTKD_WIDE(counted<float>), FASTKD_WIDE(counted<double>)},
    {FASTKD_WIDE(labels<float>), FASTKD_WIDE(labels<double>)},
    multiply,
    exp2_array,
    log_array};

}  // namespace

const Kernels* kernels() { return &kTable; }

}  // namespace FASTKD_ISA
}  // namespace fastkd
