// The fused trip over one row: what is read of it is read once, and its exponentials are computed
// once.
//
// The first sweep takes the sums of both sides under a shift that need not be the maximum: the
// maximum of the first few columns will do as long as no sum comes near overflow, which is looked
// at once a block. (A row's true maximum would cost a pass.) The exponentials stay in a scratch that the L2 cache holds, and the last sweep makes the
// gradient of them; between the two, a divergence that is no expectation makes rates of them.
//
// A row is cut into chunks whose sums start afresh and are merged in order, so that a chunk may be
// another thread's and the bits stay the same.
#pragma once

#include "pass_general.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr int64_t kPeek = 256;                      // columns whose maximum is the first shift
// Of a block. Not near overflow: a score's rounding grows with it, and this one is at most 12.
constexpr double kMostSum = 2 * kBlock;
constexpr double kMostShift = 0x1p100;              // of a score: beyond, sums of them overflow
static_assert(kChunk % kBlock == 0, "a block lies in one chunk");

// A score is (x + base) * c: exact near the maximum however large the logits are, and exactly 0 at
// the logit that the base was taken from.
template <class T>
struct Scale {
  T c;
  T base;

  FASTKD_INLINE Vec<T> operator()(Vec<T> x) const { return (x + splat(base)) * splat(c); }
  double of(double x) const {
    return (x + static_cast<double>(base)) * static_cast<double>(c);
  }
};

// One side so far: the sum of exp2 of the scores. No base is set where all is -inf.
struct Side {
  double c = 0.0;
  double base = kInfinity;
  double sum = 0.0;

  template <class T>
  Scale<T> scale() const {
    return {static_cast<T>(c), static_cast<T>(shift())};
  }
  double shift() const { return base == kInfinity ? 0.0 : base; }
  bool empty() const { return sum == 0.0; }
};

// What a chunk, and in the end the row, adds up to. cross: of an expectation, the sum of
// e_t (y_t - y_s) or of e_s (y_s - y_t) over scores y. hard: the student at T = 1.
struct Part {
  Side s, t, hard;
  double cross = 0.0;
  double value = 0.0;
  double slope = 0.0;
  double scores = 0.0;  // sum at T = 1, for label smoothing, of so many columns:
  double columns = 0.0;
  bool strange = false;  // out of the bounds above

  // Moves the sums under lower bases.
  template <Expectation E>
  void rebase(double s_base, double t_base, double hard_base) {
    const double drop_s = move(s, s_base), drop_t = move(t, t_base);
    constexpr bool of_t = E == Expectation::teacher;
    const double shrink = exp2(-(of_t ? drop_t : drop_s));
    // the weights' own sum has shrunk already
    if (E != Expectation::none && (drop_s != 0.0 || drop_t != 0.0))
      cross = shrink > 0.0 ? shrink * cross + (of_t ? t.sum * (drop_s - drop_t)
                                                    : s.sum * (drop_t - drop_s))
                           : 0.0;
    scores -= columns * move(hard, hard_base);
  }

  template <Expectation E>
  void add(Part other) {
    const auto low = [](double a, double b) { return a < b ? a : b; };
    const double s_base = low(s.base, other.s.base), t_base = low(t.base, other.t.base);
    const double hard_base = low(hard.base, other.hard.base);
    rebase<E>(s_base, t_base, hard_base);
    other.rebase<E>(s_base, t_base, hard_base);
    s.sum += other.s.sum;
    t.sum += other.t.sum;
    hard.sum += other.hard.sum;
    cross += other.cross;
    scores += other.scores;
    columns += other.columns;
    strange |= other.strange;
  }

 private:
  static double move(Side& side, double to) {
    const double drop =
        side.base == kInfinity || !(to < side.base) ? 0.0 : (side.base - to) * side.c;
    if (to < side.base) side.base = to;
    if (drop != 0.0) side.sum *= exp2(-drop);
    return drop;
  }
};

