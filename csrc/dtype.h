// The element types. A row is read and written in groups of two vectors. Where the dtypes of the
// two sides differ, a block goes through a buffer of the accumulation type.
#pragma once

#include "vec.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Columns of a block. As floats, a block of each operand and of the gradient fit into a 32 KB L1.
constexpr int64_t kBlock = 2048;
constexpr int64_t kLine = 64;  // bytes of a cache line
// Bytes of the prefetch distance. The hardware's own prefetching follows the loads, and these come
// in bursts with exponentials between them (512 x 32 000 float: 6.0 ms without, 4.9 ms with).
constexpr int64_t kAhead = 4096;

// ---- one element

FASTKD_INLINE float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest even; a NaN stays one.
FASTKD_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : (u >> 16) | 0x40u);
}

// In integers and one exact float product each. V and M: float and uint32_t, or vectors of them.
template <class V, class M>
FASTKD_INLINE V half_bits_to_float(M x) {
  const M sign = (x & 0x8000u) << 16;
  const M rest = (x & 0x7FFFu) << 13;
  // The exponent is 112 too small. A subnormal is the difference of two normal floats: that holds
  // also where the processor treats subnormal operands as 0.
  const M normal = rest + 0x38000000u;
  const V apart = bits<V>(rest + 0x38800000u) - 0x1p-14f;
  const M finite = (x & 0x7C00u) == 0u ? bits<M>(apart) : normal;
  const M special = rest | 0x7F800000u;
  return bits<V>(((x & 0x7C00u) == 0x7C00u ? special : finite) | sign);
}

template <class V, class M>
FASTKD_INLINE M float_to_half_bits(V x) {
  const M u = bits<M>(x);
  const M sign = (u >> 16) & 0x8000u;
  const M a = u & 0x7FFFFFFFu;
  // normal: round to 10 bits of mantissa; subnormal: let float addition round at 2^-24
  const M normal = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  const M subnormal = bits<M>(bits<V>(a) + 0.5f) - 0x3F000000u;
  const M zero = a ^ a;
  const M overflow = a > 0x7F800000u ? zero + 0x7E00u : zero + 0x7C00u;
  const M small = a < 0x38800000u ? subnormal : normal;
  return sign | (a >= 0x477FF000u ? overflow : small);
}

FASTKD_INLINE float from_fp16(uint16_t x) { return half_bits_to_float<float>(uint32_t{x}); }
FASTKD_INLINE uint16_t to_fp16(float x) {
  return static_cast<uint16_t>(float_to_half_bits<float, uint32_t>(x));
}

// ---- a group: two vectors of columns, in an order that load and store agree on

template <DType K>
struct Kind;

template <class T>
struct Native {
  using Acc = T;
  using Element = T;
  static FASTKD_INLINE T widen(T x) { return x; }
  static FASTKD_INLINE T narrow(T x) { return x; }
  static FASTKD_INLINE Two<Vec<T>> load(const T* x) {
    return {loadu<Vec<T>>(x), loadu<Vec<T>>(x + Simd<T>::lanes)};
  }
  static FASTKD_INLINE void store(T* to, Two<Vec<T>> x) {
    storeu(to, x.a);
    storeu(to + Simd<T>::lanes, x.b);
  }
  static FASTKD_INLINE void past_caches(T* to, Two<Vec<T>> x) {
    stream(to, x.a);
    stream(to + Simd<T>::lanes, x.b);
  }
  static constexpr bool interleaved = false;
};
template <>
struct Kind<DType::f32> : Native<float> {
  static constexpr float lowest = -kInf;
};
template <>
struct Kind<DType::f64> : Native<double> {
  static constexpr double lowest = -kInf;
};

// Words of two 16-bit elements become a vector of the even columns and one of the odd columns, by a
// shift and a mask: no lane changes its place.
struct Words {
  using Acc = float;
  using Element = uint16_t;
  static constexpr bool interleaved = true;
  static FASTKD_INLINE U word(const uint16_t* x) { return loadu<U>(x); }
};

