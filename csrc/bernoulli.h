// Losses of one logit each: a divergence of two Bernoulli distributions, and a cross-entropy with a
// label. A logit is a value and its slopes, and needs no other: there is no row, no sum before the
// last, and elements go in blocks whose operands are converted to the accumulation type.
//
// p = sigmoid(a) is the teacher's probability, q = sigmoid(b) the student's. fastkd/bernoulli.py
// has the formulas in torch, and says why the KL negates both logits where their sum is positive.
#pragma once

#include "dtype.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

template <class V>
FASTKD_INLINE V positive(V x) {  // NaN for NaN
  return x < V{} ? V{} : x;
}

// The probabilities of yes and no, and log(1 + e^-|x|), which softplus(x) is above max(x, 0).
template <class V>
struct Sigmoid {
  V yes;
  V no;
  V low;

  explicit FASTKD_INLINE Sigmoid(V x) {
    using T = std::conditional_t<std::is_same<V, double>::value, double, float>;
    const V e = exp2((x < V{} ? x : -x) * static_cast<T>(kLog2E));
    const V r = inverse(e + T(1));
    const V er = e * r;
    yes = x < V{} ? er : r;
    no = x < V{} ? r : er;
    low = log(e + T(1), e);
  }
};

template <class V>
struct PairOf {
  V value;
  V by_teacher;
  V by_student;
};

// w * x with 0 * anything = 0
template <class V>
FASTKD_INLINE V if_any(V w, V x) {
  return w * zero_unless<V>(w != V{}, x);
}

// a: logits of p, b: of q
template <class V>
FASTKD_INLINE PairOf<V> kl_of(V a, V b) {
  const auto flip = (a + b > V{}) | (a == V{} + kInf);
  const V x = flip ? -a : a, y = flip ? -b : b;
  const Sigmoid<V> p(x), q(y);
  const V gap = zero_unless<V>(p.yes != V{}, x - y);
  const V above = (positive(y) - positive(x)) + (q.low - p.low);
  const V by_a = p.yes * p.no * gap, by_b = q.yes - p.yes;
  return {fma(p.yes, gap, above), flip ? -by_a : by_a, flip ? -by_b : by_b};
}

template <class V, class T>
FASTKD_INLINE PairOf<V> js_of(V a, V b, T beta) {
  const Sigmoid<V> p(a), q(b);
  const T other = T(1) - beta;
  const V log_yes = log(p.yes * beta + q.yes * other), log_no = log(p.no * beta + q.no * other);
  const V p_yes = -(positive(-a) + p.low) - log_yes, p_no = -(positive(a) + p.low) - log_no;
  const V q_yes = -(positive(-b) + q.low) - log_yes, q_no = -(positive(b) + q.low) - log_no;
  const V of_p = if_any(p.yes, p_yes) + if_any(p.no, p_no);
  const V of_q = if_any(q.yes, q_yes) + if_any(q.no, q_no);
  return {of_p * beta + of_q * other, if_any<V>(p.yes * p.no, p_yes - p_no) * beta,
          if_any<V>(q.yes * q.no, q_yes - q_no) * other};
}

enum class Pair { none, kl, reverse_kl, js };

// Elements of a block: all of its buffers stay in the first level of the cache.
constexpr int64_t kElements = 512;

// Blocks of an operand, as T.
template <class T>
struct ElementBlock {
  T s[kElements], t[kElements], y[kElements], w[kElements], pos[kElements], by_s[kElements],
      by_t[kElements];
};

template <class T>
constexpr DType kind_of = std::is_same<T, double>::value ? DType::f64 : DType::f32;

// A factor of the elements [at, at + n): element i has number (i / repeat) % count.
template <class T>
__attribute__((noinline)) void factors(const Factor& f, int64_t at, int64_t n, T* to) {
  const T* from = static_cast<const T*>(f.data);
  if (from == nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = T(1);
    return;
  }
  int64_t left = f.repeat - at % f.repeat, k = at / f.repeat % f.count;
  for (int64_t i = 0; i < n;) {
    const int64_t run = f.repeat == 1 ? least(f.count - k, n - i) : least(left, n - i);
    if (f.repeat == 1) {
      __builtin_memcpy(to + i, from + k, static_cast<uint64_t>(run) * sizeof(T));
      k += run;
    } else {
      for (int64_t j = 0; j < run; ++j) to[i + j] = from[k];
      left = f.repeat;
      ++k;
    }
    k = k == f.count ? 0 : k;
    i += run;
  }
}

