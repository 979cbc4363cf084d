// One struct per divergence: value l(log p, log q) and its centred slope, at one column. p is the
// teacher, q the student; p = exp(logp) and q = exp(logq) are handed in because every caller has
// them. See fastkd/divergence.py for the table, the formulas in torch and what "centred" means.
//
// Every pair is finite or rightly infinite when p or q is 0 (log -inf), and 0 when both are; a NaN
// comes out as NaN. No branches: the selects are what lets the loops over columns vectorise.
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

// Whether a value is an expectation of log p - log q (of log q - log p under the student), which
// lets the first sweep finish the loss.
enum class Expectation { none, teacher, student };

template <class T>
struct Point {
  T value;
  T slope;
};

// x where the condition holds, else 0. By a mask: of a conditional compilers make a branch around
// the arithmetic that leads to x, and then the loop no longer vectorises.
template <class T>
FASTKD_INLINE T where(bool condition, T x) {
  using U = uint_of<T>;
  return bits<T>(static_cast<U>(bits<U>(x) & (condition ? ~U(0) : U(0))));
}

// w * x with 0 * anything = 0
template <class T>
FASTKD_INLINE T weighted(T w, T x) {
  return w * where(w != T(0), x);
}

struct KL {
  static constexpr Expectation expectation = Expectation::teacher;
  template <class T>
  static FASTKD_INLINE Point<T> at(T logp, T logq, T p, T q, T) {
    return {weighted(p, logp - logq), q - p};
  }
};

struct ReverseKL {
  static constexpr Expectation expectation = Expectation::student;
  template <class T>
  static FASTKD_INLINE Point<T> at(T logp, T logq, T, T q, T) {
    const T value = weighted(q, logq - logp);
    return {value, value};
  }
};

struct JS {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE Point<T> at(T logp, T logq, T p, T q, T beta) {
    // log(max(p, q) / m) = -log(w + (1 - w) * min / max): no cancellation, and exactly 0 at p = q
    const bool teacher = logp >= logq;
    const T high = teacher ? p : q, low = teacher ? q : p;
    const T w = teacher ? beta : T(1) - beta;
    const T ratio = where(high > T(0), low / high);
    const T log_high = -log(w + (T(1) - w) * ratio);
    const T gap = logp - logq;
    const T log_p = log_high + where(!teacher, gap);  // log(p / m)
    const T log_q = log_high - where(teacher, gap);   // log(q / m)
    const T of_q = (T(1) - beta) * weighted(q, log_q);
    return {beta * weighted(p, log_p) + of_q, of_q};
  }
};

struct SkewKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE Point<T> at(T, T, T p, T q, T alpha) {
    const T rest = T(1) - alpha;
    const T m = alpha * p + rest * q;
    return {weighted(p, -log(alpha + rest * (q / p))),
            weighted(q, -rest * rest * ((p - q) / m))};
  }
};

struct SkewReverseKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE Point<T> at(T, T, T p, T q, T alpha) {
    const T rest = T(1) - alpha;
    const T m = rest * p + alpha * q;
    const T log_q = -log(alpha + rest * (p / q));  // log(q / m)
    return {weighted(q, log_q), weighted(q, log_q + rest * alpha * ((p - q) / m))};
  }
};

struct TV {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE Point<T> at(T, T, T p, T q, T) {
    const T gap = q - p;
    const T sign = gap > T(0) ? T(1) : gap < T(0) ? T(-1) : gap;  // gap itself: 0 or NaN
    return {T(0.5) * (gap < T(0) ? -gap : gap), T(0.5) * sign * q};
  }
};

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
