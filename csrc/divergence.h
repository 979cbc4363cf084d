// One struct per divergence, at one vector of columns. p is the teacher, q the student. See
// fastkd/divergence.py for the table, the formulas in torch and what "centred" means.
//
// An expectation gives value l(log p, log q) and centred slope. Any other divergence gives value
// and rate, of p and q: the rate is the slope per unit of q, up to a constant that all columns
// share (a row's gradient is q times its rates, less their mean). Two constants leave the digits:
// where p and q are near, the one that makes the rate 0 at p = q; where p is far below q, the one
// that makes it 0 at p = 0. The second is `far` above the first, and a row takes its rates relative
// to one of its own (see Origin), so that what all columns share leaves no rounding behind.
//
// A row's loss is the sum of its values, or a function of the sum (see `of_sum`).
//
// Every pair is finite or rightly infinite when p or q is 0 (log -inf), and 0 when both are. No
// pair is asked about a row with a NaN.
#pragma once

#include "vec.h"

#define FASTKD_DIVERGENCES(X)       \
  X(kl, KL)                         \
  X(reverse_kl, ReverseKL)          \
  X(js, JS)                         \
  X(skew_kl, SkewKL)                \
  X(skew_reverse_kl, SkewReverseKL) \
  X(tv, TV)                         \
  X(acceptance, Acceptance)

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Whether a value is an expectation of log p - log q under the teacher (slope: q - p), or of
// log q - log p under the student (slope: the value), which lets the sum loop finish the loss.
enum class Expectation { none, teacher, student };

template <class V>
struct Sloped {
  V value;
  V slope;
};

template <class V>
struct Rated {
  using Where = decltype(V{} < V{});
  V value;
  V rate;
  Where apart;  // whether the rate is 0 at p = 0, and not at p = q
};

// p - q, and the smaller less the larger of the two: of the numbers themselves, or given with more
// digits than these have.
struct Subtract {
  template <class V>
  FASTKD_INLINE V operator()(V p, V q) const {
    return p - q;
  }
  template <class V>
  FASTKD_INLINE V least(V less, V more) const {
    return less - more;
  }
};
template <class V>
struct Given {
  V gap;
  FASTKD_INLINE V operator()(V, V) const { return gap; }
  FASTKD_INLINE V least(V, V) const { return smaller(gap, -gap); }
};

// What is added to a rate at p near q, and to one far from it; of the second, `far` itself is the
// centred rate's.
template <class T>
struct Origin {
  T near = 0;
  T apart = 0;

  template <class V>
  FASTKD_INLINE V operator()(const Rated<V>& point) const {
    return point.rate + (point.apart ? V{} + apart : V{} + near);
  }
};

// w * x with 0 * anything = 0
template <class V>
FASTKD_INLINE V weighted(V w, V x) {
  return w * zero_unless<V>(w != V{}, x);
}

// x, but normal where it is 0.
template <class V>
FASTKD_INLINE V normal(V x) {
  using T = std::conditional_t<std::is_same<V, double>::value, double, float>;
  return larger(splat(std::is_same<T, float>::value ? T(__FLT_MIN__) : T(__DBL_MIN__)), x);
}

// The mixture a * p + (1 - a) * q.
template <class V, class T>
FASTKD_INLINE V mixture(V p, V q, T a) {
  return normal(fma(splat(a), p, splat(T(1) - a) * q));
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

// With m the mixture, x - m is a multiple of p - q, which keeps its digits near p = q; and where p
// is far below m, what p adds to m keeps them, and is 0 at p = 0.
template <class V>
FASTKD_INLINE auto below_half(V p, V m) {
  return p + p < m;
}

// beta = 1/2, by the smaller and the larger of p and q: exchanging the sides gives the same bits.
// m is half the sum, so that the larger over m is at most 2 and its logarithm needs no exponent.
struct EvenJS {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T) {
    const V less = smaller(p, q), more = larger(p, q), gap = gap_of.least(less, more);
    const V sum = normal(p + q);
    // at this share of the sum, 1 - sqrt(1/2), both arguments of atanh are equally large
    const auto apart = less <= splat(T(0.29289321881345248)) * sum;
    // of m / more, or of twice that, which is 1 where less is 0
    const V of_more = atanh(ratio(apart ? less : gap, (sum + more) + zero_unless<V>(!apart, more)));
    const V of_less = half_log(less + less, sum, gap);
    const V whole = zero_unless<V>(apart, V{} + static_cast<T>(kLn2 / 2)) - of_more;
    const auto above = q >= p;
    using Where = typename Rated<V>::Where;
    return {fma(less, of_less, more * whole), above ? -of_more : of_less,
            static_cast<Where>(apart & above)};
  }
};

