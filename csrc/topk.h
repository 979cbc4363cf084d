// The trip over one row against a teacher that gives K of its columns and, if `tail`, one more
// outcome: the columns that are not named (see TopKRows in fastkd/backends/base.py).
//
// The student's row is read once, as in pass_fused.h, and its exponentials are kept. Those of the named
// columns are taken out of them and the blocks they stood in summed again, so that the tail's mass
// is never a difference of sums. The K + 1 points are worked out in double, by a function of the
// divergence that is compiled once. Every other column's gradient is its probability times one
// factor of the row; the named columns are written last.
#pragma once

#include "passes.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr int64_t kMostKept = 2 * kMostColumns;
// Of a tail's mass: below, exponentials under the whole row's maximum have lost theirs to underflow.
constexpr double kLeastTail = 0x1p-80;

// ---- the points, in double and by natural logarithms

// x = 2^x for x <= 1, to two units in the last place; 0 below the normal numbers. In arithmetic that
// the compiler makes vectors of: 64 columns of a row one by one would take as long as 3 000 others.
inline void exp2_all(double* x, int64_t n) {
  constexpr double kRound = 0x1.8p52;  // added and taken away: the nearest integer
  for (int64_t i = 0; i < n; ++i) {
    const double y = x[i] < -1022.0 ? -1022.0 : x[i];
    const double shifted = y + kRound;
    const double t = (y - (shifted - kRound)) * kLn2;
    double sum = 1.0 / 479001600.0;  // 1 / 12!
    sum = sum * t + 1.0 / 39916800.0;
    sum = sum * t + 1.0 / 3628800.0;
    sum = sum * t + 1.0 / 362880.0;
    sum = sum * t + 1.0 / 40320.0;
    sum = sum * t + 1.0 / 5040.0;
    sum = sum * t + 1.0 / 720.0;
    sum = sum * t + 1.0 / 120.0;
    sum = sum * t + 1.0 / 24.0;
    sum = sum * t + 1.0 / 6.0;
    sum = sum * t + 0.5;
    sum = sum * t + 1.0;
    sum = sum * t + 1.0;
    const double power = bits<double>((bits<uint64_t>(shifted) + 1023u) << 52);
    x[i] = x[i] < -1022.0 ? 0.0 : sum * power;
  }
}

template <class D>
void points_of(Points& x) {
  const double param = x.param;
  const Origin<double> centre = centred<D>(param);
  double sum = 0.0;
  x.value = 0.0;
  const auto slope_at = [&](double logp, double logq, double p, double q) {
    if (p == 0.0 && q == 0.0) return 0.0;
    const Sloped<double> point = pair_at<D>(Column<double>{logp, logq, p, q}, param, centre);
    x.value += point.value;
    return point.slope;
  };
  for (int64_t i = 0; i < x.k; ++i) {
    double slope = slope_at(x.logp[i], x.logq[i], x.p[i], x.q[i]);
    // the terms of some columns alone: their slopes themselves, not centred ones
    if (x.alone) slope += x.centre * x.q[i];
    x.slope[i] = slope;
    sum += slope;
  }
  x.of_tail = x.alone ? 0.0 : slope_at(x.tail_p, x.tail_q, __builtin_exp(x.tail_p), x.q_tail);
  sum += x.of_tail;
  for (int64_t i = 0; i < x.k; ++i) x.slope[i] -= x.q[i] * sum;
  x.sum = sum;
}

// ---- what a row needs besides

template <class T>
struct Workspace {
  T* kept = nullptr;  // the student's exponentials, group by group
  Block* blocks = nullptr;
  Part* parts = nullptr;
  Points points;
  double* logits = nullptr;  // [K]
  uint8_t* touched = nullptr;
  bool ready = false;