template <class T>
__attribute__((noinline)) const T* read(const char* data, DType dtype, int64_t at, int64_t n,
                                        T* buffer) {
  if (dtype == kind_of<T> && n % kGroup<T> == 0) return reinterpret_cast<const T*>(data) + at;
  widen_any(data, dtype, at, n, buffer);
  for (int64_t i = n; i < padded<T>(n); ++i) buffer[i] = T(0);
  return buffer;
}

template <class T>
__attribute__((noinline)) void write(const T* from, char* to, DType dtype, int64_t at, int64_t n) {
  if (to != nullptr) narrow_any(from, to, dtype, at, n);
}

// One block: the sum of the values times their factors, and what is written of each element.
template <class T, Pair D, bool Hard>
double element_block(const BernoulliArgs& a, int64_t at, int64_t n, ElementBlock<T>& memory) {
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  const T* s = read(a.student, a.student_dtype, at, n, memory.s);
  const T* t = D == Pair::none ? s : read(a.teacher, a.teacher_dtype, at, n, memory.t);
  const int64_t m = padded<T>(n);
  a.read_labels(a, at, n, memory.y);
  factors(a.weight, at, n, memory.w);
  if (Hard) factors(a.pos_weight, at, n, memory.pos);
  if (a.upstream != nullptr)
    for (int64_t i = 0; i < n; ++i) memory.w[i] *= static_cast<const T*>(a.upstream)[at + i];
  for (int64_t i = n; i < m; ++i) memory.y[i] = static_cast<T>(kInf - kInf);  // left out
  const T inverse_t = static_cast<T>(1.0 / a.temperature), soft = static_cast<T>(a.soft);
  const T hard = static_cast<T>(a.hard), of_soft = static_cast<T>(a.soft / a.temperature);
  const T by = static_cast<T>(a.factor), beta = static_cast<T>(a.param);
  T* values = static_cast<T*>(a.values);
  V sum{};
  for (int64_t i = 0; i < m; i += lanes) {
    const V x = loadu<V>(s + i), y = loadu<V>(memory.y + i), w = loadu<V>(memory.w + i);
    const auto keep = y == y;
    V value{}, by_s{}, by_t{};
    if constexpr (D != Pair::none) {
      const V u = loadu<V>(t + i) * inverse_t, v = x * inverse_t;
      const PairOf<V> of = D == Pair::js   ? js_of<V, T>(u, v, beta)
                           : D == Pair::kl ? kl_of<V>(u, v)
                                           : kl_of<V>(v, u);
      value = of.value * soft;
      by_s = (D == Pair::reverse_kl ? of.by_teacher : of.by_student) * of_soft;
      by_t = (D == Pair::reverse_kl ? of.by_student : of.by_teacher) * of_soft;
    }
    if constexpr (Hard) {
      const V yes = y * loadu<V>(memory.pos + i), no = T(1) - y;
      const Sigmoid<V> q(x);
      const V far = if_any(yes, positive(-x)) + if_any(no, positive(x));
      value = value + fma(yes + no, q.low, far) * hard;
      by_s = by_s + (no * q.yes - yes * q.no) * hard;
    }
    value = zero_unless<V>(keep, value * w);
    sum += value;
    if (values != nullptr) storeu(memory.t + i, value);
    const V f = w * by;
    storeu(memory.by_s + i, zero_unless<V>(keep, by_s * f));
    storeu(memory.by_t + i, zero_unless<V>(keep, by_t * f));
  }
  if (values != nullptr)
    __builtin_memcpy(values + at, memory.t, static_cast<uint64_t>(n) * sizeof(T));
  write(memory.by_s, a.grad_s, a.student_dtype, at, n);
  write(memory.by_t, a.grad_t, a.teacher_dtype, at, n);
  return static_cast<double>(total(sum));
}

