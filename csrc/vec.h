// The arithmetic: a vector of floats, exp2, log. One source for every instruction set, in the
// vector types that GCC and Clang share; intrinsics only where a processor has an instruction that
// these have no words for. A float64 "vector" has one lane: it is the oracle's precision, not the
// fast path.
//
// Everything below module.cpp stands in a namespace named after the instruction set and, inside
// it, in an unnamed one: code compiled with AVX-512 must not be what the linker picks for another.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#if !defined(__clang__)
// of GCC's own "undefined" operands inside its intrinsics
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

// A call left in a loop costs more than what it calls, and compilers do leave them.
#define FASTKD_INLINE inline __attribute__((always_inline))
#define FASTKD_LAMBDA __attribute__((always_inline))

namespace fastkd {
namespace FASTKD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;  // SSE2, NEON
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = F;
  static constexpr int64_t lanes = kLanes;
};
template <>
struct Simd<double> {
  using V = double;
  static constexpr int64_t lanes = 1;
};
template <class T>
using Vec = typename Simd<T>::V;
// Loops go in groups of two vectors: what one register of bf16 unpacks into, and two independent
// chains of sums. Rows are padded to whole groups with -inf, so that no loop has a tail.
template <class T>
constexpr int64_t kGroup = 2 * Simd<T>::lanes;

template <class V>
struct Two {
  V a;
  V b;
};

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInf = __builtin_inff();

template <class To, class From>
FASTKD_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class T>
FASTKD_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class V, class E>
FASTKD_INLINE V loadu(const E* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class E>
FASTKD_INLINE void storeu(E* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Past the caches; `to` is aligned to the vector (see can_stream).
template <class V, class E>
FASTKD_INLINE void stream(E* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i*)to, (__m128i)v);
#endif
  storeu(to, v);
}

// The one that is larger, or smaller; `b` where either is NaN. Compilers turn the plain expression
// into a comparison and a blend: four operations for one.
template <class V>
FASTKD_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTKD_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)
FASTKD_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
FASTKD_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
FASTKD_INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
FASTKD_INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
FASTKD_INLINE F larger(F a, F b) { return _mm_max_ps(a, b); }
FASTKD_INLINE F smaller(F a, F b) { return _mm_min_ps(a, b); }
#endif

template <class V>
FASTKD_INLINE V zero_unless(decltype(V{} < V{}) condition, V x) {
  return condition ? x : V{};
}

// Pairwise, so that the order of the sum is stated and short.
FASTKD_INLINE float total(F v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
FASTKD_INLINE float largest(F v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] = larger(lane[i], lane[i + half]);
  return lane[0];
}
FASTKD_INLINE double total(double v) { return v; }
FASTKD_INLINE double largest(double v) { return v; }

// a * b + c, fused where the instruction set has it; -ffp-contract=off keeps every other product
// rounded, which is what makes q - p exactly 0 for identical logits.
FASTKD_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
FASTKD_INLINE double fma(double a, double b, double c) { return a * b + c; }

// (2^x - 1) / x by a minimax polynomial of degree 5 on [-1/2, 1/2] (of 2^x, relative error 1.9e-9).
FASTKD_INLINE F exp2_slope(F x) {
  F p = fma(splat(1.534581199865e-4f), x, splat(1.3399931219160e-3f));
  p = fma(p, x, splat(9.618488957133e-3f));
  p = fma(p, x, splat(5.550328776966e-2f));
  p = fma(p, x, splat(2.4022646890634e-1f));
  return fma(p, x, splat(6.9314720573727e-1f));
}

// 2^x: at most kExp2Ulp ulp for -126 <= x < 128, exactly 1 at 0, exactly 0 below -127 (where Flush
// is in force) and for -inf, inf from 128 on, NaN for NaN.
#if defined(__AVX512F__)
// x = floor(x) + f in one instruction, and the scaling by 2^floor(x) in another. Minimax polynomial
// of degree 6 on [0, 1) with a constant term of 1 (relative error 2.0e-9).
FASTKD_INLINE F exp2(F x) {
  const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = fma(splat(2.1612914861179888e-4f), f, splat(1.2467846972867846e-3f));
  p = fma(p, f, splat(9.675451554358006e-3f));
  p = fma(p, f, splat(5.5485282093286514e-2f));
  p = fma(p, f, splat(2.402293086051941e-1f));
  p = fma(p, f, splat(6.931470632553101e-1f));
  p = fma(p, f, splat(1.0f));
  return _mm512_scalef_ps(p, x);
}
#else
// Adding 1.5 * 2^23 rounds x to an integer and leaves that integer in the low bits, with 127 more
// ready to be an exponent.
FASTKD_INLINE F exp2(F x) {
  const F magic = splat(12582912.0f + 127.0f);
  x = smaller(splat(128.0f), larger(splat(-127.0f), x));
  const F shifted = x + magic;
  const F f = x - (shifted - magic);
  return fma(exp2_slope(f), f, splat(1.0f)) * bits<F>(bits<U>(shifted) << 23);
}
#endif

