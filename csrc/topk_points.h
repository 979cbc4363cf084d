// The K + 1 points of a row against a top-k teacher: its support (the K columns that the teacher
// gives) and the tail (one more outcome, all columns off the support). All of it is in double and
// in natural logarithms.
#pragma once

#include "passes.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Columns of the widest row whose exponentials are kept.
constexpr int64_t kMostKept = 2 * kMostColumns;

// x = 2^x for x <= 1, to two units in the last place; 0 below the normal numbers. The compiler
// turns this loop into vector code. Column by column, 64 columns of the support would take as long
// as 3 000 others.
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
    // without a tail the slopes are not centred
    if (x.no_tail) slope += x.centre * x.q[i];
    x.slope[i] = slope;
    sum += slope;
  }
  x.tail_slope =
      x.no_tail ? 0.0 : slope_at(x.tail_logp, x.tail_logq, __builtin_exp(x.tail_logp), x.q_tail);
  sum += x.tail_slope;
  const OfSum of = of_sum<double>(D{}, x.value);
  x.value = of.loss;
  for (int64_t i = 0; i < x.k; ++i) x.slope[i] = of.by * (x.slope[i] - x.q[i] * sum);
  x.sum = of.by * sum;
  x.tail_slope *= of.by;
}

template <class T>
struct Workspace {
  T* kept = nullptr;  // the student's exponentials, group by group
  Block* blocks = nullptr;
  Partial* partials = nullptr;
  Points points;
  double* logits = nullptr;  // [K]
  uint8_t* touched = nullptr;
  bool ready = false;

  Workspace(const Args& a) {
    const int64_t columns = (a.vocab + kBlock - 1) / kBlock * kBlock;
    const int64_t floats = a.vocab > kMostKept ? 0 : columns * int64_t{sizeof(T)};
    const int64_t states = columns / kBlock * int64_t{sizeof(Block)};
    const int64_t sums = (a.vocab + kChunk - 1) / kChunk * int64_t{sizeof(Partial)};
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
    partials = reinterpret_cast<Partial*>(next(sums));
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
    points.no_tail = a.tail == nullptr && !a.restricted;
    ready = true;
  }
};

// The columns of a row's support; -1 is padding.
inline const int64_t* support_of(const Args& a, int64_t r) { return a.indices + r * a.k; }

// Reads the teacher's row, and the student's logits on the support.
template <class T>
inline void gather(const Args& a, int64_t r, Workspace<T>& w) {
  const int64_t* at = support_of(a, r);
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
  w.points.tail_logp =
      a.tail == nullptr ? -kInfinity : static_cast<double>(static_cast<const T*>(a.tail)[r]);
}

// Fills in the student's side of the points. Its exponentials are exp2((x + shift) * c), and
// tail_sum is their sum off the support.
template <class T>
inline void place_student(const Args& a, Workspace<T>& w, double shift, double c, double tail_sum) {
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
  x.tail_logq = tail_sum == 0.0 ? -kInfinity : (__builtin_log2(tail_sum) - log_total) * kLn2;
}

// As place_student, for a softmax over the support alone.
template <class T>
inline void place_restricted(const Args& a, Workspace<T>& w) {
  double top = -kInfinity;
  for (int64_t i = 0; i < a.k; ++i) {
    if (w.logits[i] > top) top = w.logits[i];
    if (w.logits[i] != w.logits[i]) top = kNaN;
  }
  place_student(a, w, top == -kInfinity ? 0.0 : -top, kLog2E / a.temperature, 0.0);
}

// 1 if the teacher gives this row any mass, 0 if none, NaN if the row holds a NaN. A NaN may stand
// in padding, where an index was invalid. Beside q = 0, an expectation under the student would miss
// it.
inline double teacher_mass(const Points& x) {
  double some = x.no_tail || x.tail_logp != -kInfinity ? 1.0 : 0.0;
  if (x.tail_logp != x.tail_logp) some = kNaN;
  for (int64_t i = 0; i < x.k; ++i) {
    if (x.logp[i] != x.logp[i]) return kNaN;
    if (x.logp[i] != -kInfinity && some == 0.0) some = 1.0;
  }
  return some;
}

// Writes the outputs that the points tell, whose student is given unless the softmax is over the
// support alone. The teacher's log-sum-exp is not known.
template <class T>
inline void point_outputs(const Args& a, int64_t r, const Workspace<T>& w, const Softmax& student,
                          double soft) {
  const Outputs<T> outputs(a, r);
  if (!outputs) return;
  const Points& x = w.points;
  double entropy = x.tail_logp == -kInfinity ? 0.0 : -__builtin_exp(x.tail_logp) * x.tail_logp;
  for (int64_t i = 0; i < a.k; ++i)
    if (x.logp[i] != -kInfinity) entropy -= x.p[i] * x.logp[i];
  outputs.soft(soft);
  outputs.put(kEntropyT, entropy);
  if (!a.restricted) return outputs.student(student);
  double top = -kInfinity, weighted = 0.0;
  for (int64_t i = 0; i < a.k; ++i) {
    if (w.logits[i] > top) top = w.logits[i];
    if (x.logq[i] != -kInfinity) weighted += x.q[i] * x.logq[i];
  }
  outputs.put(kEntropyS, x.total == 0.0 ? 0.0 : -weighted);
  outputs.put(kLogSumS, (top == -kInfinity ? 0.0 : top / a.temperature) + __builtin_log(x.total));
}

// What the loss takes at T = 1, from the student's exponentials; scores: the sum of all scores, for
// label smoothing.
inline double loss_at_one(const Args& a, int64_t r, const Side& side, double scores) {
  const double log_sum = __builtin_log2(side.sum);
  double loss = 0.0;
  if (a.hard != 0.0) {
    const double label = (label_logit(a, r) + side.shift()) * side.c;
    loss += a.hard * kLn2 * (1.0 - a.smoothing) * (log_sum - label);
    if (a.smoothing != 0.0)
      loss += a.hard * kLn2 * a.smoothing * (log_sum - scores / static_cast<double>(a.classes));
  }
  if (a.z != 0.0) loss += a.z * side.log_sum() * side.log_sum();
  return loss;
}

// Writes the gradient on the support, over what the gradient loop wrote there.
template <class T>
inline void write_support(const Args& a, int64_t r, const Workspace<T>& w, const Factors& f,
                          double hard_shift, double hard_sum) {
  const int64_t* at = support_of(a, r);
  char* row = a.grad.row(r);
  for (int64_t i = 0; i < a.k; ++i) {
    if (at[i] < 0) continue;
    double g = f.k * w.points.slope[i];
    if (a.at_one()) {
      g += f.h * (exp2((w.logits[i] + hard_shift) * kLog2E) / hard_sum) - f.uniform;
      if (at[i] == f.column) g -= f.label;
    }
    narrow_any(&g, row, a.grad.dtype, at[i], 1);
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