  Workspace(const Args& a) {
    const int64_t columns = (a.vocab + kBlock - 1) / kBlock * kBlock;
    const int64_t floats = a.vocab > kMostKept ? 0 : columns * int64_t{sizeof(T)};
    const int64_t states = columns / kBlock * int64_t{sizeof(Block)};
    const int64_t sums = (a.vocab + kChunk - 1) / kChunk * int64_t{sizeof(Part)};
    const int64_t numbers = a.k * int64_t{sizeof(double)};
    char* memory = scratch(floats + states + sums + 6 * numbers + columns / kBlock);
    if (memory == nullptr) return;
    const auto next = [&](int64_t bytes) {
      char* now = memory;
      memory += bytes;
      return now;
    };
    kept = reinterpret_cast<T*>(next(floats));
    if (floats == 0) kept = nullptr;
    blocks = reinterpret_cast<Block*>(next(states));
    parts = reinterpret_cast<Part*>(next(sums));
    points.logp = reinterpret_cast<double*>(next(numbers));
    points.logq = reinterpret_cast<double*>(next(numbers));
    points.p = reinterpret_cast<double*>(next(numbers));
    points.q = reinterpret_cast<double*>(next(numbers));
    points.slope = reinterpret_cast<double*>(next(numbers));
    logits = reinterpret_cast<double*>(next(numbers));
    touched = reinterpret_cast<uint8_t*>(next(columns / kBlock));
    points.k = a.k;
    points.param = a.param;
    points.centre = a.centre;
    points.alone = a.tail == nullptr && !a.restricted;
    ready = true;
  }
};

inline const int64_t* named(const Args& a, int64_t r) { return a.indices + r * a.k; }

// Reads the teacher's row and the student's logits at its columns.
template <class T>
inline void gather(const Args& a, int64_t r, Workspace<T>& w) {
  const int64_t* at = named(a, r);
  const char* row = a.student.row(r);
  const T* logp = static_cast<const T*>(a.logprobs) + r * a.k;
  const int64_t size = size_of(a.student.dtype);
  for (int64_t i = 0; i < a.k; ++i)
    if (at[i] >= 0) __builtin_prefetch(row + at[i] * size);
  for (int64_t i = 0; i < a.k; ++i) {
    w.points.logp[i] = static_cast<double>(logp[i]);
    w.points.p[i] = w.points.logp[i] * kLog2E;
    w.logits[i] = -kInfinity;
    if (at[i] >= 0) widen_any(row, a.student.dtype, at[i], 1, &w.logits[i]);
  }
  exp2_all(w.points.p, a.k);
  w.points.tail_p = a.tail == nullptr ? -kInfinity
                                      : static_cast<double>(static_cast<const T*>(a.tail)[r]);
}

// Fills in the student's side from exponentials (x + shift) * c whose sum off the named columns is
// tail_sum, or that are all there is.
template <class T>
inline void place_points(const Args& a, Workspace<T>& w, double shift, double c, double tail_sum) {
  Points& x = w.points;
  double total = tail_sum;
  for (int64_t i = 0; i < a.k; ++i) {
    x.logq[i] = (w.logits[i] + shift) * c;
    x.q[i] = x.logq[i];
  }
  exp2_all(x.q, a.k);
  for (int64_t i = 0; i < a.k; ++i) total += x.q[i];
  const double log_total = __builtin_log2(total);
  for (int64_t i = 0; i < a.k; ++i) {
    x.logq[i] = (x.logq[i] - log_total) * kLn2;
    x.q[i] /= total;
  }
  x.total = total;
  x.q_tail = tail_sum / total;
  x.tail_q = tail_sum == 0.0 ? -kInfinity : (__builtin_log2(tail_sum) - log_total) * kLn2;
}

// With the softmax over the named columns alone.
template <class T>
inline void place_restricted(const Args& a, Workspace<T>& w) {
  double top = -kInfinity;
  for (int64_t i = 0; i < a.k; ++i) {
    if (w.logits[i] > top) top = w.logits[i];
    if (w.logits[i] != w.logits[i]) top = kNaN;
  }
  place_points(a, w, top == -kInfinity ? 0.0 : -top, kLog2E / a.temperature, 0.0);
}

