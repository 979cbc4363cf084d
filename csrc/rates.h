// Values and rates of a divergence that is no expectation, made of the exponentials in the scratch.
#pragma once

#include "row_state.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// The origin of a row's rates, and its distance from the zero of the centred rates.
template <class T>
struct Top {
  Origin<T> origin;
  T rate = 0;
};

// Value and rate at a column of which the scratch keeps exponentials s and t, or these less 1.
template <class T, bool LessOne>
struct Sided {
  using V = Vec<T>;
  V to_q, to_p, less;
  explicit Sided(const ToProbability& to)
      : to_q(splat(static_cast<T>(to.q))),
        to_p(splat(static_cast<T>(to.p))),
        less(splat(static_cast<T>(to.p - to.q))) {}

  FASTKD_INLINE V q(V s) const { return LessOne ? fma(s, to_q, to_q) : s * to_q; }
  template <class D>
  FASTKD_INLINE Rated<V> at(V s, V t, T param) const {
    if constexpr (!LessOne) return D::at(t * to_p, s * to_q, Subtract{}, param);
    const V gap = (t * to_p - s * to_q) + less;
    return D::at(fma(t, to_p, to_p), q(s), Given<V>{gap}, param);
  }
};

// The rate at the student's most probable column, as an origin that makes it 0. Where one column
// has most of the mass, its block has; where none has, it does not matter which is taken.
template <class T, class D>
__attribute__((noinline)) Top<T> top_rate(const Args& a, const Scratch<T>& scratch,
                                          const Partial& row) {
  // its rates are 0 or 1: where the overlap is small, every other origin would round it away
  if constexpr (std::is_same<D, Acceptance>::value) return {};
  using V = Vec<T>;
  int64_t heaviest = 0;
  double most = -1.0;
  for (int64_t at = 0; at < a.vocab; at += kBlock) {
    const double teacher_mass =
        scratch.blocks[at / kBlock].s_sum * ToProbability(scratch, at, row).q;
    if (teacher_mass > most) most = teacher_mass, heaviest = at;
  }
  const ToProbability to(scratch, heaviest, row);
  const bool less_one = scratch.blocks[heaviest / kBlock].less_one;
  const T param = static_cast<T>(a.param);
  const Origin<T> centre = centred<D>(param);
  // p and q are alike and no column has most of the mass: no rate is further from 0
  if (less_one && to.p < 2 * to.q && to.q < 2 * to.p) return {centre};
  const T* kept = scratch.kept + 2 * heaviest;
  const int64_t end = 2 * padded<T>(least(kBlock, a.vocab - heaviest));
  V tops = splat(T(-2));
  for (int64_t i = 0; i < end; i += 2 * kGroup<T>)
    tops = larger(larger(loadu<V>(kept + i), loadu<V>(kept + i + Simd<T>::lanes)), tops);
  const T top = largest(tops);
  int64_t at = 0;  // the first of these
  while (kept[at] != top)
    if (++at % kGroup<T> == 0) at += kGroup<T>;  // over the teacher's
  const T other = kept[at + kGroup<T>];
  const Rated<V> point = less_one
                             ? Sided<T, true>(to).template at<D>(splat(top), splat(other), param)
                             : Sided<T, false>(to).template at<D>(splat(top), splat(other), param);
  T own[Simd<T>::lanes], centred_one[Simd<T>::lanes], where[Simd<T>::lanes];
  storeu(own, point.rate);
  storeu(centred_one, centre(point));
  storeu(where, point.apart ? V{} + T(1) : V{});
  const T rate = centred_one[0];
  return {{-rate, where[0] != T(0) ? -own[0] : centre.apart - rate}, rate};
}

// Adds the values of a block to out.value, and q times the rates to out.slope. The rates, relative
// to `origin`, stay in the scratch, beside the student's exponentials.
template <class T, class D, bool LessOne>
FASTKD_INLINE void rate_block(T* kept, int64_t n, const Sided<T, LessOne>& to, T param,
                              Origin<T> origin, Partial& out) {
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  Two<V> values{}, slopes{};
  const auto half = [&](T* at, V& value, V& slope) FASTKD_LAMBDA {
    const V s = loadu<V>(at);
    const Rated<V> point = to.template at<D>(s, loadu<V>(at + 2 * lanes), param);
    const V rate = origin(point);
    value += point.value;
    slope = fma(to.q(s), rate, slope);
    if constexpr (LessOne) storeu(at, s + T(1));
    storeu(at + 2 * lanes, rate);
  };
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    prefetch_ahead(kept + 2 * i, 2 * kGroup<T>);
    half(kept + 2 * i, values.a, slopes.a);
    half(kept + 2 * i + lanes, values.b, slopes.b);
  }
  out.value += static_cast<double>(total(values.a + values.b));
  out.slope += static_cast<double>(total(slopes.a + slopes.b));
}

template <class T, class D>
__attribute__((noinline)) void rate_loop(const Args& a, int64_t chunk, const Scratch<T>& scratch,
                                         const Partial& row, Origin<T> origin, Partial& out) {
  if constexpr (std::is_same<D, JS>::value) {  // a loop of either kind, with its own registers
    return JS::is_even(static_cast<T>(a.param))
               ? rate_loop<T, EvenJS>(a, chunk, scratch, row, origin, out)
               : rate_loop<T, UnevenJS>(a, chunk, scratch, row, origin, out);
  }
  const T param = static_cast<T>(a.param);
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = padded<T>(least(kBlock, end - at));
    const ToProbability to(scratch, at, row);
    T* const kept = scratch.kept + 2 * at;
    if (scratch.blocks[at / kBlock].less_one)
      rate_block<T, D>(kept, n, Sided<T, true>(to), param, origin, out);
    else
      rate_block<T, D>(kept, n, Sided<T, false>(to), param, origin, out);
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