// A block as the first sweep left it: under which bases, and with what sum of the student's.
struct Block {
  double s_base, t_base, s_sum;
};

// The scratch of one row. kept: for each group, two vectors of the student's exponentials, then two
// of the teacher's, or of the differences of scores, or later of the rates.
template <class T>
struct Scratch {
  T* kept = nullptr;
  Block* blocks = nullptr;
  Part* parts = nullptr;

  explicit Scratch(int64_t vocab) {
    if (vocab > kMostColumns) return;
    char* memory = scratch(bytes(vocab, true));
    if (memory != nullptr) *this = Scratch(memory, vocab, true);
  }
  Scratch(char* memory, int64_t vocab, bool exponentials) {
    const int64_t floats = exponentials ? bytes_kept(vocab) : 0;
    kept = reinterpret_cast<T*>(memory);
    blocks = reinterpret_cast<Block*>(memory + floats);
    parts = reinterpret_cast<Part*>(memory + floats + bytes_blocks(vocab));
  }

  static int64_t bytes(int64_t vocab, bool exponentials) {
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    return (exponentials ? bytes_kept(vocab) : 0) + bytes_blocks(vocab) +
           chunks * int64_t{sizeof(Part)};
  }

 private:
  static int64_t count(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }
  static int64_t bytes_kept(int64_t vocab) {
    return 2 * count(vocab) * kBlock * int64_t{sizeof(T)};
  }
  static int64_t bytes_blocks(int64_t vocab) { return count(vocab) * int64_t{sizeof(Block)}; }
};

// As the loops will have it, so that what is worked out in double agrees with them.
template <class T>
double rounded(double x) {
  return static_cast<double>(static_cast<T>(x));
}

template <class T>
struct Sums {
  T s, t, hard, cross;
  bool within() const {  // false for NaN too
    constexpr T most = static_cast<T>(kMostSum);
    return s < most && t < most && hard < most;
  }
};

// The sums of one block under given bases.
template <DType K, Expectation E, bool Hard, bool Keep>
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
  const auto half = [&](V xs, V xt, V& sum_s, V& sum_t, V& sum_hard, V& sum_cross, T* to) FASTKD_LAMBDA {
    const V ys = of_s(xs), yt = of_t(xt);
    const V es = exp2(ys), et = exp2(yt);
    sum_s += es;
    sum_t += et;
    if constexpr (Hard) sum_hard += exp2(of_hard(xs));
    V other = et;
    if constexpr (E == Expectation::teacher)
      sum_cross = fma(et, zero_unless<V>(et != V{}, yt - ys), sum_cross);
    if constexpr (E == Expectation::student) {
      other = zero_unless<V>(es != V{}, ys - yt);
      sum_cross = fma(es, other, sum_cross);
    }
    if constexpr (Keep) {
      storeu(to, es);
      storeu(to + 2 * lanes, other);
    }
  };
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    ahead(x + i, kGroup<T>);
    ahead(y + i, kGroup<T>);
    const Two<V> xs = Kind<K>::load(x + i), xt = Kind<K>::load(y + i);
    half(xs.a, xt.a, s.a, t.a, hard.a, cross.a, kept + 2 * i);
    half(xs.b, xt.b, s.b, t.b, hard.b, cross.b, kept + 2 * i + lanes);
  }
  return {total(s.a + s.b), total(t.a + t.b), total(hard.a + hard.b), total(cross.a + cross.b)};
}

// The base of a side where these columns are counted in too.
template <DType K>
inline double lowered(const Side& side, const typename Kind<K>::Element* x, int64_t n,
                      bool& strange) {
  const double top = static_cast<double>(max_of<K>(x, n));
  if (top == -kInfinity) return side.base;
  if (!(__builtin_fabs(top * side.c) < kMostShift)) strange = true;
  return -top < side.base ? -top : side.base;
}

// Of n columns, not of the padding.
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