// 1 if the teacher gives any mass to this row, 0 if none, NaN if it holds a NaN: one may stand in
// padding, where a bad index was, and beside q = 0 the student's expectation would not see it.
inline double mass(const Points& x) {
  double some = x.alone || x.tail_p != -kInfinity ? 1.0 : 0.0;
  if (x.tail_p != x.tail_p) some = kNaN;
  for (int64_t i = 0; i < x.k; ++i) {
    if (x.logp[i] != x.logp[i]) return kNaN;
    if (x.logp[i] != -kInfinity && some == 0.0) some = 1.0;
  }
  return some;
}

// The hard term's loss: of the student at T = 1, the logarithm of the sum of exponentials of
// (x + shift), and their scores' sum for label smoothing; in bits.
inline double hard_loss(const Args& a, double log_sum, double label, double scores) {
  double loss = a.hard * kLn2 * (1.0 - a.smoothing) * (log_sum - label);
  if (a.smoothing != 0.0)
    loss += a.hard * kLn2 * a.smoothing * (log_sum - scores / static_cast<double>(a.classes));
  return loss;
}

// Writes the named columns, of which the sweep has no right idea.
template <class T>
inline void write_named(const Args& a, int64_t r, const Workspace<T>& w, const Factors& f,
                        double hard_shift, double hard_sum) {
  const int64_t* at = named(a, r);
  char* row = a.grad.row(r);
  for (int64_t i = 0; i < a.k; ++i) {
    if (at[i] < 0) continue;
    double g = f.k * w.points.slope[i];
    if (a.hard != 0.0) {
      g += f.h * (exp2((w.logits[i] + hard_shift) * kLog2E) / hard_sum) - f.even;
      if (at[i] == f.column) g -= f.label;
    }
    narrow_any(&g, row, a.grad.dtype, at[i], 1);
  }
}

// ---- one column after the other, in double: what the trip below does not fit