template <class T>
double bernoulli(const BernoulliArgs& a, int64_t begin, int64_t end) {
  const Flush flush;
  ElementBlock<T> memory;
  const bool hard = a.hard != 0.0;
  auto run = element_block<T, Pair::none, true>;
  if (a.soft != 0.0) switch (a.divergence) {
      case 1:
        run = hard ? element_block<T, Pair::kl, true> : element_block<T, Pair::kl, false>;
        break;
      case 2:
        run = hard ? element_block<T, Pair::reverse_kl, true>
                   : element_block<T, Pair::reverse_kl, false>;
        break;
      default:
        run = hard ? element_block<T, Pair::js, true> : element_block<T, Pair::js, false>;
        break;
    }
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += kElements)
    sum += run(a, at, least(kElements, end - at), memory);
  return sum;
}

#if defined(FASTKD_WITH_F64)  // compiled once: they wait for memory, whatever the vectors are

// Labels as T, NaN where one is left out; whether all the others are from 0 to 1.
template <class W, class T, class E, class Widen>
inline bool labels_as(const E* from, Widen widen, const BernoulliArgs& a, int64_t n, T* to) {
  // one loop for each question, so that each is one of vectors
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
  for (int64_t k = 0; k < a.ignored_count; ++k) {
    const W ignored = static_cast<W>(a.ignored[k]);
    for (int64_t i = 0; i < n; ++i)
      to[i] = widen(from[i]) == ignored ? static_cast<T>(kInf - kInf) : to[i];
  }
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (to[i] < T(0)) | (to[i] > T(1));
  return bad == 0;
}
template <class E, class T>
inline bool integers_as(const void* from, const BernoulliArgs& a, int64_t at, int64_t n, T* to) {
  const auto widen = [](E x) { return static_cast<int64_t>(x); };
  return labels_as<int64_t, T>(static_cast<const E*>(from) + at, widen, a, n, to);
}
template <DType K, class T>
inline bool floats_as(const void* from, const BernoulliArgs& a, int64_t at, int64_t n, T* to) {
  using E = typename Kind<K>::Element;
  using W = typename Kind<K>::Acc;
  const auto widen = [](E x) { return Kind<K>::widen(x); };
  return labels_as<W, T>(static_cast<const E*>(from) + at, widen, a, n, to);
}
template <class T>
bool labels(const BernoulliArgs& a, int64_t at, int64_t n, void* into) {
  T* to = static_cast<T*>(into);
  switch (a.label_kind) {
    case LabelKind::none:
      for (int64_t i = 0; i < n; ++i) to[i] = T(0);
      return true;
    case LabelKind::f32: return floats_as<DType::f32>(a.labels, a, at, n, to);
    case LabelKind::bf16: return floats_as<DType::bf16>(a.labels, a, at, n, to);
    case LabelKind::f16: return floats_as<DType::f16>(a.labels, a, at, n, to);
    case LabelKind::f64: return floats_as<DType::f64>(a.labels, a, at, n, to);
    case LabelKind::i64: return integers_as<int64_t>(a.labels, a, at, n, to);
    case LabelKind::i32: return integers_as<int32_t>(a.labels, a, at, n, to);
    case LabelKind::i16: return integers_as<int16_t>(a.labels, a, at, n, to);
    case LabelKind::i8: return integers_as<int8_t>(a.labels, a, at, n, to);
    case LabelKind::u8: return integers_as<uint8_t>(a.labels, a, at, n, to);
  }
  return false;
}

// The sum of the weights of the labels that count; -inf where one is not from 0 to 1.
template <class T>
double counted(const BernoulliArgs& a, int64_t begin, int64_t end) {
  ElementBlock<T> memory;
  double sum = 0.0;
  for (int64_t at = begin; at < end; at += kElements) {
    const int64_t n = least(kElements, end - at);
    if (!labels<T>(a, at, n, memory.y)) return -double{kInf};
    factors(a.weight, at, n, memory.w);
    double lane[8] = {};
    for (int64_t i = 0; i < n; ++i)
      lane[i % 8] += memory.y[i] == memory.y[i] ? static_cast<double>(memory.w[i]) : 0.0;
    for (int64_t i = 0; i < 8; ++i) sum += lane[i];
  }
  return sum;
}

#endif
}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
