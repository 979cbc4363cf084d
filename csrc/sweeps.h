// The sweeps over one row: one set of loops for every divergence, dtype and instruction set.
//
// A row is walked in blocks that stay in the L1 cache; elements that are not of the accumulation
// type T are converted into a buffer there. Within a block loops run over whole vectors of T, and
// the sums of blocks are kept in double. Scores are shifted by the row's maximum before they are
// scaled, (x - max) * log2(e) / T, which is exact where it matters however large the logits are.
//
// Exponentials are most of the work, so an expectation keeps those of its first sweep for its last
// (82 instead of 52 instructions per column without), as long as they stay near the cache.
#pragma once

#include "divergence.h"
#include "kernels.h"
#include "vec.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr double kNaN = __builtin_nan("");
constexpr double kInfinity = __builtin_inf();

constexpr int64_t kPart = kBlock / 4;  // columns between two requests to the memory
constexpr int64_t kLine = 64;          // bytes of a cache line

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct alignas(64) Buffers {
  T s[kBlock];
  T t[kBlock];
  T g[kBlock];
};

// One side's softmax so far: the maximum, and the sum of exp2((x - max) * c).
struct Side {
  double top = -kInfinity;
  double sum = 0.0;

  double shift() const { return top == -kInfinity ? 0.0 : top; }
  bool empty() const { return sum == 0.0; }  // impossible everywhere

  // Takes a new maximum; the factor by which sums under the old one shrink, and by how much (in
  // units of c) scores did.
  double raise(double to, double c, double& drop) {
    drop = 0.0;
    if (!(to > top)) return 1.0;
    if (top != -kInfinity) drop = (to - top) * c;
    top = to;
    const double shrink = exp2(-drop);
    sum *= shrink;
    return shrink;
  }
};

// The student's side at T = 1 for the hard label: same maximum, and the sum of all x - maximum,
// which keeps its digits where the logits are far from 0.
struct Hard {
  double sum = 0.0;
  double below = 0.0;
};

// In lanes by hand: of the reduction Clang thinks that a NaN forbids it. A NaN is passed over here,
// and its row is NaN by its sums.
template <class T>
inline T max_of(const T* x, int64_t n) {
  T lanes[kPad];
  for (int64_t k = 0; k < kPad; ++k) lanes[k] = -kInf;
  for (int64_t i = 0; i < n; i += kPad) {
#pragma omp simd
    for (int64_t k = 0; k < kPad; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
  }
  T top = lanes[0];
  for (int64_t k = 1; k < kPad; ++k) top = lanes[k] > top ? lanes[k] : top;
  return top;
}

template <class T>
inline T exp_sum(const T* x, int64_t n, T top, T c) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exp2((x[i] - top) * c);
  return sum;
}

template <class T>
inline T sum_below(const T* x, int64_t n, T top) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] - top;
  return sum;
}

template <class T>
struct Score {  // log2 probability of x is (x - top) * c - log_sum
  T top;
  T c;
  T log_sum;

  Score(const Side& side, double scale)
      : top(static_cast<T>(side.shift())),
        c(static_cast<T>(scale)),
        log_sum(static_cast<T>(__builtin_log2(side.sum))) {}
  FASTKD_INLINE T operator()(T x) const { return fma(x - top, c, -log_sum); }
};

// A row of one side, read block by block.
template <class T>
struct Reader {
  const void* row;
  DType dtype;
  T* buffer;
  const T* operator()(int64_t at, int64_t n) const { return load(row, dtype, at, n, buffer); }

  // Asks for columns that are wanted soon, so that the memory does not idle while exponentials are
  // computed: the hardware's own prefetching follows the loads, which come in bursts.
  void ahead(int64_t at, int64_t n) const {
    const int64_t size = size_of(dtype);
    const char* from = static_cast<const char*>(row) + at * size;
    for (int64_t i = 0; i < n * size; i += kLine) __builtin_prefetch(from + i, 0, 2);
  }
};