template <class T>
__attribute__((noinline)) double sparse_by_columns(const Args& a, int64_t r, Workspace<T>& w) {
  const double c = kLog2E / a.temperature;
  const char* row = a.student.row(r);
  const int64_t* at = named(a, r);
  double block[kBlock];
  bool off[kBlock];
  // f(column, logit, named) for each column
  const auto each = [&](auto f) {
    for (int64_t from = 0; from < a.vocab; from += kBlock) {
      const int64_t n = least(kBlock, a.vocab - from);
      widen_any(row, a.student.dtype, from, n, block);
      for (int64_t i = 0; i < n; ++i) off[i] = true;
      for (int64_t i = 0; i < a.k; ++i)
        if (at[i] >= from && at[i] < from + n) off[at[i] - from] = false;
      for (int64_t i = 0; i < n; ++i) f(from + i, block[i], !off[i]);
    }
  };
  double top = -kInfinity, top_off = -kInfinity, strange = 0.0;
  each([&](int64_t, double x, bool is_named) {
    if (x > top) top = x;
    if (!is_named && x > top_off) top_off = x;
    strange += x == -kInfinity ? 0.0 : x - x;  // NaN for NaN and +inf
  });
  const double shift = top == -kInfinity ? 0.0 : -top;
  const double shift_off = top_off == -kInfinity ? shift : -top_off;
  double tail_sum = 0.0, hard_sum = 0.0, scores = 0.0;
  each([&](int64_t, double x, bool is_named) {
    if (!is_named) tail_sum += exp2((x + shift_off) * c);
    if (a.hard != 0.0) {
      hard_sum += exp2((x + shift) * kLog2E);
      scores += (x + shift) * kLog2E;
    }
  });
  // the tail's share of the row may be no number of its own, so its logarithm comes by itself
  const double apart = (shift_off - shift) * c;  // >= 0, in bits
  if (a.restricted) {
    place_restricted(a, w);
  } else {
    place_points(a, w, shift, c, tail_sum * exp2(-apart));
    if (tail_sum > 0.0)
      w.points.tail_q =
          ((__builtin_log2(tail_sum) - apart) - __builtin_log2(w.points.total)) * kLn2;
  }
  double result;
  if (degenerate(a, strange != strange ? kNaN : w.points.total, mass(w.points), result)) {
    finish(a, r, result);
    return result;
  }
  a.points(w.points);
  double loss = a.soft * w.points.value;
  if (a.hard != 0.0)
    loss += hard_loss(a, __builtin_log2(hard_sum), (label_logit(a, r) + shift) * kLog2E, scores);
  if (a.grad.data == nullptr) return loss;
  const double scale = scale_of<T>(a, r);
  if (scale != scale || loss != loss) {
    finish(a, r, kNaN);
    return loss;
  }
  const Factors f(a, r, scale);
  const double of_q = a.restricted ? 0.0 : -w.points.sum / w.points.total;
  const double of_tail = a.restricted || tail_sum == 0.0 ? 0.0 : w.points.of_tail / tail_sum;
  char* to = a.grad.row(r);
  each([&](int64_t column, double x, bool is_named) {
    if (is_named) return;  // its logit, in place, is needed no more
    double g = f.k * (of_q * exp2((x + shift) * c) + of_tail * exp2((x + shift_off) * c));
    if (a.hard != 0.0) {
      g += f.h * (exp2((x + shift) * kLog2E) / hard_sum) - f.even;
      if (column == f.column) g -= f.label;
    }
    narrow_any(&g, to, a.grad.dtype, column, 1);
  });
  write_named(a, r, w, f, shift, hard_sum);
  fill(a, r, a.vocab, 0.0);
  return loss;
}

// ---- the trip

template <DType K, bool Hard>
inline Sums<typename Kind<K>::Acc> student_sums(const typename Kind<K>::Element* x, int64_t n,
                                                Scale<typename Kind<K>::Acc> of_s,
                                                Scale<typename Kind<K>::Acc> of_hard,
                                                typename Kind<K>::Acc* kept) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  Two<V> s{}, hard{};
  for (int64_t i = 0; i < n; i += kGroup<T>) {
    ahead(x + i, kGroup<T>);
    const Two<V> xs = Kind<K>::load(x + i);
    const Two<V> es{exp2(of_s(xs.a)), exp2(of_s(xs.b))};
    s.a += es.a;
    s.b += es.b;
    if constexpr (Hard) {
      hard.a += exp2(of_hard(xs.a));
      hard.b += exp2(of_hard(xs.b));
    }
    storeu(kept + i, es.a);
    storeu(kept + i + Simd<T>::lanes, es.b);
  }
  return {total(s.a + s.b), T(0), total(hard.a + hard.b), T(0)};
}

template <DType K, bool Hard>
__attribute__((noinline)) void student_sweep(const Args& a, int64_t r, double c, int64_t chunk,
                                             const Workspace<typename Kind<K>::Acc>& w,
                                             Part& out) {
  using T = typename Kind<K>::Acc;
  using Element = typename Kind<K>::Element;
  alignas(64) Element buffer[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer};
  Part part{{rounded<T>(c)}, {}, {rounded<T>(kLog2E)}};
  const int64_t end = least(a.vocab, (chunk + 1) * kChunk);
  for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at), m = padded<T>(n);
    const Element* x = student(at, n);
    const auto shift = [&](int64_t columns) {
      const double s = lowered<K>(part.s, x, columns, part.strange);
      const double hard = Hard ? lowered<K>(part.hard, x, columns, part.strange) : kInfinity;
      const bool moved = s < part.s.base || hard < part.hard.base;
      if (moved) part.rebase<Expectation::none>(s, kInfinity, hard);
      return moved;
    };
    if (part.s.empty()) shift(least(m, kPeek));
    if (m > kPeek && part.s.base == kInfinity) shift(m);
    if (part.strange) break;
    const auto sums_now = [&] {
      return student_sums<K, Hard>(x, m, part.s.scale<T>(), part.hard.scale<T>(), w.kept + at);
    };
    Sums<T> sums = sums_now();
    if (!sums.within() && shift(m)) sums = sums_now();
    w.blocks[at / kBlock] = {part.s.base, kInfinity, static_cast<double>(sums.s)};
    part.s.sum += static_cast<double>(sums.s);
    part.hard.sum += static_cast<double>(sums.hard);
    if (Hard && a.smoothing != 0.0) {
      part.scores += sum_of_scores<K>(x, n, part.hard.scale<T>());
      part.columns += static_cast<double>(n);
    }
  }
  out = part;
}

