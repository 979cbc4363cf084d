// The general form: loops over one row whose statistics are known, the same for every divergence.
// The passes stats, loss and grad are made of them. The fused pass falls back on them for a row
// that is beyond its bounds.
//
// A loop walks over blocks that stay in the L1 cache, as floats or doubles; sums over blocks are
// kept in double. A score is (x - max) * log2(e) / T: shifted by the row's maximum before it is
// scaled, so that it is exact near the maximum however large the logits are.
#pragma once

#include "divergence.h"
#include "dtype.h"
#include "kernels.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr double kNaN = __builtin_nan("");
constexpr double kInfinity = __builtin_inf();

template <class T>
constexpr DType kNative = std::is_same<T, float>::value ? DType::f32 : DType::f64;
template <class T>
using Plain = Reader<kNative<T>>;

template <class T>
struct alignas(64) Buffers {
  T s[kBlock];
  T t[kBlock];
  T g[kBlock];
};

// One side's softmax: the maximum, the sum of exp2((x - max) * c), and the sum of x - max.
struct Stats {
  double top = -kInfinity;
  double sum = 0.0;
  double below = 0.0;

  double shift() const { return top == -kInfinity ? 0.0 : top; }
  double log_sum() const { return top + __builtin_log(sum); }
};

// Ignores NaN. The sums of a row with a NaN are NaN anyway.
template <DType K>
inline auto max_of(const typename Kind<K>::Element* x, int64_t n) -> typename Kind<K>::Acc {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  V a = splat(T(-kInf)), b = a;
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    const Two<V> group = Kind<K>::load(x + i);
    a = larger(group.a, a);
    b = larger(group.b, b);
  }
  return largest(larger(a, b));
}

template <class T>
struct Score {  // log2 probability of x is (x - top) * c - log_sum
  Vec<T> top;
  Vec<T> c;
  Vec<T> log_sum;

  Score(const Stats& side, double scale)
      : top(splat(static_cast<T>(side.shift()))),
        c(splat(static_cast<T>(scale))),
        log_sum(splat(static_cast<T>(__builtin_log2(side.sum)))) {}
  FASTKD_INLINE Vec<T> operator()(Vec<T> x) const { return fma(x - top, c, -log_sum); }
};

// Sum of x - top over n columns, without the padding.
template <class T>
inline double sum_above(const T* x, int64_t n, T top) {
  using V = Vec<T>;
  const V shift = splat(top);
  V a{}, b{};
  int64_t i = 0;
  for (; i + kGroup<T> <= n; i += kGroup<T>) {
    const Two<V> group = Kind<kNative<T>>::load(x + i);
    a += group.a - shift;
    b += group.b - shift;
  }
  double sum = static_cast<double>(total(a)) + static_cast<double>(total(b));
  for (; i < n; ++i) sum += static_cast<double>(x[i] - top);
  return sum;
}

template <class T>
inline void stats_loop(const Plain<T>& read, int64_t vocab, double scale, Stats& side) {
  using V = Vec<T>;
  const V c = splat(static_cast<T>(scale));
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t n = least(kBlock, vocab - at), m = padded<T>(n);
    const T* x = read(at, n);
    const double block = static_cast<double>(max_of<kNative<T>>(x, m)), old = side.shift();
    if (block > side.top) {
      side.sum *= side.top == -kInfinity ? 1.0 : exp2((side.top - block) * scale);
      side.top = block;
    }
    side.below += static_cast<double>(at) * (old - side.shift());
    const V top = splat(static_cast<T>(side.shift()));
    V a{}, b{};
    for (int64_t i = 0; i < m; i += kGroup<T>) {
      const Two<V> y = Kind<kNative<T>>::load(x + i);
      a += exp2((y.a - top) * c);
      b += exp2((y.b - top) * c);
    }
    side.sum += static_cast<double>(total(a)) + static_cast<double>(total(b));
    side.below += sum_above<T>(x, n, static_cast<T>(side.shift()));
  }
}

// The arguments of a pair at one vector of columns.
template <class V>
struct Column {
  V logp, logq, p, q;
};

template <class T>
struct Sides {
  Score<T> q_of;
  Score<T> p_of;
  FASTKD_INLINE Column<Vec<T>> operator()(Vec<T> x, Vec<T> y) const {
    const T ln2 = static_cast<T>(kLn2);
    const Vec<T> lq = q_of(x), lp = p_of(y);
    return {lp * ln2, lq * ln2, exp2(lp), exp2(lq)};
  }
};