// Any other: log(p / m) enters the value alone, whose digits do not depend on how it is taken.
struct UnevenJS {
  static constexpr Expectation expectation = Expectation::none;
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T beta) {
    const T rest = T(1) - beta;
    const V weight = beta * p, m = normal(fma(splat(rest), q, weight)), gap = gap_of(p, q);
    const auto apart = below_half(p, m);
    // of q / m, or of rest * q / m
    const V half = half_log(apart ? rest * q : q, m, -beta * (apart ? p : gap));
    const V rate = (rest + rest) * half;
    const V value_q = q * (rate - zero_unless<V>(apart, rest * log(splat(rest))));
    return {fma(weight + weight, half_log(p, m, rest * gap), value_q), rate, apart};
  }
};

struct JS {
  static constexpr Expectation expectation = Expectation::none;
  // 0 where the share rounds to 0: log 0 is finite
  template <class T>
  static FASTKD_INLINE T far(T beta) {
    const double rest = static_cast<double>(T(1) - beta);
    return static_cast<T>(-rest * log(rest));
  }
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T beta) {
    return is_even(beta) ? EvenJS::at(p, q, gap_of, beta) : UnevenJS::at(p, q, gap_of, beta);
  }
  template <class T>
  static FASTKD_INLINE bool is_even(T beta) {
    return beta == T(0.5);
  }
};

struct SkewKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE T far(T alpha) {
    return T(1) - alpha;
  }
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T alpha) {
    const T rest = T(1) - alpha;
    const V m = mixture(p, q, alpha), gap = rest * gap_of(p, q);
    // rest - rest * p / m
    const auto apart = below_half(p, m);
    return {(p + p) * half_log(p, m, gap), -rest * ratio(apart ? p : gap, m), apart};
  }
};

struct SkewReverseKL {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE T far(T alpha) {
    return static_cast<T>(-__builtin_log(static_cast<double>(alpha)) -
                          (1.0 - static_cast<double>(alpha)));
  }
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T alpha) {
    const T rest = T(1) - alpha;
    const V m = mixture(q, p, alpha);
    const auto apart = below_half(p, m);
    const V above = -rest * (apart ? p : gap_of(p, q));
    const V half = half_log(apart ? alpha * q : q, m, above);  // of q / m, or of alpha q / m
    const V log_q = half + half, value = q * (log_q - zero_unless<V>(apart, log(splat(alpha))));
    return {value, log_q - ratio(apart ? above : alpha * above, m), apart};
  }
};

struct TV {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE T far(T) {
    return 0;
  }
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G gap_of, T) {
    const V gap = gap_of(p, q), half = V{} + T(0.5);
    return {half * larger(gap, -gap), gap < V{} ? half : gap > V{} ? -half : V{}, V{} < V{}};
  }
};

// The overlap min(p, q), whose rate is 0 at ties: rates are 0 in most of a row where the overlap is
// small, and everywhere in one where the sides agree. Either way the gradient keeps its digits.
struct Acceptance {
  static constexpr Expectation expectation = Expectation::none;
  template <class T>
  static FASTKD_INLINE T far(T) {
    return 0;
  }
  template <class V, class G, class T>
  static FASTKD_INLINE Rated<V> at(V p, V q, G, T) {
    return {smaller(p, q), zero_unless<V>(q < p, V{} + T(1)), V{} < V{}};
  }
};

// The loss of a row, and its derivative by the row's sum of values.
struct OfSum {
  double loss;
  double by;
};

template <class D>
constexpr bool kOfSum = std::is_same<D, Acceptance>::value;  // whether it is not the sum itself

template <class T, class D>
inline OfSum of_sum(D, double sum) {
  return {sum, 1.0};
}
// -log of the overlap. Below kLeastOverlap it is constant. Within rounding of 1 it is 0, so that
// equal sides give exactly 0: a lane adds 256 terms, one after the other, here and in the sum
// of the exponentials. Of equal terms that may take 2^-16 off.
constexpr double kLeastOverlap = 0x1p-100;
template <class T>
inline OfSum of_sum(Acceptance, double sum) {
  constexpr double whole = 1.0 - (std::is_same<T, float>::value ? 0x1p-16 : 0x1p-40);
  if (sum < kLeastOverlap) return {-__builtin_log(kLeastOverlap), 0.0};
  return {sum > whole ? 0.0 : -__builtin_log(sum), -1.0 / sum};
}

// The origin of centred rates.
template <class D, class T>
inline Origin<T> centred(T param) {
  if constexpr (D::expectation == Expectation::none) return {0, D::far(param)};
  return {};
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
