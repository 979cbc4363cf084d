// The passes over rows, made of the sweeps over one (see fastkd/backends/base.py for what they owe).
#pragma once

#include "pass_fused.h"
#include "pass_general.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

template <class T>
inline double scale_of(const Args& a, int64_t r) {
  return a.scale == nullptr ? a.factor
                            : static_cast<double>(static_cast<const T*>(a.scale)[r]) * a.factor;
}

inline bool dropped(const Args& a, int64_t r) { return a.keep != nullptr && a.keep[r] == 0; }

template <class T>
inline Plain<T> plain(const Operand& x, int64_t r, T* buffer) {
  return {x.row(r), x.dtype, buffer};
}

// f(chunk) for each chunk of a row: over the team's threads, each of which has the same chunks in
// every trip and so in its cache; or alone, where `backwards` begins with what is still in it.
template <class F>
inline void each_chunk(const Team& team, int64_t vocab, bool backwards, F f) {
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  if (team.threads <= 1 || chunks == 1) {
    for (int64_t i = 0; i < chunks; ++i) f(backwards ? chunks - 1 - i : i);
    return;
  }
  team.run(team.threads, chunks,
           [](void* task, int64_t i) {
             const Flush flush;
             (*static_cast<F*>(task))(i);
           },
           &f);
}

inline double label_logit(const Args& a, int64_t r) {
  const int64_t label = a.label[r];
  double x = 0.0;
  if (label >= 0 && label < a.vocab) widen_any(a.student.row(r), a.student.dtype, label, 1, &x);
  return x;
}

// Whether sums s and t of the two sides' exponentials make no two distributions; then `result` is
// what the row comes to: NaN for NaN, and for one impossible side; two of them differ in nothing,
// unless a label is asked for.
inline bool degenerate(const Args& a, double s, double t, double& result) {
  if (s > 0.0 && t > 0.0 && s + t < kInfinity) return false;
  result = s == 0.0 && t == 0.0 && a.hard == 0.0 ? 0.0 : kNaN;
  return true;
}

// Gives a degenerate or dropped row its gradient.
inline void finish(const Args& a, int64_t r, double result) {
  if (a.grad.data != nullptr) fill(a, r, 0, result);
}

// A row by the general sweeps, from exact maxima: what the trip below does not fit.
template <class T, class D>
__attribute__((noinline)) double row_by_sweeps(const Args& a, int64_t r) {
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  const Plain<T> student = plain(a.student, r, buffers.s), teacher = plain(a.teacher, r, buffers.t);
  Stats s, t, one;
  stats_sweep<T>(student, a.vocab, c, s);
  stats_sweep<T>(teacher, a.vocab, c, t);
  if (a.hard != 0.0) stats_sweep<T>(student, a.vocab, kLog2E, one);
  double value = 0.0, slope = 0.0;
  if (degenerate(a, s.sum, t.sum, value)) {
    finish(a, r, value);
    return value;
  }
  const Sides<T> sides{Score<T>(s, c), Score<T>(t, c)};
  pair_sweep<T, D>(a, student, teacher, sides, value, slope);
  double loss = a.soft * value;
  if (a.hard != 0.0) {
    const double log_sum = __builtin_log(one.sum);
    loss += a.hard * (1.0 - a.smoothing) * ((one.top - label_logit(a, r)) + log_sum);
    if (a.smoothing != 0.0)
      loss += a.hard * a.smoothing * (log_sum - one.below / static_cast<double>(a.classes));
  }
  if (a.grad.data != nullptr) {
    const Slopes<T> slopes{sides, Score<T>(a.hard != 0.0 ? one : s, kLog2E), slope,
                           scale_of<T>(a, r)};
    grad_sweep<T, D>(a, r, student, teacher, slopes, buffers.g);
  }
  return loss;
}

// ---- the fused trip, over the chunks of a row

template <DType K, Expectation E, bool Keep>
inline Part first_trip(const Args& a, int64_t r, double c, const Team& team,
                       const Scratch<typename Kind<K>::Acc>& scratch) {
  each_chunk(team, a.vocab, false, [&](int64_t chunk) {
    if (a.hard != 0.0) {
      first_sweep<K, E, true, Keep>(a, r, c, chunk, scratch, scratch.parts[chunk]);
    } else {
      first_sweep<K, E, false, Keep>(a, r, c, chunk, scratch, scratch.parts[chunk]);
    }
  });
  Part row = scratch.parts[0];
  for (int64_t i = 1; i * kChunk < a.vocab; ++i) row.add<E>(scratch.parts[i]);
  return row;
}