template <>
struct Kind<DType::bf16> : Words {
  static constexpr uint16_t lowest = 0xFF80;
  static FASTKD_INLINE float widen(uint16_t x) { return from_bf16(x); }
  static FASTKD_INLINE uint16_t narrow(float x) { return to_bf16(x); }
  static FASTKD_INLINE Two<F> load(const uint16_t* x) {
    const U u = word(x);
    return {bits<F>(u << 16), bits<F>(u & 0xFFFF0000u)};
  }
  // A row with a NaN in its logits or scale is filled, not computed. So the only NaNs here are the
  // processor's own, and this rounding keeps them.
  static FASTKD_INLINE U pack(Two<F> x) {
    U a = bits<U>(x.a), b = bits<U>(x.b);
    a += ((a >> 16) & 1u) + 0x7FFFu;
    b += ((b >> 16) & 1u) + 0x7FFFu;
    return (b & 0xFFFF0000u) | (a >> 16);
  }
  static FASTKD_INLINE void store(uint16_t* to, Two<F> x) { storeu(to, pack(x)); }
  static FASTKD_INLINE void past_caches(uint16_t* to, Two<F> x) { stream(to, pack(x)); }
};

template <>
struct Kind<DType::f16> : Words {
  static constexpr uint16_t lowest = 0xFC00;
  static FASTKD_INLINE float widen(uint16_t x) { return from_fp16(x); }
  static FASTKD_INLINE uint16_t narrow(float x) { return to_fp16(x); }
#if defined(__AVX512F__)
  static constexpr bool interleaved = false;
  static FASTKD_INLINE Two<F> load(const uint16_t* x) {
    return {_mm512_cvtph_ps(loadu<__m256i>(x)), _mm512_cvtph_ps(loadu<__m256i>(x + 16))};
  }
  static FASTKD_INLINE __m512i pack(Two<F> x) {
    const __m256i a = _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i b = _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  static FASTKD_INLINE void store(uint16_t* to, Two<F> x) { storeu(to, pack(x)); }
  static FASTKD_INLINE void past_caches(uint16_t* to, Two<F> x) { stream(to, pack(x)); }
#elif defined(__F16C__)
  static constexpr bool interleaved = false;
  static FASTKD_INLINE Two<F> load(const uint16_t* x) {
    return {_mm256_cvtph_ps(loadu<__m128i>(x)), _mm256_cvtph_ps(loadu<__m128i>(x + 8))};
  }
  static FASTKD_INLINE __m256i pack(Two<F> x) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  }
  static FASTKD_INLINE void store(uint16_t* to, Two<F> x) { storeu(to, pack(x)); }
  static FASTKD_INLINE void past_caches(uint16_t* to, Two<F> x) { stream(to, pack(x)); }
#elif defined(__aarch64__)
  static constexpr bool interleaved = false;
  static FASTKD_INLINE Two<F> load(const uint16_t* x) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))),
            vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4)))};
  }
  static FASTKD_INLINE void store(uint16_t* to, Two<F> x) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x.a)));
    vst1_u16(to + 4, vreinterpret_u16_f16(vcvt_f16_f32(x.b)));
  }
  static FASTKD_INLINE void past_caches(uint16_t* to, Two<F> x) { store(to, x); }
#else
  static FASTKD_INLINE Two<F> load(const uint16_t* x) {
    const U u = word(x);
    return {half_bits_to_float<F>(u & 0xFFFFu), half_bits_to_float<F>(u >> 16)};
  }
  static FASTKD_INLINE U pack(Two<F> x) {
    return float_to_half_bits<F, U>(x.a) | (float_to_half_bits<F, U>(x.b) << 16);
  }
  static FASTKD_INLINE void store(uint16_t* to, Two<F> x) { storeu(to, pack(x)); }
  static FASTKD_INLINE void past_caches(uint16_t* to, Two<F> x) { stream(to, pack(x)); }
#endif
};

// Where column j of a group stands in its two vectors laid end to end.
template <DType K>
inline int64_t column_in_group(int64_t j) {
  constexpr int64_t lanes = Simd<typename Kind<K>::Acc>::lanes;
  return Kind<K>::interleaved ? (j % 2) * lanes + j / 2 : j;
}

// ---- blocks through a buffer

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <class T>
inline int64_t padded(int64_t n) {
  return (n + kGroup<T> - 1) / kGroup<T> * kGroup<T>;
}

