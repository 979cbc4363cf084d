// The arithmetic: element types, conversions, exp2 and log. Plain loops over fixed blocks, which
// compilers vectorise for whatever instruction set this file is being compiled for; intrinsics
// only where there is no plain expression (half precision).
//
// Everything below module.cpp stands in a namespace named after the instruction set and, inside
// it, in an unnamed one: code compiled with AVX-512 must not be what the linker picks for another.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"

// A call left in a loop keeps it from vectorising, and compilers do leave calls to larger functions.
#define FASTKD_INLINE inline __attribute__((always_inline))

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// A block of each operand, its gradient and the hard term stay in a 32 KB L1 together.
constexpr int64_t kBlock = 1024;
// Blocks are padded to this many columns, so that no loop but the copying ones has a tail.
constexpr int64_t kPad = 16;

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
using uint_of = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type;

// a * b + c, fused where the instruction set has it; -ffp-contract=off keeps every other product
// rounded, which is what makes q - p exactly 0 for identical logits.
FASTKD_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x for x <= 1: at most kExp2Ulp ulp for x >= -126, exactly 0 below -127 and for -inf, NaN for NaN.
// Minimax polynomial of degree 6 on [-1/2, 1/2] (relative error 1.9e-9); adding 1.5 * 2^23 rounds
// x to an integer and leaves that integer in the low bits, ready to become the exponent.
FASTKD_INLINE float exp2(float x) {
  const float magic = 12582912.0f;
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float p = fma(1.534581199865e-4f, f, 1.3399931219160e-3f);
  p = fma(p, f, 9.618488957133e-3f);
  p = fma(p, f, 5.550328776966e-2f);
  p = fma(p, f, 2.4022646890634e-1f);
  p = fma(p, f, 6.9314720573727e-1f);
  p = fma(p, f, 1.0f);
  const uint32_t exponent = (bits<uint32_t>(shifted) << 23) + 0x3F800000u;
  return p * bits<float>(exponent);
}

// Natural logarithm for normal x > 0: at most kLogUlp ulp, exactly 0 at 1. Outside: finite (x = 0,
// subnormal) or NaN. x = 2^k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and minimax P of degree
// 8 in log(1 + f) = f - f^2 / 2 + f^3 P(f).
FASTKD_INLINE float log(float x) {
  const uint32_t offset = bits<uint32_t>(x) - 0x3F3504F3u;
  const float k = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = bits<float>((offset & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = fma(6.746704876423e-2f, f, -1.1675602942705e-1f);
  p = fma(p, f, 1.1888102442026e-1f);
  p = fma(p, f, -1.2405593693256e-1f);
  p = fma(p, f, 1.4219562709332e-1f);
  p = fma(p, f, -1.6667996346951e-1f);
  p = fma(p, f, 2.000211775302887e-1f);
  p = fma(p, f, -2.500000894069672e-1f);
  p = fma(p, f, 3.33333134651184e-1f);
  const float ff = f * f;
  // ln 2 in two parts, the first with 9 trailing zero bits, so that k * kHigh is exact
  float y = fma(p * f, ff, k * -2.12194440e-4f);
  y = fma(-0.5f, ff, y);
  y = fma(k, 0.693359375f, y + f);
  return x < kInf ? y : x;  // inf and NaN as they came
}

// float64 is the oracle's precision, not the fast path: the C library's functions.
// Flushed where a float64 would be subnormal, so that a ratio of two probabilities stays finite.
FASTKD_INLINE double exp2(double x) { return x < -1022.0 ? 0.0 : __builtin_exp2(x); }
FASTKD_INLINE double log(double x) { return __builtin_log(x); }
FASTKD_INLINE double fma(double a, double b, double c) { return a * b + c; }

FASTKD_INLINE float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; a NaN stays one.
FASTKD_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (u >> 16) | 0x40u);
}