template <DType K, Expectation E>
inline void last_trip(const Args& a, int64_t r, const Team& team,
                      const Scratch<typename Kind<K>::Acc>& scratch, const Part& row,
                      double scale) {
  using T = typename Kind<K>::Acc;
  const Factors f(a, r, scale);
  const bool stream = a.stream && can_stream<Vec<T>>(a.grad.row(r));
  each_chunk(team, a.vocab, true, [&](int64_t chunk) {
    const auto sweep = a.hard != 0.0 ? (stream ? last_sweep<K, E, true, true>
                                               : last_sweep<K, E, true, false>)
                                     : (stream ? last_sweep<K, E, false, true>
                                               : last_sweep<K, E, false, false>);
    sweep(a, r, chunk, scratch, row, f);
  });
  fill(a, r, a.vocab, 0.0);
}

// Values and slopes from the exponentials, of a divergence that is no expectation.
template <class T, class D>
inline void rates_trip(const Args& a, const Team& team, const Scratch<T>& scratch, Part& row,
                       Origin<T> origin) {
  each_chunk(team, a.vocab, false, [&](int64_t chunk) {
    rate_sweep<T, D>(a, chunk, scratch, row, origin, scratch.parts[chunk]);
  });
  for (int64_t i = 0; i * kChunk < a.vocab; ++i) {
    row.value += scratch.parts[i].value;
    row.slope += scratch.parts[i].slope;
  }
}

// The value of an expectation, and its slope, by a row's sums. False where it is infinite or NaN: an
// impossible column weighed under an early base may yet have no weight under the row's, which only
// the pair, with exact maxima in hand, knows.
template <Expectation E>
inline bool expected(Part& row) {
  if constexpr (E != Expectation::none) {
    constexpr bool of_t = E == Expectation::teacher;
    const Side& w = of_t ? row.t : row.s;
    const Side& other = of_t ? row.s : row.t;
    row.value = kLn2 * (row.cross / w.sum + (__builtin_log2(other.sum) - __builtin_log2(w.sum)));
    if (row.value - row.value != 0.0) return false;
    row.slope = of_t ? 0.0 : row.value;  // sum of q - p, or of the value itself
  }
  return true;
}

// T of 1e-18 and far logits: factors beyond float would make NaN of columns that have no weight.
template <class T>
inline bool steep(const Args& a, int64_t r, const Part& row) {
  const double k = __builtin_fabs(scale_of<T>(a, r) * a.soft / a.temperature);
  return k > kMostShift || k * __builtin_fabs(row.slope) > kMostShift;
}

template <class T>
inline double loss_of(const Args& a, const Part& row, double at_label) {
  double loss = a.soft * row.value;
  if (a.hard != 0.0) {
    const double log_sum = __builtin_log2(row.hard.sum);
    const double label = row.hard.scale<T>().of(at_label);
    loss += a.hard * kLn2 * (1.0 - a.smoothing) * (log_sum - label);
    if (a.smoothing != 0.0)
      loss += a.hard * kLn2 * a.smoothing *
              (log_sum - row.scores / static_cast<double>(a.classes));
  }
  return loss;
}

template <DType K, Expectation E>
inline void gradient_of(const Args& a, int64_t r, const Team& team,
                        const Scratch<typename Kind<K>::Acc>& scratch, const Part& row) {
  const double scale = scale_of<typename Kind<K>::Acc>(a, r);
  if (scale != scale) {
    finish(a, r, kNaN);
  } else {
    last_trip<K, E>(a, r, team, scratch, row, scale);
  }
}

