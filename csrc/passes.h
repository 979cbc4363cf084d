// The passes over rows, made of the loops over one row. fastkd/backends/base.py says what a pass
// must compute.
#pragma once

#include "outputs.h"
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

// f(chunk) for each chunk of a row. With several threads, a thread gets the same chunks each time,
// so that they are in its cache. One thread goes `backwards` where the last chunks are still
// cached.
template <class F>
inline void each_chunk(const ThreadPool& pool, int64_t vocab, bool backwards, F f) {
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  if (pool.threads <= 1 || chunks == 1) {
    for (int64_t i = 0; i < chunks; ++i) f(backwards ? chunks - 1 - i : i);
    return;
  }
  pool.run(
      pool.threads, chunks,
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

// Whether the sums s and t of exponentials do not give two distributions. `result` is then the
// row's loss: NaN for NaN and for one impossible side (all -inf); 0 for two impossible sides,
// unless there is a term at T = 1.
inline bool degenerate(const Args& a, double s, double t, double& result) {
  if (s > 0.0 && t > 0.0 && s + t < kInfinity) return false;
  result = s == 0.0 && t == 0.0 && !a.at_one() ? 0.0 : kNaN;
  return true;
}

// Fills the gradient of a degenerate or dropped row.
inline void fill_gradient(const Args& a, int64_t r, double result) {
  if (a.grad.data != nullptr) fill(a, r, 0, result);
}

// The fused pass of a row by the general loops, from exact maxima. It takes the rows that are
// beyond the bounds of the fused loops.
template <class T, class D>
__attribute__((noinline)) double general_row(const Args& a, int64_t r) {
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  const Plain<T> student = plain(a.student, r, buffers.s), teacher = plain(a.teacher, r, buffers.t);
  Stats s, t, stats_t1;
  stats_loop<T>(student, a.vocab, c, s);
  stats_loop<T>(teacher, a.vocab, c, t);
  if (a.at_one()) stats_loop<T>(student, a.vocab, kLog2E, stats_t1);
  const Outputs<T> outputs(a, r);
  if (outputs) {
    outputs.student({s.shift(), s.sum, weighted_loop<T>(student, a.vocab, c, s)});
    outputs.teacher({t.shift(), t.sum, weighted_loop<T>(teacher, a.vocab, c, t)});
    if (a.hard != 0.0)
      outputs.hard(a.label[r], __builtin_log2(stats_t1.sum),
                   (label_logit(a, r) - stats_t1.top) * kLog2E, stats_t1.below * kLog2E);
  }
  double value = 0.0, slope = 0.0;
  if (degenerate(a, s.sum, t.sum, value)) {
    if (outputs) outputs.soft(value);
    fill_gradient(a, r, value);
    return value;
  }
  const Sides<T> sides{Score<T>(s, c), Score<T>(t, c)};
  pair_loop<T, D>(a, student, teacher, sides, value, slope);
  const OfSum of = of_sum<T>(D{}, value);
  if (outputs) outputs.soft(of.loss);
  double loss = a.soft * of.loss;
  if (a.hard != 0.0) {
    const double log_sum = __builtin_log(stats_t1.sum);
    loss += a.hard * (1.0 - a.smoothing) * ((stats_t1.top - label_logit(a, r)) + log_sum);
    if (a.smoothing != 0.0)
      loss += a.hard * a.smoothing * (log_sum - stats_t1.below / static_cast<double>(a.classes));
  }
  if (a.z != 0.0) loss += a.z * stats_t1.log_sum() * stats_t1.log_sum();
  if (a.grad.data != nullptr) {
    const Slopes<T> slopes{sides,
                           Score<T>(a.at_one() ? stats_t1 : s, kLog2E),
                           slope,
                           of.by,
                           stats_t1.log_sum(),
                           scale_of<T>(a, r)};
    grad_loop<T, D>(a, r, student, teacher, slopes, buffers.g);
  }
  return loss;
}

// ---- the fused pass, over the chunks of a row

template <DType K, Expectation E, bool Keep>
inline Partial sum_chunks(const Args& a, int64_t r, double c, const ThreadPool& pool,
                          const Scratch<typename Kind<K>::Acc>& scratch) {
  each_chunk(pool, a.vocab, false, [&](int64_t chunk) {
    auto loop = a.at_one() ? fused_sum_loop<K, E, true, Keep, false>
                           : fused_sum_loop<K, E, false, Keep, false>;
    if constexpr (Keep) {
      if (a.outputs != nullptr)
        loop = a.at_one() ? fused_sum_loop<K, E, true, true, true>
                          : fused_sum_loop<K, E, false, true, true>;
    }
    loop(a, r, c, chunk, scratch, scratch.partials[chunk]);
  });
  Partial row = scratch.partials[0];
  for (int64_t i = 1; i * kChunk < a.vocab; ++i) row.add<E>(scratch.partials[i]);
  return row;
}

template <DType K, Expectation E>
inline void gradient_chunks(const Args& a, int64_t r, const ThreadPool& pool,
                            const Scratch<typename Kind<K>::Acc>& scratch, const Partial& row,
                            double scale) {
  using T = typename Kind<K>::Acc;
  const Factors f(a, r, scale, row.by, row.hard.log_sum());
  const bool stream = a.stream && can_stream<Vec<T>>(a.grad.row(r));
  each_chunk(pool, a.vocab, true, [&](int64_t chunk) {
    const auto loop =
        a.at_one()
            ? (stream ? fused_grad_loop<K, E, true, true> : fused_grad_loop<K, E, true, false>)
            : (stream ? fused_grad_loop<K, E, false, true> : fused_grad_loop<K, E, false, false>);
    loop(a, r, chunk, scratch, row, f);
  });
  fill(a, r, a.vocab, 0.0);
}

// Values and slopes of a divergence that is no expectation, from the exponentials.
template <class T, class D>
inline void rate_chunks(const Args& a, const ThreadPool& pool, const Scratch<T>& scratch,
                        Partial& row, Origin<T> origin) {
  each_chunk(pool, a.vocab, false, [&](int64_t chunk) {
    rate_loop<T, D>(a, chunk, scratch, row, origin, scratch.partials[chunk]);
  });
  for (int64_t i = 0; i * kChunk < a.vocab; ++i) {
    row.value += scratch.partials[i].value;
    row.slope += scratch.partials[i].slope;
  }
}

// Sets the value and slope of an expectation from the row's sums. False where the value is infinite
// or NaN: an impossible column may have had weight under an early base, and have none under the
// row's. Only the general loops, with exact maxima, can tell.
template <Expectation E>
inline bool expectation_value(Partial& row) {
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

// Turns the row's sum of values into its loss, once all values are added.
template <class T, class D>
inline void close_value(Partial& row) {
  const OfSum of = of_sum<T>(D{}, row.value);
  row.value = of.loss;
  row.by = of.by;
}

// Whether factors overflow a float, as for T = 1e-18 and distant logits. They would turn columns
// without weight into NaN.
template <class T>
inline bool too_steep(const Args& a, int64_t r, const Partial& row) {
  const double k = __builtin_fabs(scale_of<T>(a, r) * a.soft / a.temperature * row.by);
  return k > kMostShift || k * __builtin_fabs(row.slope) > kMostShift;
}

template <class T>
inline double row_loss(const Args& a, const Partial& row, double at_label) {
  double loss = a.soft * row.value;
  if (a.hard != 0.0) {
    const double log_sum = __builtin_log2(row.hard.sum);
    const double label = row.hard.scale<T>().of(at_label);
    loss += a.hard * kLn2 * (1.0 - a.smoothing) * (log_sum - label);
    if (a.smoothing != 0.0)
      loss += a.hard * kLn2 * a.smoothing * (log_sum - row.scores / static_cast<double>(a.classes));
  }
  if (a.z != 0.0) loss += a.z * row.hard.log_sum() * row.hard.log_sum();
  return loss;
}

template <DType K, Expectation E>
inline void row_gradient(const Args& a, int64_t r, const ThreadPool& pool,
                         const Scratch<typename Kind<K>::Acc>& scratch, const Partial& row) {
  const double scale = scale_of<typename Kind<K>::Acc>(a, r);
  if (scale != scale) {
    fill_gradient(a, r, kNaN);
  } else {
    gradient_chunks<K, E>(a, r, pool, scratch, row, scale);
  }
}

template <DType K, class D>
inline double fused_row(const Args& a, int64_t r, const ThreadPool& pool,
                        const Scratch<typename Kind<K>::Acc>& scratch) {
  using T = typename Kind<K>::Acc;
  constexpr Expectation E = D::expectation;
  const double c = kLog2E / a.temperature;
  const bool grad = a.grad.data != nullptr;
  const Outputs<T> outputs(a, r);
  Partial row = E == Expectation::none || grad || outputs
                    ? sum_chunks<K, E, true>(a, r, c, pool, scratch)
                    : sum_chunks<K, E, E == Expectation::none>(a, r, c, pool, scratch);
  if (row.out_of_range) return general_row<T, D>(a, r);
  const double label = a.hard != 0.0 ? label_logit(a, r) : 0.0;
  if (outputs) {
    outputs.student({-row.s.shift(), row.s.sum, row.s.weighted});
    outputs.teacher({-row.t.shift(), row.t.sum, row.t.weighted});
    if (a.hard != 0.0)
      outputs.hard(a.label[r], __builtin_log2(row.hard.sum), row.hard.scale<T>().of(label),
                   row.scores);
  }
  double result;
  if (degenerate(a, row.s.sum, row.t.sum, result)) {
    if (outputs) outputs.soft(result);
    fill_gradient(a, r, result);
    return result;
  }
  if constexpr (E == Expectation::none)
    rate_chunks<T, D>(
        a, pool, scratch, row,
        grad ? top_rate<T, D>(a, scratch, row).origin : centred<D>(static_cast<T>(a.param)));
  if (!expectation_value<E>(row)) return general_row<T, D>(a, r);
  close_value<T, D>(row);
  if (grad && too_steep<T>(a, r, row)) return general_row<T, D>(a, r);
  if (outputs) outputs.soft(row.value);
  const double loss = row_loss<T>(a, row, label);
  if (grad) row_gradient<K, E>(a, r, pool, scratch, row);
  return loss;
}

template <DType K, class D>
void fused(const Args& a, int64_t begin, int64_t end, const ThreadPool& pool) {
  using T = typename Kind<K>::Acc;
  const Flush flush;
  const Scratch<T> scratch(a.vocab);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      out[r] = 0;
      Outputs<T>(a, r).zero();
      fill_gradient(a, r, 0.0);
    } else if (scratch.kept == nullptr) {
      out[r] = static_cast<T>(general_row<T, D>(a, r));
    } else {
      out[r] = static_cast<T>(fused_row<K, D>(a, r, pool, scratch));
    }
  }
}

// ---- the passes stats, loss and grad

template <class T>
void stats(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(a.out) + 3 * r;
    Stats side;
    if (dropped(a, r)) {
      side.top = 0.0;
    } else {
      const Flush flush;  // its end comes before `top` is stored: a subnormal maximum stays
      stats_loop<T>(plain(a.student, r, buffers.s), a.vocab, kLog2E / a.temperature, side);
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
        pair_loop<T, D>(a, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t),
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
      fill_gradient(a, r, result);
      continue;
    }
    const Stats stats_t1 = a.at_one() ? stats_at<T>(a.stats_hard, r) : s;
    const T* pairs = static_cast<const T*>(a.pairs) + 2 * r;
    const Slopes<T> slopes{{Score<T>(s, c), Score<T>(t, c)},
                           Score<T>(stats_t1, kLog2E),
                           static_cast<double>(pairs[1]),
                           of_sum<T>(D{}, static_cast<double>(pairs[0])).by,
                           stats_t1.log_sum(),
                           scale_of<T>(a, r)};
    grad_loop<T, D>(a, r, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t), slopes,
                    buffers.g);
  }
}

// x *= by: a gradient whose upstream gradient is not 1.
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