template <DType K, Expectation E, bool Hard, bool Keep>
__attribute__((noinline)) void first_sweep(const Args& a, int64_t r, double c, int64_t chunk,
                                           const Scratch<typename Kind<K>::Acc>& scratch,
                                           Part& out) {
  using T = typename Kind<K>::Acc;
  using Element = typename Kind<K>::Element;
  alignas(64) Element buffer_s[kBlock], buffer_t[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Reader<K> teacher{a.teacher.row(r), a.teacher.dtype, buffer_t};
  Part part{{rounded<T>(c)}, {rounded<T>(c)}, {rounded<T>(kLog2E)}};
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at), m = padded<T>(n);
    const Element* x = student(at, n);
    const Element* y = teacher(at, n);
    const auto shift = [&](int64_t columns) {
      const double s = lowered<K>(part.s, x, columns, part.strange);
      const double t = lowered<K>(part.t, y, columns, part.strange);
      const double hard = Hard ? lowered<K>(part.hard, x, columns, part.strange) : kInfinity;
      const bool moved = s < part.s.base || t < part.t.base || hard < part.hard.base;
      if (moved) part.rebase<E>(s, t, hard);
      return moved;
    };
    if (part.s.empty() || part.t.empty()) shift(least(m, kPeek));
    if (m > kPeek && (part.s.base == kInfinity || part.t.base == kInfinity)) shift(m);
    if (part.strange) break;
    const auto sums_now = [&] {
      return block_sums<K, E, Hard, Keep>(x, y, m, part.s.scale<T>(), part.t.scale<T>(),
                                          part.hard.scale<T>(),
                                          Keep ? scratch.kept + 2 * at : nullptr);
    };
    Sums<T> sums = sums_now();
    if (!sums.within() && shift(m)) sums = sums_now();
    if (Keep)
      scratch.blocks[at / kBlock] = {part.s.base, part.t.base, static_cast<double>(sums.s)};
    part.s.sum += static_cast<double>(sums.s);
    part.t.sum += static_cast<double>(sums.t);
    part.hard.sum += static_cast<double>(sums.hard);
    part.cross += static_cast<double>(sums.cross);
    if (Hard && a.smoothing != 0.0) {
      part.scores += sum_of_scores<K>(x, n, part.hard.scale<T>());
      part.columns += static_cast<double>(n);
    }
  }
  out = part;
}

// A block's exponentials times these are probabilities of the row.
struct ToProbability {
  double q, p;

  template <class T>
  ToProbability(const Scratch<T>& scratch, int64_t at, const Part& row)
      : q(factor(row.s, scratch.blocks[at / kBlock].s_base)),
        p(factor(row.t, scratch.blocks[at / kBlock].t_base)) {}

  static double factor(const Side& row, double base) {
    return base == kInfinity ? 0.0 : exp2((row.shift() - base) * row.c) / row.sum;  // inf: all were 0
  }
};

// ---- between the two: values and rates from the exponentials -------------------------------------

// What a row's rates are taken relative to, and its own distance from the centred one's zero.
template <class T>
struct Top {
  Origin<T> origin;
  T rate = 0;
};