// 2^x - 1 on [-1/2, 1/2], with the digits that the 1 would take.
FASTKD_INLINE F exp2m1(F x) { return exp2_slope(x) * x; }

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): f * P(f) with minimax P of degree 9 and P(0) = 1
// (relative error 4.1e-9).
FASTKD_INLINE F log1p(F f) {
  F p = fma(splat(-0.07621777802705765f), f, splat(0.1290443390607834f));
  p = fma(p, f, splat(-0.13242988288402557f));
  p = fma(p, f, splat(0.14181825518608093f));
  p = fma(p, f, splat(-0.16609083116054535f));
  p = fma(p, f, splat(0.2000197321176529f));
  p = fma(p, f, splat(-0.25001582503318787f));
  p = fma(p, f, splat(0.33333325386047363f));
  p = fma(p, f, splat(-0.49999988079071045f));
  p = fma(p, f, splat(1.0f));
  return p * f;
}

// 1 / x for normal x > 0, to an ulp. The processor's division of 16 floats takes as long as 20
// products.
FASTKD_INLINE F inverse(F x) {
#if defined(__AVX512F__)
  const F r = _mm512_rcp14_ps(x);
  return fma(r, (F)_mm512_fnmadd_ps(x, r, splat(1.0f)), r);
#else
  return 1.0f / x;
#endif
}
FASTKD_INLINE double inverse(double x) { return 1.0 / x; }

// a / b for normal b > 0.
FASTKD_INLINE F ratio(F a, F b) {
#if defined(__AVX512F__)
  return a * inverse(b);
#else
  return a / b;
#endif
}
FASTKD_INLINE double ratio(double a, double b) { return a / b; }

// Half of log((1 + s) / (1 - s)), for |s| <= 1/5: s (1 + s^2 Q(s^2)) with minimax Q of degree 2
// (relative error 2.9e-9).
FASTKD_INLINE F atanh(F s) {
  const F z = s * s;
  F p = fma(splat(0.15180282f), z, splat(0.19978913f));
  p = fma(p, z, splat(0.33333474f));
  return fma(p, z * s, s);
}

// Half of log(x / m) for x >= 0 and normal, finite m > 0; finite for x = 0. x is brought near m by
// its exponent, and `above`, x - m with all its digits, serves where it is there already.
FASTKD_INLINE F half_log(F x, F m, F above) {
  const U up = (bits<U>(m) - bits<U>(x) + 0x00400000u) & 0xFF800000u;
  const F near = bits<F>(bits<U>(x) + up);
  const I k = bits<I>(up) >> 23;
  const F s = ratio(k == I{} ? above : near - m, near + m);
  return fma(__builtin_convertvector(k, F), splat(static_cast<float>(-kLn2 / 2)), atanh(s));
}

// Natural logarithm for normal, finite x > 0: at most kLogUlp ulp, exactly 0 at 1. Finite for 0 and
// for subnormal x, so that 0 * log(0) is 0 without a test; rows with a NaN never come here.
// x = 2^k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
// Given `above` = x - 1 with more digits than x has, it stands in for f where k = 0.
template <bool Given>
FASTKD_INLINE F log_of(F x, F above) {
  const U offset = bits<U>(x) - 0x3F3504F3u;
  const I k = bits<I>(offset) >> 23;
  F f = bits<F>((offset & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  if constexpr (Given) f = k == I{} ? above : f;
  return fma(__builtin_convertvector(k, F), splat(static_cast<float>(kLn2)), log1p(f));
}
FASTKD_INLINE F log(F x) { return log_of<false>(x, x); }
FASTKD_INLINE F log(F x, F above) { return log_of<true>(x, above); }

// While it lives, what would be subnormal is 0: processors take a hundred cycles for each, and a
// peaked row is full of them.
class Flush {
#if !defined(__SSE2__)
 public:
  Flush() {}  // so that a compiler does not call it unused
#else
 public:
  Flush() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8000u); }
  ~Flush() { _mm_setcsr(before_); }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;

 private:
  unsigned before_;
#endif
};

// The C library's functions in float64; flushed where the result would be subnormal, so that a
// ratio of two probabilities stays finite.
FASTKD_INLINE double exp2(double x) { return x < -1022.0 ? 0.0 : __builtin_exp2(x); }
FASTKD_INLINE double exp2m1(double x) { return __builtin_expm1(x * kLn2); }
FASTKD_INLINE double log(double x) { return __builtin_log(x == 0.0 ? __DBL_MIN__ : x); }
FASTKD_INLINE double log(double x, double above) {
  return x > 0.5 && x < 2.0 ? __builtin_log1p(above) : log(x);
}
FASTKD_INLINE double atanh(double s) { return __builtin_atanh(s); }
FASTKD_INLINE double half_log(double x, double m, double above) {
  return 2 * x > m && x < 2 * m ? atanh(above / (x + m)) : log(x / m) / 2;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