// What the first sweep of an expectation keeps for the gradient, by block: exponentials under the
// maxima as they stood then. `other` is the teacher's exponential or the difference of the scores.
template <class T>
struct Memory {
  static constexpr int64_t kMost = int64_t{1} << 18;  // columns: 2 MB in float
  T* es = nullptr;
  T* other = nullptr;
  double* tops = nullptr;  // student's and teacher's maximum of each block

  explicit Memory(int64_t vocab) {
    if (vocab > kMost) return;
    const int64_t columns = (vocab + kBlock - 1) / kBlock * kBlock;
    const int64_t bytes = 2 * columns * int64_t{sizeof(T)} + 2 * (columns / kBlock) * 8;
    es = static_cast<T*>(__builtin_malloc(static_cast<uint64_t>(bytes)));
    if (es == nullptr) return;  // the exponentials are then computed again
    other = es + columns;
    tops = reinterpret_cast<double*>(other + columns);
  }
  ~Memory() { __builtin_free(es); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// ---- first sweep ------------------------------------------------------------------------------

template <class T>
inline void stats_sweep(const Reader<T>& read, int64_t vocab, double c, Side& side, double& below) {
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t n = least(kBlock, vocab - at);
    const T* x = read(at, n);
    double drop;
    const double old = side.shift();
    side.raise(max_of(x, padded(n)), c, drop);
    below += static_cast<double>(at) * (old - side.shift());
    side.sum += exp_sum(x, padded(n), static_cast<T>(side.shift()), static_cast<T>(c));
    below += sum_below(x, n, static_cast<T>(side.shift()));
  }
}

// Sums of one block under given maxima; cross = sum of e_t (y_t - y_s) or of e_s (y_s - y_t).
template <class T, Expectation E, bool Keep>
inline void expectation_block(const T* x, const T* y, int64_t m, T ms, T mt, T c, T* es_to,
                              T* other_to, double& s, double& t, double& cross) {
  T sum_s = 0, sum_t = 0, sum_w = 0;
#pragma omp simd reduction(+ : sum_s, sum_t, sum_w)
  for (int64_t i = 0; i < m; ++i) {
    const T ys = (x[i] - ms) * c, yt = (y[i] - mt) * c;
    const T es = exp2(ys), et = exp2(yt);
    const T w = E == Expectation::teacher ? et : es;
    const T gap = E == Expectation::teacher ? yt - ys : ys - yt;
    sum_s += es;
    sum_t += et;
    sum_w += weighted(w, gap);
    if constexpr (Keep) {
      es_to[i] = es;
      other_to[i] = E == Expectation::teacher ? et : gap;
    }
  }
  s += sum_s;
  t += sum_t;
  cross += sum_w;
}

// Both sides at once, for an expectation with the cross sum beside them.
template <class T, Expectation E>
inline void first_sweep(const Args& a, const Reader<T>& student, const Reader<T>& teacher, double c,
                        const Memory<T>& memory, Side& s, Side& t, double& cross, Hard& hard) {
  const bool at_one = a.hard != 0.0 && c != kLog2E;  // at T = 1 both sums are the same
  for (int64_t at = 0; at < a.vocab; at += kBlock) {
    const int64_t n = least(kBlock, a.vocab - at), m = padded(n);
    const T* x = student(at, n);
    const T* y = teacher(at, n);
    double drop_s, drop_t;
    const double old_s = s.sum, old_t = t.sum;
    const double top_s = s.top;
    const double shrink_s = s.raise(max_of(x, m), c, drop_s);
    const double shrink_t = t.raise(max_of(y, m), c, drop_t);
    const T ms = static_cast<T>(s.shift()), mt = static_cast<T>(t.shift()), k = static_cast<T>(c);
    if (E != Expectation::none && (drop_s != 0.0 || drop_t != 0.0)) {
      constexpr bool of_t = E == Expectation::teacher;
      const double shrink = of_t ? shrink_t : shrink_s;
      const double shift = of_t ? old_t * (drop_s - drop_t) : old_s * (drop_t - drop_s);
      cross = shrink > 0.0 ? shrink * (cross + shift) : 0.0;
    }
    const bool keep = memory.es != nullptr;
    if (keep) {
      memory.tops[at / kBlock * 2] = s.shift();
      memory.tops[at / kBlock * 2 + 1] = t.shift();
    }
    for (int64_t i = 0; i < m; i += kPart) {
      const int64_t part = least(kPart, m - i), next = least(kPart, a.vocab - (at + kBlock + i));
      student.ahead(at + kBlock + i, next);
      teacher.ahead(at + kBlock + i, next);
      if constexpr (E == Expectation::none) {
        s.sum += exp_sum(x + i, part, ms, k);
        t.sum += exp_sum(y + i, part, mt, k);
      } else if (keep) {
        expectation_block<T, E, true>(x + i, y + i, part, ms, mt, k, memory.es + at + i,
                                      memory.other + at + i, s.sum, t.sum, cross);
      } else {
        expectation_block<T, E, false>(x + i, y + i, part, ms, mt, k, nullptr, nullptr, s.sum,
                                       t.sum, cross);
      }
    }
    if (at_one) {
      if (s.top > top_s && top_s != -kInfinity) hard.sum *= exp2((top_s - s.top) * kLog2E);
      hard.sum += exp_sum(x, m, ms, static_cast<T>(kLog2E));
    }
    if (a.smoothing != 0.0) {
      const double old = top_s == -kInfinity ? 0.0 : top_s;
      hard.below += static_cast<double>(at) * (old - s.shift()) + sum_below(x, n, ms);
    }
  }
  if (a.hard != 0.0 && !at_one) hard.sum = s.sum;
}

// The arguments of a pair at one column.
template <class T>
struct Column {
  T logp, logq, p, q;
};

template <class T>
struct Fresh {
  const T* x;
  const T* y;
  Score<T> q_of;
  Score<T> p_of;
  FASTKD_INLINE Column<T> operator()(int64_t i) const {
    const T ln2 = static_cast<T>(kLn2), lq = q_of(x[i]), lp = p_of(y[i]);
    return {lp * ln2, lq * ln2, exp2(lp), exp2(lq)};
  }
};

// ---- second sweep: sums of value and slope ----------------------------------------------------

template <class T, class D>
inline void pair_sweep(const Args& a, const Reader<T>& student, const Reader<T>& teacher,
                       const Score<T>& q_of, const Score<T>& p_of, double& value, double& slope) {
  const T param = static_cast<T>(a.param);
  for (int64_t at = (a.vocab - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    const int64_t n = least(kBlock, a.vocab - at);
    const T* x = student(at, n);
    const T* y = teacher(at, n);
    const Fresh<T> columns{x, y, q_of, p_of};
    T sum_v = 0, sum_g = 0;
#pragma omp simd reduction(+ : sum_v, sum_g)
    for (int64_t i = 0; i < padded(n); ++i) {
      const Column<T> c = columns(i);
      const Point<T> point = D::at(c.logp, c.logq, c.p, c.q, param);
      sum_v += point.value;
      sum_g += point.slope;
    }
    value += sum_v;
    slope += sum_g;
  }
}

// ---- last sweep: the gradient -----------------------------------------------------------------

inline void fill(const Args& a, int64_t r, int64_t from, double value) {
  char* row = a.grad.row(r);
  if (value == 0.0) {
    __builtin_memset(row + from * size_of(a.grad.dtype), 0,
                     static_cast<uint64_t>((a.width - from) * size_of(a.grad.dtype)));
    return;
  }
  const double block[kPad] = {value, value, value, value, value, value, value, value,
                              value, value, value, value, value, value, value, value};
  for (int64_t at = from; at < a.vocab; at += kPad)
    store(block, row, a.grad.dtype, at, least(kPad, a.vocab - at));
  fill(a, r, a.vocab, 0.0);
}

// What the gradient of one row needs.
template <class T>
struct Slopes {
  Score<T> q_of;
  Score<T> p_of;
  Score<T> hard_of;  // the student at T = 1
  double slope;      // sum of centred slopes
  double scale;      // of the whole row
};

// From the first sweep's memory: all that the slope of an expectation depends on, which is p and q
// under the teacher, q and log q - log p under the student.
template <class T, Expectation E>
struct Kept {
  const T* es;
  const T* other;
  T to_q;
  T to_p;
  T shift;

  Kept(const Memory<T>& memory, int64_t at, const Side& s, const Side& t, double c)
      : es(memory.es + at), other(memory.other + at) {
    const double drop_s = (s.shift() - memory.tops[at / kBlock * 2]) * c;
    const double drop_t = (t.shift() - memory.tops[at / kBlock * 2 + 1]) * c;
    to_q = static_cast<T>(exp2(-drop_s) / s.sum);
    to_p = static_cast<T>(exp2(-drop_t) / t.sum);
    shift = static_cast<T>(
        kLn2 * ((drop_t - drop_s) + (__builtin_log2(t.sum) - __builtin_log2(s.sum))));
  }
  FASTKD_INLINE Column<T> operator()(int64_t i) const {
    const T q = es[i] * to_q;
    if constexpr (E == Expectation::teacher) return {T(0), T(0), other[i] * to_p, q};
    return {T(0), fma(other[i], static_cast<T>(kLn2), shift), T(0), q};
  }
};

// k (slope - q * sum of slopes) and, for a hard label, h (softmax - smoothing / classes); the
// label's own column follows.
template <class T, class D, bool WithHard, class Columns>
inline void grad_block(const Args& a, const Slopes<T>& w, const Columns& columns, const T* x, T* g,
                       int64_t m) {
  const T param = static_cast<T>(a.param);
  const T k = static_cast<T>(w.scale * a.soft / a.temperature), slope = static_cast<T>(w.slope);
  const T h = static_cast<T>(w.scale * a.hard);
  const T even = static_cast<T>(a.smoothing / static_cast<double>(a.classes));
#pragma omp simd
  for (int64_t i = 0; i < m; ++i) {
    const Column<T> at = columns(i);
    T out = k * fma(-slope, at.q, D::at(at.logp, at.logq, at.p, at.q, param).slope);
    if constexpr (WithHard) out += h * (exp2(w.hard_of(x[i])) - even);
    g[i] = out;
  }
}

// Backwards, over what the first sweep has left in the cache. `columns(at, x, y)` gives a block's
// columns; `reads` is whether it needs the logits for that.
template <class T, class D, class F>
inline void grad_sweep(const Args& a, int64_t r, const Reader<T>& student, const Reader<T>& teacher,
                       const Slopes<T>& w, T* buffer, bool reads, F columns) {
  void* row = a.grad.row(r);
  const int64_t label = a.label != nullptr && a.hard != 0.0 ? a.label[r] : -1;
  for (int64_t at = (a.vocab - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    const int64_t n = least(kBlock, a.vocab - at);
    const T* x = reads || a.hard != 0.0 ? student(at, n) : nullptr;
    const T* y = reads ? teacher(at, n) : nullptr;
    T* g = a.stream ? buffer : target(row, a.grad.dtype, at, n, buffer);
    if (a.hard != 0.0) {
      grad_block<T, D, true>(a, w, columns(at, x, y), x, g, padded(n));
      if (label >= at && label < at + n)
        g[label - at] -= static_cast<T>(w.scale * a.hard * (1.0 - a.smoothing));
    } else {
      grad_block<T, D, false>(a, w, columns(at, x, y), x, g, padded(n));
    }
    if (g == buffer && !(a.stream && stream(buffer, row, a.grad.dtype, at, n)))
      store(buffer, row, a.grad.dtype, at, n);
  }
  fill(a, r, a.vocab, 0.0);
}

template <class T, class D>
inline void fresh_grad_sweep(const Args& a, int64_t r, const Reader<T>& student,
                             const Reader<T>& teacher, const Slopes<T>& w, T* buffer) {
  grad_sweep<T, D>(a, r, student, teacher, w, buffer, true,
                   [&](int64_t, const T* x, const T* y) {
                     return Fresh<T>{x, y, w.q_of, w.p_of};
                   });
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