// A block's exponentials times this are the row's, under its own base.
inline double to_row(const Side& row, const Block& block) {
  return block.s_base == kInfinity ? 0.0 : exp2((row.shift() - block.s_base) * row.c);
}

// Takes the named columns out of what is kept, and returns the sum of the rest.
template <DType K>
inline double take_out(const Args& a, int64_t r, Workspace<typename Kind<K>::Acc>& w,
                       const Side& row) {
  using T = typename Kind<K>::Acc;
  const int64_t* at = named(a, r);
  const int64_t blocks = (a.vocab + kBlock - 1) / kBlock;
  __builtin_memset(w.touched, 0, static_cast<uint64_t>(blocks));
  for (int64_t i = 0; i < a.k; ++i) {
    if (at[i] < 0) continue;
    const int64_t group = at[i] / kGroup<T> * kGroup<T>;
    w.kept[group + place<K>(at[i] - group)] = T(0);
    w.touched[at[i] / kBlock] = 1;
  }
  double sum = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    double of_block = w.blocks[b].s_sum;
    if (w.touched[b]) {
      Two<Vec<T>> rest{};
      const int64_t end = padded<T>(least(kBlock, a.vocab - b * kBlock));
      for (int64_t i = 0; i < end; i += kGroup<T>) {
        rest.a += loadu<Vec<T>>(w.kept + b * kBlock + i);
        rest.b += loadu<Vec<T>>(w.kept + b * kBlock + i + Simd<T>::lanes);
      }
      of_block = static_cast<double>(total(rest.a + rest.b));
    }
    sum += of_block * to_row(row, w.blocks[b]);
  }
  return sum;
}