template <DType K, class D>
inline double row_by_trip(const Args& a, int64_t r, const Team& team,
                          const Scratch<typename Kind<K>::Acc>& scratch) {
  using T = typename Kind<K>::Acc;
  constexpr Expectation E = D::expectation;
  const double c = kLog2E / a.temperature;
  const bool grad = a.grad.data != nullptr;
  Part row = E == Expectation::none || grad
                 ? first_trip<K, E, true>(a, r, c, team, scratch)
                 : first_trip<K, E, E == Expectation::none>(a, r, c, team, scratch);
  if (row.strange) return row_by_sweeps<T, D>(a, r);
  double result;
  if (degenerate(a, row.s.sum, row.t.sum, result)) {
    finish(a, r, result);
    return result;
  }
  if constexpr (E == Expectation::none)
    rates_trip<T, D>(a, team, scratch, row,
                     grad ? top_rate<T, D>(a, scratch, row).origin
                          : centred<D>(static_cast<T>(a.param)));
  if (!expected<E>(row) || (grad && steep<T>(a, r, row))) return row_by_sweeps<T, D>(a, r);
  const double loss = loss_of<T>(a, row, a.hard != 0.0 ? label_logit(a, r) : 0.0);
  if (grad) gradient_of<K, E>(a, r, team, scratch, row);
  return loss;
}

template <DType K, class D>
void fused(const Args& a, int64_t begin, int64_t end, const Team& team) {
  using T = typename Kind<K>::Acc;
  const Flush flush;
  const Scratch<T> scratch(a.vocab);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      out[r] = 0;
      finish(a, r, 0.0);
    } else if (scratch.kept == nullptr) {
      out[r] = static_cast<T>(row_by_sweeps<T, D>(a, r));
    } else {
      out[r] = static_cast<T>(row_by_trip<K, D>(a, r, team, scratch));
    }
  }
}

// ---- the split passes

template <class T>
void stats(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(a.out) + 3 * r;
    Stats side;
    if (dropped(a, r)) {
      side.top = 0.0;
    } else {
      const Flush flush;  // not of a maximum that is subnormal
      stats_sweep<T>(plain(a.student, r, buffers.s), a.vocab, kLog2E / a.temperature, side);
    }
    out[0] = static_cast<T>(side.top);
    out[1] = static_cast<T>(side.sum);
    out[2] = static_cast<T>(side.below);
  }
}

template <class T>
inline Stats stats_at(const void* stats, int64_t r) {
  const T* row = static_cast<const T*>(stats) + 3 * r;
  Stats side;
  side.top = static_cast<double>(row[0]);
  side.sum = static_cast<double>(row[1]);
  return side;
}

template <class T, class D>
void loss(const Args& a, int64_t begin, int64_t end) {
  const Flush flush;
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(a.out) + 2 * r;
    double value = 0.0, slope = 0.0;
    if (!dropped(a, r)) {
      const Stats s = stats_at<T>(a.stats_s, r), t = stats_at<T>(a.stats_t, r);
      if (degenerate(a, s.sum, t.sum, value)) {
        slope = value;
      } else {
        pair_sweep<T, D>(a, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t),
                         Sides<T>{Score<T>(s, c), Score<T>(t, c)}, value, slope);
      }
    }
    out[0] = static_cast<T>(value);
    out[1] = static_cast<T>(slope);
  }
}

template <class T, class D>
void grad(const Args& a, int64_t begin, int64_t end) {
  const Flush flush;
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      fill(a, r, 0, 0.0);
      continue;
    }
    const Stats s = stats_at<T>(a.stats_s, r), t = stats_at<T>(a.stats_t, r);
    double result;
    if (degenerate(a, s.sum, t.sum, result)) {
      finish(a, r, result);
      continue;
    }
    const Stats one = a.hard != 0.0 ? stats_at<T>(a.stats_hard, r) : s;
    const Slopes<T> slopes{{Score<T>(s, c), Score<T>(t, c)}, Score<T>(one, kLog2E),
                           static_cast<double>(static_cast<const T*>(a.slope)[r]),
                           scale_of<T>(a, r)};
    grad_sweep<T, D>(a, r, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t), slopes,
                     buffers.g);
  }
}

// x *= by, for the gradients that an upstream gradient other than 1 meets.
template <DType K>
inline void multiply_as(char* data, int64_t n, double by) {
  using T = typename Kind<K>::Acc;
  const T k = static_cast<T>(by);
  auto* x = reinterpret_cast<typename Kind<K>::Element*>(data);
  for (int64_t i = 0; i < n; ++i) x[i] = Kind<K>::narrow(Kind<K>::widen(x[i]) * k);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
