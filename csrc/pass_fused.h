// The fused pass over one row: every logit is read once, and every exponential is computed once.
//
// Three loops over the row's blocks:
//
//   sums      both sides' sums of exponentials. The exponentials stay in a scratch that fits into
//             the L2 cache.
//   rates     values and rates, made of the exponentials; only for a divergence that is no
//             expectation.
//   gradient  made of what the scratch holds; from the last block to the first, because the last
//             ones are still in the L1 cache.
//
// The sums need a shift, but not the maximum, which would cost a loop of its own. The maximum of
// the first few columns serves as long as no sum comes near overflow. That is checked once per
// block.
//
// A row is cut into chunks. Each chunk starts with sums of its own, and they are added in order. So
// another thread may take a chunk, and the bits stay the same.
#pragma once

#include "digits.h"
#include "rates.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// The maximum of so many columns is the first shift.
constexpr int64_t kPeek = 256;
// The largest sum of a block. It is far from overflow: the rounding error of a score grows with the
// score, and this bound keeps scores at 12 or below.
constexpr double kMostSum = 2 * kBlock;

template <class T>
struct Sums {
  T s, t, hard, cross;
  T weighted_s = 0, weighted_t = 0;  // of exponentials times their scores
  bool within() const {              // false for NaN, too
    constexpr T most = static_cast<T>(kMostSum);
    return s < most && t < most && hard < most;
  }
  // Whether the exponentials of n columns are about 1.
  bool about(int64_t n) const {
    const T least = T(0.7) * static_cast<T>(n), most = T(1.42) * static_cast<T>(n);
    return s > least && t > least && s < most && t < most;
  }
};

// The sums of one block under the given bases.
template <DType K, Expectation E, bool Hard, bool Keep, bool Out>
inline Sums<typename Kind<K>::Acc> block_sums(const typename Kind<K>::Element* x,
                                              const typename Kind<K>::Element* y, int64_t n,
                                              Scale<typename Kind<K>::Acc> of_s,
                                              Scale<typename Kind<K>::Acc> of_t,
                                              Scale<typename Kind<K>::Acc> of_hard,
                                              typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  Two<V> s{}, t{}, hard{}, cross{};
  V weighted_s{}, weighted_t{};  // one of each: registers are few
  const auto half = [&](V xs, V xt, V& d_s, V& d_t, V& d_hard, V& d_cross, T* to) FASTKD_LAMBDA {
    const V ys = of_s(xs), yt = of_t(xt);
    const V es = exp2(ys), et = exp2(yt);
    d_s += es;
    d_t += et;
    if constexpr (Hard) d_hard += exp2(of_hard(xs));
    if constexpr (Out) {
      weighted_s = fma(es, least_score(ys), weighted_s);
      weighted_t = fma(et, least_score(yt), weighted_t);
    }
    V other = et;
    if constexpr (E == Expectation::teacher)
      d_cross = fma(et, zero_unless<V>(et != V{}, yt - ys), d_cross);
    if constexpr (E == Expectation::student) {
      other = zero_unless<V>(es != V{}, ys - yt);
      d_cross = fma(es, other, d_cross);
    }
    if constexpr (Keep) {
      storeu(to, es);
      storeu(to + 2 * lanes, other);
    }
  };
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    prefetch_ahead(x + i, kGroup<T>);
    prefetch_ahead(y + i, kGroup<T>);
    const Two<V> xs = Kind<K>::load(x + i), xt = Kind<K>::load(y + i);
    half(xs.a, xt.a, s.a, t.a, hard.a, cross.a, kept + 2 * i);
    half(xs.b, xt.b, s.b, t.b, hard.b, cross.b, kept + 2 * i + lanes);
  }
  Sums<T> sums{total(s.a + s.b), total(t.a + t.b), total(hard.a + hard.b),
               total(cross.a + cross.b)};
  if constexpr (Out) {
    sums.weighted_s = total(weighted_s);
    sums.weighted_t = total(weighted_t);
  }
  return sums;
}

// The base of a side once these columns are included.
template <DType K>
inline double lowered(const Side& side, const typename Kind<K>::Element* x, int64_t n,
                      bool& out_of_range) {
  const double top = static_cast<double>(max_of<K>(x, n));
  if (top == -kInfinity) return side.base;
  if (!(__builtin_fabs(top * side.c) < kMostShift)) out_of_range = true;
  return -top < side.base ? -top : side.base;
}

// Sums n columns, without the padding.
template <DType K>
inline double sum_of_scores(const typename Kind<K>::Element* x, int64_t n,
                            Scale<typename Kind<K>::Acc> score) {
  using T = typename Kind<K>::Acc;
  Two<Vec<T>> sum{};
  int64_t i = 0;
  for (; i + kGroup<T> <= n; i += kGroup<T>) {
    const Two<Vec<T>> group = Kind<K>::load(x + i);
    sum.a += score(group.a);
    sum.b += score(group.b);
  }
  double rest = 0.0;
  for (; i < n; ++i) rest += score.of(static_cast<double>(Kind<K>::widen(x[i])));
  return static_cast<double>(total(sum.a + sum.b)) + rest;
}

