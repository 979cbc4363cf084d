// What a caller may ask of a row beside its loss, in the order of LossOutputs in
// fastkd/engine/records.py. Where a loss has no hard term, `hard` and `label` are not written.
#pragma once

#include "pass_general.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

enum Output : int64_t { kSoft, kHard, kEntropyS, kEntropyT, kLogSumS, kLogSumT, kLabel, kOutputs };

// The sums of one side under a shift: of e = exp2((x - shift) * c), and of e * log2(e).
struct Softmax {
  double shift, sum, weighted;
};

// The sum of e * log2(e) of a side whose statistics are known.
template <class T>
inline double weighted_loop(const Plain<T>& read, int64_t vocab, double scale, const Stats& side) {
  using V = Vec<T>;
  const V c = splat(static_cast<T>(scale)), top = splat(static_cast<T>(side.shift()));
  double sum = 0.0;
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t n = least(kBlock, vocab - at);
    const T* x = read(at, n);
    V a{};
    for (int64_t i = 0; i < padded<T>(n); i += Simd<T>::lanes) {
      const V y = (loadu<V>(x + i) - top) * c, e = exp2(y);
      a = fma(e, zero_unless<V>(e != V{}, y), a);
    }
    sum += static_cast<double>(total(a));
  }
  return sum;
}

// Writes the outputs of a row; nothing where they are not requested.
template <class T>
struct Outputs {
  const Args& a;
  T* to;

  Outputs(const Args& args, int64_t r)
      : a(args),
        to(args.outputs == nullptr ? nullptr : static_cast<T*>(args.outputs) + kOutputs * r) {}
  explicit operator bool() const { return to != nullptr; }

  void zero() const {
    if (to == nullptr) return;
    for (int64_t i = 0; i < kOutputs; ++i) to[i] = 0;
  }
  void soft(double value) const { put(kSoft, value); }
  void student(const Softmax& s) const { side(s, kEntropyS, kLogSumS); }
  void teacher(const Softmax& t) const { side(t, kEntropyT, kLogSumT); }
  // Of the student at T = 1, in bits: the logarithm of the sum of exponentials, the label's score,
  // and the sum of all scores for label smoothing.
  void hard(int64_t label, double log_sum, double score, double scores) const {
    const double at_label = label >= 0 && label < a.vocab ? score - log_sum : kNaN;
    double loss = (a.smoothing - 1.0) * at_label;
    if (a.smoothing != 0.0)
      loss += a.smoothing * (log_sum - scores / static_cast<double>(a.classes));
    put(kHard, kLn2 * loss);
    put(kLabel, kLn2 * at_label);
  }
  void put(Output which, double value) const { to[which] = static_cast<T>(value); }

 private:
  // One logarithm serves both: in a short row it costs as much as a block of columns.
  void side(const Softmax& x, Output entropy, Output log_sum) const {
    const double bits = __builtin_log2(x.sum);
    put(entropy, x.sum == 0.0 ? 0.0 : kLn2 * (bits - x.weighted / x.sum));
    put(log_sum, x.shift / a.temperature + kLn2 * bits);
  }
};

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