// Value and centred slope at a column; `centre` is of `centred`.
template <class D, class V, class T>
FASTKD_INLINE Sloped<V> pair_at(const Column<V>& at, T param, Origin<T> centre) {
  if constexpr (D::expectation != Expectation::none) {
    return D::at(at.logp, at.logq, at.p, at.q);
  } else {
    const Rated<V> point = D::at(at.p, at.q, Subtract{}, param);
    return {point.value, at.q * centre(point)};
  }
}

template <class T, class D>
inline void pair_loop(const Args& a, const Plain<T>& student, const Plain<T>& teacher,
                      const Sides<T>& sides, double& value, double& slope) {
  using V = Vec<T>;
  const T param = static_cast<T>(a.param);
  const Origin<T> centre = centred<D>(param);
  for (int64_t at = (a.vocab - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    const int64_t n = least(kBlock, a.vocab - at);
    const T* x = student(at, n);
    const T* y = teacher(at, n);
    V values{}, slopes{};
    for (int64_t i = 0; i < padded<T>(n); i += Simd<T>::lanes) {
      const Sloped<V> point = pair_at<D>(sides(loadu<V>(x + i), loadu<V>(y + i)), param, centre);
      values += point.value;
      slopes += point.slope;
    }
    value += static_cast<double>(total(values));
    slope += static_cast<double>(total(slopes));
  }
}

inline void fill(const Args& a, int64_t r, int64_t from, double value) {
  char* row = a.grad.row(r);
  const int64_t size = size_of(a.grad.dtype);
  if (value == 0.0) {
    __builtin_memset(row + from * size, 0, static_cast<uint64_t>((a.width - from) * size));
    return;
  }
  for (int64_t at = from; at < a.vocab; ++at) narrow_any(&value, row, a.grad.dtype, at, 1);
  fill(a, r, a.vocab, 0.0);
}

// What the gradient loop needs of a row.
template <class T>
struct Slopes {
  Sides<T> sides;
  Score<T> hard_of;  // the student at T = 1
  double slope;      // sum of centred slopes
  double by;         // of the soft term: see `of_sum`
  double log_sum;    // the student's log-sum-exp at T = 1
  double scale;      // of the whole row
};

// Factors of the gradient of one row. Only what is taken at T = 1 uses h, uniform and label.
struct Factors {
  double k;        // of the soft term's slopes
  double h;        // of the softmax at T = 1
  double uniform;  // what label smoothing subtracts everywhere
  double label;    // what the label's column loses
  int64_t column;

  Factors(const Args& a, int64_t r, double scale, double by, double log_sum)
      : k(scale * a.soft / a.temperature * by),
        h(scale * (a.z == 0.0 ? a.hard : a.hard + 2.0 * a.z * log_sum)),
        uniform(scale * a.hard * (a.smoothing / static_cast<double>(a.classes))),
        label(scale * a.hard * (1.0 - a.smoothing)),
        column(a.label != nullptr && a.hard != 0.0 ? a.label[r] : -1) {}
};

// Writes k (slope - q * sum of slopes) and, with a hard term, h (softmax - smoothing / classes);
// the label's column loses its own factor afterwards. From the last block to the first, because the
// loop before has left the last blocks in the cache.
template <class T, class D>
inline void grad_loop(const Args& a, int64_t r, const Plain<T>& student, const Plain<T>& teacher,
                      const Slopes<T>& w, T* buffer) {
  using V = Vec<T>;
  const Factors f(a, r, w.scale, 1.0, w.log_sum);
  const T param = static_cast<T>(a.param), k = static_cast<T>(f.k);
  const Origin<T> centre = centred<D>(param);
  const V slope = splat(static_cast<T>(-w.slope));
  const V h = splat(static_cast<T>(f.h)), uniform = splat(static_cast<T>(f.uniform));
  const Writer<kNative<T>> write{a.grad.row(r), a.grad.dtype, buffer};
  for (int64_t at = (a.vocab - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    const int64_t n = least(kBlock, a.vocab - at);
    const T* x = student(at, n);
    const T* y = teacher(at, n);
    T* g = write(at, n);
    for (int64_t i = 0; i < padded<T>(n); i += Simd<T>::lanes) {
      const V logits = loadu<V>(x + i);
      const Column<V> column = w.sides(logits, loadu<V>(y + i));
      V out = fma(slope, column.q, pair_at<D>(column, param, centre).slope);
      // first: k times the factor may overflow a float
      if constexpr (kOfSum<D>) out *= splat(static_cast<T>(w.by));
      out *= k;
      if (a.at_one()) out += fma(h, exp2(w.hard_of(logits)), -uniform);
      storeu(g + i, out);
    }
    if (f.column >= at && f.column < at + n) g[f.column - at] -= static_cast<T>(f.label);
    write.done(g, at, n);
  }
  fill(a, r, a.vocab, 0.0);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
