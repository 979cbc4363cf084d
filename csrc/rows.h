// The passes over rows, made of the sweeps over one (see fastkd/backend.py for what they owe).
#pragma once

#include "sweeps.h"

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
inline double cross_entropy(const Args& a, int64_t r, const Side& s, const Hard& hard,
                            const Reader<T>& student) {
  const int64_t label = a.label[r];
  T at_label = 0;
  if (label >= 0 && label < a.vocab) at_label = *load(student.row, student.dtype, label, 1, student.buffer);
  const double log_sum = __builtin_log(hard.sum);
  double loss = (1.0 - a.smoothing) * ((s.top - static_cast<double>(at_label)) + log_sum);
  if (a.smoothing != 0.0)
    loss += a.smoothing * (log_sum - hard.below / static_cast<double>(a.classes));
  return loss;
}

template <class T, class D>
void fused(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  const bool with_grad = a.grad.data != nullptr;
  const bool keeps = with_grad && D::expectation != Expectation::none;
  const Memory<T> memory(keeps ? a.vocab : Memory<T>::kMost + 1);
  T* out = static_cast<T*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      out[r] = 0;
      if (with_grad) fill(a, r, 0, 0.0);
      continue;
    }
    const Reader<T> student{a.student.row(r), a.student.dtype, buffers.s};
    const Reader<T> teacher{a.teacher.row(r), a.teacher.dtype, buffers.t};
    Side s, t;
    Hard hard;
    double cross = 0.0;
    first_sweep<T, D::expectation>(a, student, teacher, c, memory, s, t, cross, hard);
    if (s.empty() || t.empty()) {
      // two impossible sides differ in nothing; one is no distribution, nor has it a label
      const double result = s.empty() && t.empty() && a.hard == 0.0 ? 0.0 : kNaN;
      out[r] = static_cast<T>(result);
      if (with_grad) fill(a, r, 0, result);
      continue;
    }
    double value = 0.0, slope = 0.0;
    const Score<T> q_of(s, c), p_of(t, c);
    if constexpr (D::expectation == Expectation::none) {
      pair_sweep<T, D>(a, student, teacher, q_of, p_of, value, slope);
    } else {
      constexpr bool of_t = D::expectation == Expectation::teacher;
      const Side& w = of_t ? t : s;
      const Side& other = of_t ? s : t;
      value = cross / w.sum * kLn2 + (__builtin_log(other.sum) - __builtin_log(w.sum));
      if (value - value != 0.0) {
        // infinite or NaN: an impossible column weighed under an early maximum may yet have no
        // weight under the row's, which only the pair, with that maximum in hand, knows
        value = 0.0;
        pair_sweep<T, D>(a, student, teacher, q_of, p_of, value, slope);
      }
      slope = of_t ? 0.0 : value;  // sum of q - p, or of the value itself
    }
    double loss = a.soft * value;
    if (a.hard != 0.0) loss += a.hard * cross_entropy(a, r, s, hard, student);
    out[r] = static_cast<T>(loss);
    if (!with_grad) continue;
    Side one = s;
    one.sum = hard.sum;
    const Slopes<T> slopes{q_of, p_of, Score<T>(one, kLog2E), slope, scale_of<T>(a, r)};
    if constexpr (D::expectation != Expectation::none) {
      if (memory.es != nullptr) {
        grad_sweep<T, D>(a, r, student, teacher, slopes, buffers.g, false,
                         [&](int64_t at, const T*, const T*) {
                           return Kept<T, D::expectation>(memory, at, s, t, c);
                         });
        continue;
      }
    }
    fresh_grad_sweep<T, D>(a, r, student, teacher, slopes, buffers.g);
  }
}

template <class T>
void stats(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(a.out) + 3 * r;
    Side side;
    double below = 0.0;
    if (dropped(a, r)) {
      side.top = 0.0;
    } else {
      const Reader<T> read{a.student.row(r), a.student.dtype, buffers.s};
      stats_sweep(read, a.vocab, kLog2E / a.temperature, side, below);
    }
    out[0] = static_cast<T>(side.top);
    out[1] = static_cast<T>(side.sum);
    out[2] = static_cast<T>(below);
  }
}

template <class T>
inline Side side_of(const void* stats, int64_t r) {
  const T* row = static_cast<const T*>(stats) + 3 * r;
  Side side;
  side.top = row[0];
  side.sum = row[1];
  return side;
}

template <class T, class D>
void loss(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(a.out) + 2 * r;
    double value = 0.0, slope = 0.0;
    if (!dropped(a, r)) {
      const Side s = side_of<T>(a.stats_s, r), t = side_of<T>(a.stats_t, r);
      const Reader<T> student{a.student.row(r), a.student.dtype, buffers.s};
      const Reader<T> teacher{a.teacher.row(r), a.teacher.dtype, buffers.t};
      if (s.empty() != t.empty()) {
        value = slope = kNaN;
      } else if (!s.empty()) {
        pair_sweep<T, D>(a, student, teacher, Score<T>(s, c), Score<T>(t, c), value, slope);
      }
    }
    out[0] = static_cast<T>(value);
    out[1] = static_cast<T>(slope);
  }
}

template <class T, class D>
void grad(const Args& a, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    if (dropped(a, r)) {
      fill(a, r, 0, 0.0);
      continue;
    }
    const Side s = side_of<T>(a.stats_s, r), t = side_of<T>(a.stats_t, r);
    if (s.empty() || t.empty()) {
      fill(a, r, 0, s.empty() && t.empty() && a.hard == 0.0 ? 0.0 : kNaN);
      continue;
    }
    const Reader<T> student{a.student.row(r), a.student.dtype, buffers.s};
    const Reader<T> teacher{a.teacher.row(r), a.teacher.dtype, buffers.t};
    const Side one = a.hard != 0.0 ? side_of<T>(a.stats_hard, r) : s;
    const Slopes<T> slopes{Score<T>(s, c), Score<T>(t, c), Score<T>(one, kLog2E),
                           static_cast<double>(static_cast<const T*>(a.slope)[r]),
                           scale_of<T>(a, r)};
    fresh_grad_sweep<T, D>(a, r, student, teacher, slopes, buffers.g);
  }
}

// x *= by, for the gradients that an upstream gradient other than 1 meets.
template <class T>
inline void multiply_as(char* data, DType dtype, int64_t n, double by) {
  alignas(64) T buffer[kBlock];
  const T k = static_cast<T>(by);
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = least(kBlock, n - at);
    const T* x = load(data, dtype, at, m, buffer);
    T* y = target(data, dtype, at, m, buffer);
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) y[i] = x[i] * k;
    if (y == buffer) store(buffer, data, dtype, at, m);
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