// The rate at the student's most probable column, as an origin that makes it 0. Where one column
// has most of the mass, its block has; where none has, it does not matter which is taken.
template <class T, class D>
__attribute__((noinline)) Top<T> top_rate(const Args& a, const Scratch<T>& scratch, const Part& row) {
  using V = Vec<T>;
  int64_t heaviest = 0;
  double most = -1.0;
  for (int64_t at = 0; at < a.vocab; at += kBlock) {
    const double mass = scratch.blocks[at / kBlock].s_sum * ToProbability(scratch, at, row).q;
    if (mass > most) most = mass, heaviest = at;
  }
  const T* kept = scratch.kept + 2 * heaviest;
  T top = -1, other = 0;
  for (int64_t i = 0; i < padded<T>(least(kBlock, a.vocab - heaviest)); i += kGroup<T>) {
    for (int64_t j = 2 * i; j < 2 * i + kGroup<T>; ++j)
      if (kept[j] > top) top = kept[j], other = kept[j + kGroup<T>];
  }
  const ToProbability to(scratch, heaviest, row);
  const V q = splat(top) * splat(static_cast<T>(to.q));
  const V p = splat(other) * splat(static_cast<T>(to.p));
  const Rated<V> point = D::at(p, q, static_cast<T>(a.param));
  T own[Simd<T>::lanes], centred_one[Simd<T>::lanes], where[Simd<T>::lanes];
  const Origin<T> centre = centred<D>(static_cast<T>(a.param));
  storeu(own, point.rate);
  storeu(centred_one, centre(point));
  storeu(where, point.apart ? V{} + T(1) : V{});
  const T rate = centred_one[0];
  return {{-rate, where[0] != T(0) ? -own[0] : centre.apart - rate}, rate};
}

// Adds to out.value the values, and to out.slope q times the rates from `origin`, which it keeps.
template <class T, class D>
__attribute__((noinline)) void rate_sweep(const Args& a, int64_t chunk, const Scratch<T>& scratch,
                                          const Part& row, Origin<T> origin, Part& out) {
  if constexpr (std::is_same<D, JS>::value) {  // a loop of either kind, with its own registers
    return JS::is_even(static_cast<T>(a.param))
               ? rate_sweep<T, EvenJS>(a, chunk, scratch, row, origin, out)
               : rate_sweep<T, UnevenJS>(a, chunk, scratch, row, origin, out);
  }
  using V = Vec<T>;
  constexpr int64_t lanes = Simd<T>::lanes;
  const T param = static_cast<T>(a.param);
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = padded<T>(least(kBlock, end - at));
    const ToProbability to(scratch, at, row);
    const V to_q = splat(static_cast<T>(to.q)), to_p = splat(static_cast<T>(to.p));
    Two<V> values{}, slopes{};
    const auto half = [&](T* kept, V& value, V& slope) FASTKD_LAMBDA {
      const V q = loadu<V>(kept) * to_q, p = loadu<V>(kept + 2 * lanes) * to_p;
      const Rated<V> point = D::at(p, q, param);
      const V rate = origin(point);
      value += point.value;
      slope = fma(q, rate, slope);
      storeu(kept + 2 * lanes, rate);
    };
    for (int64_t i = 0; i < n; i += kGroup<T>) {
      ahead(scratch.kept + 2 * (at + i), 2 * kGroup<T>);
      half(scratch.kept + 2 * (at + i), values.a, slopes.a);
      half(scratch.kept + 2 * (at + i) + lanes, values.b, slopes.b);
    }
    out.value += static_cast<double>(total(values.a + values.b));
    out.slope += static_cast<double>(total(slopes.a + slopes.b));
  }
}

// ---- last sweep: the gradient -------------------------------------------------------------------

// The gradient of the soft term from what is kept, in one of two shapes:
//   (first - other * ratio) * by   both sides' exponentials, under the teacher's expectation
//   first * ((other + add) * by)   exponentials and differences of scores, or rates
enum class Shape { difference, product };

template <class T>
struct Soft {
  T by;
  T add;    // the ratio, negated, or what is added
  T digits;  // of the ratio beyond those of `add`: what two sides share cancels to the last digit

  template <Shape S>
  FASTKD_INLINE Vec<T> at(const T* kept) const {
    const Vec<T> first = loadu<Vec<T>>(kept), other = loadu<Vec<T>>(kept + 2 * Simd<T>::lanes);
    if constexpr (S == Shape::difference)
      return fma(splat(digits), other, fma(splat(add), other, first)) * splat(by);
    // in this order: a factor and a difference of scores may be more than a float holds together
    return (first * splat(by)) * (other + splat(add));
  }
};