template <DType K, class T>
inline void widen(const char* row, int64_t at, int64_t n, T* to) {
  const auto* from = reinterpret_cast<const typename Kind<K>::Element*>(row) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(Kind<K>::widen(from[i]));
}

template <DType K, class T>
inline void narrow(const T* from, char* row, int64_t at, int64_t n) {
  using Acc = typename Kind<K>::Acc;
  auto* to = reinterpret_cast<typename Kind<K>::Element*>(row) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = Kind<K>::narrow(static_cast<Acc>(from[i]));
}

// Columns [at, at + n) as T.
template <class T>
inline void widen_any(const char* row, DType dtype, int64_t at, int64_t n, T* to) {
  switch (dtype) {
    case DType::f32: return widen<DType::f32>(row, at, n, to);
    case DType::f64: return widen<DType::f64>(row, at, n, to);
    case DType::bf16: return widen<DType::bf16>(row, at, n, to);
    case DType::f16: return widen<DType::f16>(row, at, n, to);
  }
}
template <class T>
inline void narrow_any(const T* from, char* row, DType dtype, int64_t at, int64_t n) {
  switch (dtype) {
    case DType::f32: return narrow<DType::f32>(from, row, at, n);
    case DType::f64: return narrow<DType::f64>(from, row, at, n);
    case DType::bf16: return narrow<DType::bf16>(from, row, at, n);
    case DType::f16: return narrow<DType::f16>(from, row, at, n);
  }
}

// Reads a row of one side in blocks of whole groups. A whole block of kind K is read where it lies.
// Any other is copied to `buffer`, converted and padded with -inf. A column at -inf on both sides
// is no outcome, so the padding changes nothing.
template <DType K>
struct Reader {
  using Element = typename Kind<K>::Element;
  const char* row;
  DType dtype;
  Element* buffer;

  const Element* operator()(int64_t at, int64_t n) const {
    const int64_t m = padded<typename Kind<K>::Acc>(n);
    if (dtype == K) {
      const Element* there = reinterpret_cast<const Element*>(row) + at;
      if (n == m) return there;
      __builtin_memcpy(buffer, there, static_cast<uint64_t>(n) * sizeof(Element));
    } else if constexpr (K == DType::f32 || K == DType::f64) {
      const char* next = row + (at + n) * size_of(dtype);
      for (int64_t i = 0; i < n * size_of(dtype); i += kLine) __builtin_prefetch(next + i, 0, 2);
      widen_any(row, dtype, at, n, buffer);
    }
    for (int64_t i = n; i < m; ++i) buffer[i] = Kind<K>::lowest;
    return buffer;
  }

  double element(int64_t at) const {
    double x;
    widen_any(row, dtype, at, 1, &x);
    return x;
  }
};

// Writes a row of the gradient: the counterpart of Reader.
template <DType K>
struct Writer {
  using Element = typename Kind<K>::Element;
  char* row;
  DType dtype;
  Element* buffer;

  Element* operator()(int64_t at, int64_t n) const {
    const bool there = dtype == K && n % kGroup<typename Kind<K>::Acc> == 0;
    return there ? reinterpret_cast<Element*>(row) + at : buffer;
  }
  void done(const Element* block, int64_t at, int64_t n) const {
    if (block != buffer) return;
    if (dtype == K) {
      __builtin_memcpy(row + at * size_of(K), block, static_cast<uint64_t>(n) * sizeof(Element));
    } else if constexpr (K == DType::f32 || K == DType::f64) {
      narrow_any(block, row, dtype, at, n);
    }
  }
};

// Whether groups can be written past the caches: `to` must be aligned to a vector.
template <class V>
inline bool can_stream(const void* to) {
  return reinterpret_cast<uintptr_t>(to) % sizeof(V) == 0;
}

// Prefetches some bytes into the L2 cache.
FASTKD_INLINE void prefetch_bytes(uintptr_t from, int64_t bytes) {
  for (int64_t i = 0; i < (bytes < kLine ? kLine : bytes); i += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(i)), 0, 2);
}
template <class Element>
FASTKD_INLINE void prefetch_ahead(const Element* x, int64_t columns) {
  prefetch_bytes(reinterpret_cast<uintptr_t>(x) + kAhead, columns * int64_t{sizeof(Element)});
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