template <DType K, Expectation E, bool Hard, bool Keep, bool Out>
__attribute__((noinline)) void fused_sum_loop(const Args& a, int64_t r, double c, int64_t chunk,
                                              const Scratch<typename Kind<K>::Acc>& scratch,
                                              Partial& out) {
  using T = typename Kind<K>::Acc;
  using Element = typename Kind<K>::Element;
  alignas(64) Element buffer_s[kBlock], buffer_t[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Reader<K> teacher{a.teacher.row(r), a.teacher.dtype, buffer_t};
  Partial partial{{rounded<T>(c)}, {rounded<T>(c)}, {rounded<T>(kLog2E)}};
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at), m = padded<T>(n);
    const Element* x = student(at, n);
    const Element* y = teacher(at, n);
    const auto shift = [&](int64_t columns) {
      const double s = lowered<K>(partial.s, x, columns, partial.out_of_range);
      const double t = lowered<K>(partial.t, y, columns, partial.out_of_range);
      const double hard =
          Hard ? lowered<K>(partial.hard, x, columns, partial.out_of_range) : kInfinity;
      const bool moved = s < partial.s.base || t < partial.t.base || hard < partial.hard.base;
      if (moved) partial.rebase<E>(s, t, hard);
      return moved;
    };
    if (partial.s.empty() || partial.t.empty()) shift(least(m, kPeek));
    if (m > kPeek && (partial.s.base == kInfinity || partial.t.base == kInfinity)) shift(m);
    if (partial.out_of_range) break;
    const auto sums_now = [&] {
      return block_sums<K, E, Hard, Keep, Out>(x, y, m, partial.s.scale<T>(), partial.t.scale<T>(),
                                               partial.hard.scale<T>(),
                                               Keep ? scratch.kept + 2 * at : nullptr);
    };
    Sums<T> sums = sums_now();
    if (!sums.within() && shift(m)) sums = sums_now();
    Block block{partial.s.base, partial.t.base, static_cast<double>(sums.s)};
    double cross = static_cast<double>(sums.cross);
    T* const kept = Keep ? scratch.kept + 2 * at : nullptr;
    if constexpr (E == Expectation::student)
      cross = lifted<K, Keep>(x, y, m, partial, kept, cross, block);
    if constexpr (E == Expectation::none && Keep) {
      const Scale<T> of_s = partial.s.scale<T>(), of_t = partial.t.scale<T>();
      if (sums.about(n)) {
        block.less_one = keep_less_one<K>(x, y, m, of_s, of_t, kept);
        if (!block.less_one) sums_now();
      }
    }
    if (Keep) scratch.blocks[at / kBlock] = block;
    partial.s.sum += static_cast<double>(sums.s);
    partial.t.sum += static_cast<double>(sums.t);
    partial.hard.sum += static_cast<double>(sums.hard);
    partial.cross += cross;
    if constexpr (Out) {
      partial.s.weighted += static_cast<double>(sums.weighted_s);
      partial.t.weighted += static_cast<double>(sums.weighted_t);
    }
    if (Hard && a.smoothing != 0.0) {
      partial.scores += sum_of_scores<K>(x, n, partial.hard.scale<T>());
      partial.columns += static_cast<double>(n);
    }
  }
  out = partial;
}

// ---- the gradient

// The gradient of the soft term is made of the two numbers that the scratch keeps per column:
//   (first - other * ratio) * by   under the teacher's expectation: exponentials of both sides
//   first * ((other + add) * by)   else: an exponential, and a score difference or a rate
enum class Shape { difference, product };

template <class T>
struct Soft {
  T by;
  T add;     // what is added, or the negated ratio
  T digits;  // what rounding took off the ratio, so that equal sides cancel to the last digit

  template <Shape S>
  FASTKD_INLINE Vec<T> at(const T* kept) const {
    const Vec<T> first = loadu<Vec<T>>(kept), other = loadu<Vec<T>>(kept + 2 * Simd<T>::lanes);
    if constexpr (S == Shape::difference)
      return fma(splat(digits), other, fma(splat(add), other, first)) * splat(by);
    // in this order: the product of a factor and a score difference may overflow a float
    return (first * splat(by)) * (other + splat(add));
  }
};

