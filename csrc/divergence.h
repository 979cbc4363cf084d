// One struct per divergence, at one vector of columns. p is the teacher, q the student. See
// fastkd/divergence.py for the table, the formulas in torch and what "centred" means.
//
// An expectation gives value l(log p, log q) and centred slope. Any other divergence gives value
// and rate, of p and q: the rate is the centred slope per unit of q, 0 where p = q. (A row's
// gradient is q times its rates, less their mean; they are taken relative to one of the row's own,
// so that what all columns share leaves no rounding behind.)
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
struct Sloped {
  V value;
  V slope;
};

template <class V>
struct Rated {
  V value;
  V rate;
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
  template <class V>
  static FASTKD_INLINE Sloped<V> at(V logp, V logq, V p, V q) {
    return {weighted(p, logp - logq), q - p};
  }
};

struct ReverseKL {
  static constexpr Expectation expectation = Expectation::student;
  template <class V>
  static FASTKD_INLINE Sloped<V> at(V logp, V logq, V, V q) {
    const V value = weighted(q, logq - logp);
    return {value, value};
  }
};

// With m the mixture, x / m - 1 is a multiple of (p - q) / m, which keeps its digits near p = q; and
// where p / m is small, q / m by way of it is exact at p = 0, in every column alike.
template <class V>
FASTKD_INLINE auto small(V share) {
  return share < V{} + 0.5f;
}

struct JS {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, T beta) {
    const T rest = T(1) - beta;
    const V over_m = over_mixture(p, q, beta), gap = (q - p) * over_m, share = p * over_m;
    const V above = beta * (small(share) ? -share : gap);
    const V of_q = log(small(share) ? T(1) + above : q * over_m, above);
    const V rate = rest * (small(share) ? of_q - log(splat(rest)) : of_q);
    return {fma(beta * p, log(share, -rest * gap), q * rate), rate};
  }
};

struct SkewKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, T alpha) {
    const T rest = T(1) - alpha;
    const V over_m = over_mixture(p, q, alpha), gap = rest * ((p - q) * over_m), share = p * over_m;
    // rest - rest * p / m, in the form that rounds least: exact at p = 0 and at p = q
    const V rate = small(share) ? rest - rest * share : -rest * gap;
    return {p * log(share, gap), rate};
  }
};

struct SkewReverseKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, T alpha) {
    const T rest = T(1) - alpha;
    const V over_m = over_mixture(q, p, alpha), gap = (q - p) * over_m, share = p * over_m;
    const V above = rest * (small(share) ? -share : gap);
    const V near = log(small(share) ? T(1) + above : q * over_m, above);
    const V log_q = small(share) ? near - log(splat(alpha)) : near;  // of q / m
    return {q * log_q, log_q - rest * (small(share) ? T(1) - share : alpha * gap)};
  }
};

struct TV {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, T) {
    const V gap = q - p, half = V{} + T(0.5);
    return {half * larger(gap, -gap), gap > V{} ? half : gap < V{} ? -half : V{}};
  }
};

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
