// One struct per divergence: value l(log p, log q) and its centred slope, at one vector of columns.
// p is the teacher, q the student; whoever has p and q at hand gives them, and a logarithm that a
// struct does not use is not computed. See fastkd/divergence.py for the table, the formulas in
// torch and what "centred" means.
//
// Every pair is finite or rightly infinite when p or q is 0 (log -inf), and 0 when both are. No pair
// is asked about a row with a NaN.
#pragma once

#include "vec.h"

#define FASTKD_DIVERGENCES(X) \
  X(kl, KL)                   \
  X(reverse_kl, ReverseKL)    \
  X(js, JS)                   \
  X(skew_kl, SkewKL)          \
  X(skew_reverse_kl, SkewReverseKL) \
  X(tv, TV)

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Whether a value is an expectation of log p - log q under the teacher (slope: q - p), or of
// log q - log p under the student (slope: the value), which lets the first sweep finish the loss.
enum class Expectation { none, teacher, student };

template <class V>
struct Point {
  V value;
  V slope;
};

// w * x with 0 * anything = 0
template <class V>
FASTKD_INLINE V weighted(V w, V x) {
  return w * zero_unless<V>(w != V{}, x);
}

// 1 over the mixture a * p + (1 - a) * q; finite where both are 0.
template <class V, class T>
FASTKD_INLINE V over_mixture(V p, V q, T a) {
  constexpr T least = std::is_same<T, float>::value ? T(__FLT_MIN__) : T(__DBL_MIN__);
  return inverse(larger(splat(least), fma(splat(a), p, splat(T(1) - a) * q)));
}

struct KL {
  static constexpr Expectation expectation = Expectation::teacher;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V logp, V logq, V p, V q, T) {
    return {weighted(p, logp - logq), q - p};
  }
};

struct ReverseKL {
  static constexpr Expectation expectation = Expectation::student;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V logp, V logq, V, V q, T) {
    const V value = weighted(q, logq - logp);
    return {value, value};
  }
};

struct JS {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V, V, V p, V q, T beta) {
    const V over_m = over_mixture(p, q, beta);
    const V of_q = (T(1) - beta) * q * log(q * over_m);
    return {fma(beta * p, log(p * over_m), of_q), of_q};
  }
};

struct SkewKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V, V, V p, V q, T alpha) {
    const V over_m = over_mixture(p, q, alpha);
    const T rest = T(1) - alpha;
    return {p * log(p * over_m), rest * rest * (q * ((q - p) * over_m))};
  }
};

struct SkewReverseKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V, V, V p, V q, T alpha) {
    const V over_m = over_mixture(q, p, alpha);
    const V log_q = log(q * over_m);  // of q / m
    return {q * log_q, q * fma(splat(alpha * (T(1) - alpha)), (p - q) * over_m, log_q)};
  }
};

struct TV {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Point<V> at(V, V, V p, V q, T) {
    const V gap = q - p, half = T(0.5) * q;
    return {T(0.5) * larger(gap, -gap), gap > V{} ? half : gap < V{} ? -half : V{}};
  }
};

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