template <class T, Expectation E>
inline Soft<T> soft_of(const Scratch<T>& scratch, int64_t at, const Partial& row, double k) {
  const ToProbability to(scratch, at, row);
  if (E == Expectation::none) return {static_cast<T>(k * to.q), static_cast<T>(-row.slope), T(0)};
  if (E == Expectation::teacher) {
    double q = to.q, ratio = to.p / q;
    if (!(ratio < 0x1p80) || (q < 0x1p-100 && ratio > 1.0)) {
      // The student has next to nothing in the block: the ratio would overflow, or q round to 0.
      // Both sides are brought to the teacher's unit instead.
      const Vec<T> less = splat(static_cast<T>(to.p == 0.0 ? 0.0 : to.q / to.p));
      T* kept = scratch.kept + 2 * at;
      for (int64_t i = 0; i < 2 * kBlock; i += 2 * kGroup<T>) {
        storeu(kept + i, loadu<Vec<T>>(kept + i) * less);
        storeu(kept + i + Simd<T>::lanes, loadu<Vec<T>>(kept + i + Simd<T>::lanes) * less);
      }
      q = to.p, ratio = 1.0;
    }
    const T add = static_cast<T>(-ratio);
    return {static_cast<T>(k * q), add, static_cast<T>(-ratio - static_cast<double>(add))};
  }
  if (to.q == 0.0) {
    // No column of the block has weight. Under an early base one may have had, and with it an
    // infinite score difference.
    __builtin_memset(scratch.kept + 2 * at, 0, uint64_t{2 * kBlock * sizeof(T)});
    return {T(0), T(0), T(0)};
  }
  // q (log q - log p - value of the row). A score difference is the difference of logarithms, up to
  // the bases of the block.
  const auto moved = [](const Side& side, double base) {
    return base == kInfinity ? 0.0 : (side.shift() - base) * side.c;
  };
  const Block& block = scratch.blocks[at / kBlock];
  const double shift = (moved(row.s, block.s_base) - moved(row.t, block.t_base)) + block.lift -
                       (__builtin_log2(row.s.sum) - __builtin_log2(row.t.sum));
  return {static_cast<T>(k * to.q * kLn2), static_cast<T>(shift - row.slope / kLn2), T(0)};
}

template <DType K, Expectation E, bool Hard, bool Stream>
__attribute__((noinline)) void fused_grad_loop(const Args& a, int64_t r, int64_t chunk,
                                               const Scratch<typename Kind<K>::Acc>& scratch,
                                               const Partial& row, const Factors& f) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  using Element = typename Kind<K>::Element;
  constexpr int64_t lanes = Simd<T>::lanes;
  constexpr Shape shape = E == Expectation::teacher ? Shape::difference : Shape::product;
  alignas(64) Element buffer_s[Hard ? kBlock : 1], buffer_g[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Writer<K> write{a.grad.row(r), a.grad.dtype, buffer_g};
  const Scale<T> of_hard = row.hard.scale<T>();
  const V h = splat(static_cast<T>(f.h / row.hard.sum)),
          uniform = splat(static_cast<T>(-f.uniform));
  const int64_t begin = chunk * kChunk, end = least(a.vocab, begin + kChunk);
  for (int64_t at = begin + (end - 1 - begin) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = least(kBlock, end - at);
    const Element* x = Hard ? student(at, n) : nullptr;
    Element* g = write(at, n);
    const Soft<T> soft = soft_of<T, E>(scratch, at, row, f.k);
    const auto group = [&](int64_t i) FASTKD_LAMBDA {
      const T* kept = scratch.kept + 2 * (at + i);
      // the next block, at the same place
      prefetch_bytes(reinterpret_cast<uintptr_t>(kept) - 2 * kBlock * sizeof(T),
                     2 * kGroup<T> * int64_t{sizeof(T)});
      Two<V> out{soft.template at<shape>(kept), soft.template at<shape>(kept + lanes)};
      if constexpr (Hard) {
        const Two<V> logits = Kind<K>::load(x + i);
        out.a += fma(h, exp2(of_hard(logits.a)), uniform);
        out.b += fma(h, exp2(of_hard(logits.b)), uniform);
      }
      return out;
    };
    // the label's group is computed first: the gradient may overwrite its logits
    const bool here = Hard && f.column >= at && f.column < at + n;
    const int64_t label = here ? (f.column - at) / kGroup<T> * kGroup<T> : 0;
    Two<V> marked{};
    if (here) {
      T columns[kGroup<T>];
      marked = group(label);
      __builtin_memcpy(columns, &marked, sizeof marked);
      columns[column_in_group<K>(f.column - at - label)] -= static_cast<T>(f.label);
      __builtin_memcpy(&marked, columns, sizeof marked);
    }
    if (Stream && g != buffer_g) {
      for (int64_t i = 0; i < n; i += kGroup<T>) Kind<K>::past_caches(g + i, group(i));
    } else {
      for (int64_t i = 0; i < n; i += kGroup<T>) Kind<K>::store(g + i, group(i));
    }
    if (here) Kind<K>::store(g + label, marked);
    write.done(g, at, n);
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
