// What the fused pass keeps of a row: sums under a base of their own, and a scratch that holds the
// row's exponentials until the gradient is made of them.
#pragma once

#include "pass_general.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// The largest score. Sums of larger ones overflow.
constexpr double kMostShift = 0x1p100;
static_assert(kChunk % kBlock == 0, "a block lies in one chunk");

// A score is (x + base) * c. It is exact near the maximum however large the logits are, and exactly
// 0 at the logit that the base was taken from.
template <class T>
struct Scale {
  T c;
  T base;

  FASTKD_INLINE Vec<T> operator()(Vec<T> x) const { return (x + splat(base)) * splat(c); }
  double of(double x) const { return (x + static_cast<double>(base)) * static_cast<double>(c); }
};

// One side so far: the sum of exp2 of the scores. While all logits are -inf, no base is set.
// `weighted`, the sum of e * y for e = exp2(y), is summed where outputs are requested.
struct Side {
  double c = 0.0;
  double base = kInfinity;
  double sum = 0.0;
  double weighted = 0.0;

  template <class T>
  Scale<T> scale() const {
    return {static_cast<T>(c), static_cast<T>(shift())};
  }
  double shift() const { return base == kInfinity ? 0.0 : base; }
  double log_sum() const { return __builtin_log(sum) - shift(); }  // where c is log2(e)
  bool empty() const { return sum == 0.0; }
};

// A score as a factor of its exponential: finite where that is 0. exp2 has the same bound.
FASTKD_INLINE F least_score(F y) { return larger(splat(-127.0f), y); }
FASTKD_INLINE double least_score(double y) { return larger(-1022.0, y); }

// The sums of a chunk and, once all chunks are added, of the row. `hard` is the student at T = 1.
// `cross` serves an expectation: with e = exp2(y) of the scores y, the sum of e_t (y_t - y_s) for
// the teacher's and of e_s (y_s - y_t) for the student's.
struct Partial {
  Side s, t, hard;
  double cross = 0.0;
  double value = 0.0;
  double slope = 0.0;
  double by = 1.0;            // of the slopes, where `value` is a function of the sum
  double scores = 0.0;        // for label smoothing: sum of the scores at T = 1
  double columns = 0.0;       // how many columns `scores` sums
  bool out_of_range = false;  // a score is beyond kMostShift, or NaN

  // Converts the sums to lower bases.
  template <Expectation E>
  void rebase(double s_base, double t_base, double hard_base) {
    const double drop_s = move(s, s_base), drop_t = move(t, t_base);
    constexpr bool of_t = E == Expectation::teacher;
    const double shrink = exp2(-(of_t ? drop_t : drop_s));
    // `move` has already shrunk the sum of the weights
    if (E != Expectation::none && (drop_s != 0.0 || drop_t != 0.0))
      cross = shrink > 0.0
                  ? shrink * cross + (of_t ? t.sum * (drop_s - drop_t) : s.sum * (drop_t - drop_s))
                  : 0.0;
    scores -= columns * move(hard, hard_base);
  }

  template <Expectation E>
  void add(Partial other) {
    const auto low = [](double a, double b) { return a < b ? a : b; };
    const double s_base = low(s.base, other.s.base), t_base = low(t.base, other.t.base);
    const double hard_base = low(hard.base, other.hard.base);
    rebase<E>(s_base, t_base, hard_base);
    other.rebase<E>(s_base, t_base, hard_base);
    s.sum += other.s.sum;
    t.sum += other.t.sum;
    s.weighted += other.s.weighted;
    t.weighted += other.t.weighted;
    hard.sum += other.hard.sum;
    cross += other.cross;
    scores += other.scores;
    columns += other.columns;
    out_of_range |= other.out_of_range;
  }

 private:
  static double move(Side& side, double to) {
    const double drop =
        side.base == kInfinity || !(to < side.base) ? 0.0 : (side.base - to) * side.c;
    if (to < side.base) side.base = to;
    if (drop != 0.0) {
      const double shrink = exp2(-drop);
      side.sum *= shrink;
      side.weighted = shrink * side.weighted - drop * side.sum;
    }
    return drop;
  }
};

// A block as the sum loop left it: the bases of its exponentials, and the student's sum.
// lift: what was taken off its score differences. less_one: exponentials are kept less 1.
struct Block {
  double s_base, t_base, s_sum, lift = 0.0;
  bool less_one = false;
};

// The scratch of one row. `kept` holds four vectors per group of columns: two of the student's
// exponentials, then two of the teacher's (or of score differences, or later of the rates).
template <class T>
struct Scratch {
  T* kept = nullptr;
  Block* blocks = nullptr;
  Partial* partials = nullptr;

  explicit Scratch(int64_t vocab) {
    if (vocab > kMostColumns) return;
    char* memory = scratch(bytes(vocab, true));
    if (memory != nullptr) *this = Scratch(memory, vocab, true);
  }
  Scratch(char* memory, int64_t vocab, bool exponentials) {
    const int64_t floats = exponentials ? bytes_kept(vocab) : 0;
    kept = reinterpret_cast<T*>(memory);
    blocks = reinterpret_cast<Block*>(memory + floats);
    partials = reinterpret_cast<Partial*>(memory + floats + bytes_blocks(vocab));
  }

  static int64_t bytes(int64_t vocab, bool exponentials) {
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    return (exponentials ? bytes_kept(vocab) : 0) + bytes_blocks(vocab) +
           chunks * int64_t{sizeof(Partial)};
  }

 private:
  static int64_t count(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }
  static int64_t bytes_kept(int64_t vocab) {
    return 2 * count(vocab) * kBlock * int64_t{sizeof(T)};
  }
  static int64_t bytes_blocks(int64_t vocab) { return count(vocab) * int64_t{sizeof(Block)}; }
};

// x as the loops will round it, so that numbers computed in double agree with the loops.
template <class T>
double rounded(double x) {
  return static_cast<double>(static_cast<T>(x));
}

// Factors that turn a block's exponentials into probabilities of the row.
struct ToProbability {
  double q, p;

  template <class T>
  ToProbability(const Scratch<T>& scratch, int64_t at, const Partial& row)
      : q(factor(row.s, scratch.blocks[at / kBlock].s_base)),
        p(factor(row.t, scratch.blocks[at / kBlock].t_base)) {}

  static double factor(const Side& row, double base) {
    // without a base every exponential of the block is 0
    return base == kInfinity ? 0.0 : exp2((row.shift() - base) * row.c) / row.sum;
  }
};

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
