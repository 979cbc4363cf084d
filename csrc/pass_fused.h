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

#include "row_state.h"

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

// The score differences of a block anew; returns the sum of e_s times these.
template <DType K, bool Keep>
__attribute__((noinline)) double lifted_cross(const typename Kind<K>::Element* x,
                                              const typename Kind<K>::Element* y, int64_t n,
                                              Scale<typename Kind<K>::Acc> of_s,
                                              Scale<typename Kind<K>::Acc> of_t,
                                              typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  V cross{};
  const auto half = [&](V xs, V xt, T* to) FASTKD_LAMBDA {
    const V ys = of_s(xs), es = exp2(ys);
    const V other = zero_unless<V>(es != V{}, ys - of_t(xt));
    cross = fma(es, other, cross);
    if constexpr (Keep) storeu(to + 2 * lanes, other);
  };
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    const Two<V> xs = Kind<K>::load(x + i), xt = Kind<K>::load(y + i);
    half(xs.a, xt.a, kept + 2 * i);
    half(xs.b, xt.b, kept + 2 * i + lanes);
  }
  return static_cast<double>(total(cross));
}

// Keeps a block's exponentials less 1, whose digits the 1 would take: at a high temperature that is
// all that tells p from q. False where a score is outside of [-1/2, 1/2] and its exponential not 0.
template <DType K>
__attribute__((noinline)) bool keep_less_one(const typename Kind<K>::Element* x,
                                             const typename Kind<K>::Element* y, int64_t n,
                                             Scale<typename Kind<K>::Acc> of_s,
                                             Scale<typename Kind<K>::Acc> of_t,
                                             typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  const V bound = splat(T(0.5)), nothing = splat(T(sizeof(T) == 4 ? -127 : -1022));
  V most{};
  const auto keep = [&](V score, T* to) FASTKD_LAMBDA {
    const V size = larger(score, -score);
    most = larger(most, score < nothing ? V{} : size);
    storeu(to, size > bound ? V{} - T(1) : exp2m1(score));
  };
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    const Two<V> xs = Kind<K>::load(x + i), xt = Kind<K>::load(y + i);
    keep(of_s(xs.a), kept + 2 * i);
    keep(of_s(xs.b), kept + 2 * i + lanes);
    keep(of_t(xt.a), kept + 2 * i + 2 * lanes);
    keep(of_t(xt.b), kept + 2 * i + 3 * lanes);
  }
  return largest(most) <= T(0.5);
}

// Where a block's sides are far apart (a teacher that is sure of another column), the student's
// scores lose their digits in the differences. So the block's mean difference is taken off the
// teacher's base first. Returns the sum of e_s (y_s - y_t), which is `cross`.
constexpr double kFar = 16.0;
template <DType K, bool Keep>
inline double lifted(const typename Kind<K>::Element* x, const typename Kind<K>::Element* y,
                     int64_t n, const Partial& at, typename Kind<K>::Acc* kept, double cross,
                     Block& block) {
  using T = typename Kind<K>::Acc;
  const double mean = cross / block.s_sum;
  if (!(__builtin_fabs(mean) > kFar && __builtin_fabs(mean) < kMostShift)) return cross;
  const Scale<T> of_s = at.s.scale<T>();
  Scale<T> of_t = at.t.scale<T>();
  const double before = static_cast<double>(of_t.base);
  of_t.base = static_cast<T>(before + mean / at.t.c);
  block.lift = (static_cast<double>(of_t.base) - before) * at.t.c;
  return lifted_cross<K, Keep>(x, y, n, of_s, of_t, kept) + block.lift * block.s_sum;
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

// ---- values and rates, made of the exponentials

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
  T top = -2, other = 0;
  for (int64_t i = 0; i < padded<T>(least(kBlock, a.vocab - heaviest)); i += kGroup<T>) {
    for (int64_t j = 2 * i; j < 2 * i + kGroup<T>; ++j)
      if (kept[j] > top) top = kept[j], other = kept[j + kGroup<T>];
  }
  const Rated<V> point =
      less_one ? Sided<T, true>(to).template at<D>(splat(top), splat(other), param)
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
