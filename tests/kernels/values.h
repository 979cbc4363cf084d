// Numbers as bits, decoded and rounded without the kernels' help, and the source of random ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace check {

using fastkd::DType;
using fastkd::size_of;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Format {
  int exponent;  // bits of it
  int mantissa;  // bits stored
  int bias() const { return (1 << (exponent - 1)) - 1; }
  double largest() const { return std::ldexp(2.0 - std::ldexp(1.0, -mantissa), bias()); }
  double smallest_normal() const { return std::ldexp(1.0, 1 - bias()); }
  double smallest() const { return std::ldexp(1.0, 1 - bias() - mantissa); }
  double unit() const { return std::ldexp(1.0, -mantissa - 1); }  // of one rounding
};

inline Format format_of(DType dtype) {
  static const Format formats[] = {{8, 23}, {8, 7}, {5, 10}, {11, 52}};
  return formats[static_cast<int>(dtype)];
}

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"f32", "bf16", "f16", "f64"};
  return names[static_cast<int>(dtype)];
}

inline uint64_t read_bits(const char* at, DType dtype) {
  uint64_t bits = 0;  // the machines of these tests are little endian
  std::memcpy(&bits, at, static_cast<size_t>(size_of(dtype)));
  return bits;
}

inline void write_bits(char* at, DType dtype, uint64_t bits) {
  std::memcpy(at, &bits, static_cast<size_t>(size_of(dtype)));
}

inline double decode(uint64_t bits, DType dtype) {
  const Format f = format_of(dtype);
  const uint64_t mantissa = bits & ((uint64_t{1} << f.mantissa) - 1);
  const int exponent = static_cast<int>(bits >> f.mantissa) & ((1 << f.exponent) - 1);
  const bool negative = (bits >> (f.mantissa + f.exponent) & 1) != 0;
  double x;
  if (exponent == (1 << f.exponent) - 1) {
    x = mantissa != 0 ? kNaN : kInf;
  } else {
    const uint64_t implied = exponent != 0 ? uint64_t{1} << f.mantissa : 0;
    const int power = (exponent != 0 ? exponent : 1) - f.bias() - f.mantissa;
    x = std::ldexp(static_cast<double>(mantissa | implied), power);
  }
  return negative ? -x : x;
}

// The nearest number of the dtype, ties to even.
inline uint64_t encode(double x, DType dtype) {
  const Format f = format_of(dtype);
  const uint64_t sign = uint64_t{std::signbit(x)} << (f.mantissa + f.exponent);
  const uint64_t infinity = ((uint64_t{1} << f.exponent) - 1) << f.mantissa;
  if (x != x) return sign | infinity | uint64_t{1} << (f.mantissa - 1);
  const double a = std::fabs(x);
  if (a == kInf) return sign | infinity;
  int power = 0;
  std::frexp(a, &power);
  const int lowest = 1 - f.bias();
  const int exponent = a == 0.0 || power - 1 < lowest ? lowest : power - 1;
  const double units = std::nearbyint(std::ldexp(a, f.mantissa - exponent));
  // a carry out of the mantissa is the next exponent, and out of the largest one infinity
  const uint64_t bits =
      static_cast<uint64_t>(units) + (static_cast<uint64_t>(exponent - lowest) << f.mantissa);
  return sign | (bits < infinity ? bits : infinity);
}

struct Random {  // splitmix64
  uint64_t state;

  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t a, int64_t b) { return a + below(b - a + 1); }
  double unit() { return std::ldexp(static_cast<double>(next() >> 11), -53); }
  bool chance(double p) { return unit() < p; }
  double normal() {
    return std::sqrt(-2.0 * std::log(1.0 - unit())) * std::cos(6.283185307179586 * unit());
  }
  template <class T, int n>
  T pick(const T (&of)[n]) {
    return of[below(n)];
  }
};

}  // namespace check