// The portable half conversions, in integers and one exact float product each.
FASTKD_INLINE float from_fp16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x & 0x7FFFu) << 13;
  // the exponent is 112 too small: a product by 2^112, which also makes subnormals right
  const float scaled = bits<float>(rest) * bits<float>(0x77800000u);
  const uint32_t finite = bits<uint32_t>(scaled) | sign;
  const uint32_t special = rest | 0x7F800000u | sign;
  return bits<float>((x & 0x7C00u) == 0x7C00u ? special : finite);
}

FASTKD_INLINE uint16_t to_fp16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7FFFFFFFu;
  // normal: round to 10 bits of mantissa; subnormal: let float addition round at 2^-24
  const uint32_t normal = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3F000000u;
  const uint32_t overflow = a > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t small = a < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (a >= 0x477FF000u ? overflow : small));
}

template <class From, class To, class F>
inline void convert(const From* from, To* to, int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(f(from[i]));
}

inline void load_fp16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  convert(from + i, to + i, n - i, from_fp16);
}

inline void store_fp16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  convert(from + i, to + i, n - i, to_fp16);
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}

// Columns [at, at + n) of a row as T, followed by -inf up to a multiple of kPad: where they lie if
// they can be used there, else converted into `buffer`. A column at -inf on both sides is no
// outcome, so the padding changes nothing.
template <class T>
inline const T* load(const void* row, DType dtype, int64_t at, int64_t n, T* buffer) {
  if (dtype == dtype_of<T>() && n % kPad == 0) return static_cast<const T*>(row) + at;
  switch (dtype) {
    case DType::f32:
      convert(static_cast<const float*>(row) + at, buffer, n, [](float x) { return x; });
      break;
    case DType::f64:
      convert(static_cast<const double*>(row) + at, buffer, n, [](double x) { return x; });
      break;
    case DType::bf16:
      convert(static_cast<const uint16_t*>(row) + at, buffer, n, from_bf16);
      break;
    case DType::f16:
      if constexpr (sizeof(T) == sizeof(float)) {
        load_fp16(static_cast<const uint16_t*>(row) + at, buffer, n);
      } else {
        convert(static_cast<const uint16_t*>(row) + at, buffer, n, from_fp16);
      }
      break;
  }
  for (int64_t i = n; i % kPad != 0; ++i) buffer[i] = -kInf;
  return buffer;
}

// Where columns [at, at + n) of a gradient are to be computed: in place if load() would read there.
template <class T>
inline T* target(void* row, DType dtype, int64_t at, int64_t n, T* buffer) {
  return dtype == dtype_of<T>() && n % kPad == 0 ? static_cast<T*>(row) + at : buffer;
}

// store() past the caches, for a gradient that is larger than they are: a line that is not in them
// is then not read before it is written. False where the place or the processor does not allow it.
template <class T>
inline bool stream(const T* from, void* row, DType dtype, int64_t at, int64_t n) {
#if defined(__SSE2__)
  T* to = static_cast<T*>(row) + at;
  if (dtype != dtype_of<T>() || n % kPad != 0 || reinterpret_cast<uintptr_t>(to) % 64 != 0)
    return false;
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  const int64_t bytes = n * int64_t{sizeof(T)};
#if defined(__AVX512F__)
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_load_si512(source + i));
#else
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
  return true;
#else
  (void)from, (void)row, (void)dtype, (void)at, (void)n;
  return false;
#endif
}

template <class T>
inline void store(const T* from, void* row, DType dtype, int64_t at, int64_t n) {
  switch (dtype) {
    case DType::f32:
      convert(from, static_cast<float*>(row) + at, n, [](T x) { return x; });
      break;
    case DType::f64:
      convert(from, static_cast<double*>(row) + at, n, [](T x) { return x; });
      break;
    case DType::bf16:
      convert(from, static_cast<uint16_t*>(row) + at, n,
              [](T x) { return to_bf16(static_cast<float>(x)); });
      break;
    case DType::f16:
      if constexpr (sizeof(T) == sizeof(float)) {
        store_fp16(from, static_cast<uint16_t*>(row) + at, n);
      } else {
        convert(from, static_cast<uint16_t*>(row) + at, n,
                [](T x) { return to_fp16(static_cast<float>(x)); });
      }
      break;
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