// factor: of the row's exponentials in the soft term's gradient.
template <DType K, bool Hard, bool Stream>
__attribute__((noinline)) void sparse_sweep(const Args& a, int64_t r, int64_t chunk,
                                            const Workspace<typename Kind<K>::Acc>& w,
                                            const Part& row, double factor, const Factors& f) {
  using T = typename Kind<K>::Acc;
  using V = Vec<T>;
  using Element = typename Kind<K>::Element;
  constexpr int64_t lanes = Simd<T>::lanes;
  alignas(64) Element buffer_s[Hard ? kBlock : 1], buffer_g[kBlock];
  const Reader<K> student{a.student.row(r), a.student.dtype, buffer_s};
  const Writer<K> write{a.grad.row(r), a.grad.dtype, buffer_g};
  const Scale<T> of_hard = row.hard.scale<T>();
  const V h = splat(static_cast<T>(Hard ? f.h / row.hard.sum : 0.0));
  const V even = splat(static_cast<T>(-f.even));
  const int64_t begin = chunk * kChunk, end = least(a.vocab, begin + kChunk);
  for (int64_t at = begin + (end - 1 - begin) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = least(kBlock, end - at);
    const Element* x = Hard ? student(at, n) : nullptr;
    Element* g = write(at, n);
    const V by = splat(static_cast<T>(factor * to_row(row.s, w.blocks[at / kBlock])));
    const auto group = [&](int64_t i) FASTKD_LAMBDA {
      const T* kept = w.kept + at + i;
      Two<V> out{loadu<V>(kept) * by, loadu<V>(kept + lanes) * by};
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

template <DType K>
inline double sparse_row(const Args& a, int64_t r, const Team& team,
                         Workspace<typename Kind<K>::Acc>& w) {
  using T = typename Kind<K>::Acc;
  const bool hard = a.hard != 0.0;
  const double c = kLog2E / a.temperature;
  gather(a, r, w);
  Part row;
  double result;
  if (a.restricted && !hard) {  // nothing else of the row has a part in it
    place_restricted(a, w);
  } else {
    if (w.kept == nullptr) return sparse_by_columns(a, r, w);
    each_chunk(team, a.vocab, false, [&](int64_t chunk) {
      const auto sweep = hard ? student_sweep<K, true> : student_sweep<K, false>;
      sweep(a, r, c, chunk, w, w.parts[chunk]);
    });
    row = w.parts[0];
    for (int64_t i = 1; i * kChunk < a.vocab; ++i) row.add<Expectation::none>(w.parts[i]);
    if (row.strange) return sparse_by_columns(a, r, w);
    if (degenerate(a, row.s.sum, mass(w.points), result)) {
      finish(a, r, result);
      return result;
    }
    if (a.restricted) {
      place_restricted(a, w);
    } else {
      place_points(a, w, row.s.shift(), row.s.c, take_out<K>(a, r, w, row.s));
      const Points& x = w.points;
      if (!x.alone && x.tail_p != -kInfinity && x.q_tail < kLeastTail)
        return sparse_by_columns(a, r, w);
    }
  }
  Points& x = w.points;
  if (degenerate(a, x.total, mass(x), result)) {
    finish(a, r, result);
    return result;
  }
  a.points(x);
  double loss = a.soft * x.value;
  if (hard)
    loss += hard_loss(a, __builtin_log2(row.hard.sum),
                      row.hard.scale<T>().of(label_logit(a, r)), row.scores);
  if (a.grad.data == nullptr) return loss;
  const double scale = scale_of<T>(a, r);
  if (scale != scale || loss != loss) {
    finish(a, r, kNaN);
    return loss;
  }
  const Factors f(a, r, scale);
  if (a.restricted && !hard) {
    fill(a, r, 0, 0.0);
    write_named(a, r, w, f, 0.0, 1.0);
    return loss;
  }
  const double rate = x.q_tail > 0.0 ? x.of_tail / x.q_tail : 0.0;
  const double factor = a.restricted ? 0.0 : f.k * ((rate - x.sum) / x.total);
  if (!(__builtin_fabs(factor) < kMostShift)) return sparse_by_columns(a, r, w);
  const bool stream = a.stream && can_stream<Vec<T>>(a.grad.row(r));
  each_chunk(team, a.vocab, true, [&](int64_t chunk) {
    const auto sweep = hard ? (stream ? sparse_sweep<K, true, true> : sparse_sweep<K, true, false>)
                            : (stream ? sparse_sweep<K, false, true>
                                      : sparse_sweep<K, false, false>);
    sweep(a, r, chunk, w, row, factor, f);
  });
  write_named(a, r, w, f, row.hard.shift(), row.hard.sum);
  fill(a, r, a.vocab, 0.0);
  return loss;
}

template <DType K>
void topk(const Args& a, int64_t begin, int64_t end, const Team& team) {
  using T = typename Kind<K>::Acc;
  const Flush flush;
  Workspace<T> w(a);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      out[r] = 0;
      finish(a, r, 0.0);
    } else if (!w.ready) {
      out[r] = static_cast<T>(kNaN);  // not a byte of memory left
      finish(a, r, kNaN);
    } else {
      out[r] = static_cast<T>(sparse_row<K>(a, r, team, w));
    }
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