template <class T, Expectation E>
inline Soft<T> soft_of(const Scratch<T>& scratch, int64_t at, const Part& row, double k) {
  const ToProbability to(scratch, at, row);
  if (E == Expectation::none) return {static_cast<T>(k * to.q), static_cast<T>(-row.slope), T(0)};
  if (E == Expectation::teacher) {
    double q = to.q, ratio = to.p / q;
    if (!(ratio < 0x1p80) || (q < 0x1p-100 && ratio > 1.0)) {
      // the student has next to nothing in the block, in units of which the teacher's would overflow,
      // or which itself would be 0
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
    // no column of the block has weight, though one may have had under an early base, and an
    // infinite difference with it
    __builtin_memset(scratch.kept + 2 * at, 0, uint64_t{2 * kBlock * sizeof(T)});
    return {T(0), T(0), T(0)};
  }
  // q (log q - log p - the row's value); a difference of scores is that of logarithms up to the
  // bases under which the block was summed
  const auto moved = [](const Side& side, double base) {
    return base == kInfinity ? 0.0 : (side.shift() - base) * side.c;
  };
  const Block& block = scratch.blocks[at / kBlock];
  const double shift = (moved(row.s, block.s_base) - moved(row.t, block.t_base)) -
                       (__builtin_log2(row.s.sum) - __builtin_log2(row.t.sum));
  return {static_cast<T>(k * to.q * kLn2), static_cast<T>(shift - row.slope / kLn2), T(0)};
}

template <DType K, Expectation E, bool Hard, bool Stream>
__attribute__((noinline)) void last_sweep(const Args& a, int64_t r, int64_t chunk,
                                          const Scratch<typename Kind<K>::Acc>& scratch,
                                          const Part& row, const Factors& f) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  using Element = typename Kind<K>::Element;
  constexpr int64_t lanes = Simd<T>::lanes;
  constexpr Shape shape = E == Expectation::teacher ? Shape::difference : Shape::product;
  alignas(64) Element buffer_s[Hard ? kBlock : 1], buffer_g[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Writer<K> write{a.grad.row(r), a.grad.dtype, buffer_g};
  const Scale<T> of_hard = row.hard.scale<T>();
  const V h = splat(static_cast<T>(f.h / row.hard.sum)), even = splat(static_cast<T>(-f.even));
  const int64_t begin = chunk * kChunk, end = least(a.vocab, begin + kChunk);
  for (int64_t at = begin + (end - 1 - begin) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = least(kBlock, end - at);
    const Element* x = Hard ? student(at, n) : nullptr;
    Element* g = write(at, n);
    const Soft<T> soft = soft_of<T, E>(scratch, at, row, f.k);
    const auto group = [&](int64_t i) FASTKD_LAMBDA {
      const T* kept = scratch.kept + 2 * (at + i);
      // the same place of the next block
      ask_for(reinterpret_cast<uintptr_t>(kept) - 2 * kBlock * sizeof(T),
              2 * kGroup<T> * int64_t{sizeof(T)});
      Two<V> out{soft.template at<shape>(kept), soft.template at<shape>(kept + lanes)};
      if constexpr (Hard) {
        const Two<V> logits = Kind<K>::load(x + i);
        out.a += fma(h, exp2(of_hard(logits.a)), even);
        out.b += fma(h, exp2(of_hard(logits.b)), even);
      }
      return out;
    };
    // the label's group, taken out before the gradient may overwrite its logits
    const bool here = Hard && f.column >= at && f.column < at + n;
    const int64_t label = here ? (f.column - at) / kGroup<T> * kGroup<T> : 0;
    Two<V> marked{};
    if (here) {
      T columns[kGroup<T>];
      marked = group(label);
      __builtin_memcpy(columns, &marked, sizeof marked);
      columns[place<K>(f.column - at - label)] -= static_cast<T>(f.label);
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
