// The slow form of the top-k pass: column by column, in double. It takes the rows that the fast
// form in topk.h does not fit.
#pragma once

#include "topk_points.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// The columns of a student's row, in double.
struct Columns {
  const Args& a;
  int64_t r;

  // f(column, logit, whether it is on the support) for each column.
  template <class F>
  void each(F f) const {
    const char* row = a.student.row(r);
    const int64_t* at = support_of(a, r);
    double block[kBlock];
    bool on_support[kBlock];
    for (int64_t from = 0; from < a.vocab; from += kBlock) {
      const int64_t n = least(kBlock, a.vocab - from);
      widen_any(row, a.student.dtype, from, n, block);
      for (int64_t i = 0; i < n; ++i) on_support[i] = false;
      for (int64_t i = 0; i < a.k; ++i)
        if (at[i] >= from && at[i] < from + n) on_support[at[i] - from] = true;
      for (int64_t i = 0; i < n; ++i) f(from + i, block[i], on_support[i]);
    }
  }
};

// Sums of the student's exponentials; those off the support have a maximum of their own.
struct ColumnSums {
  double shift = 0.0, shift_off = 0.0;  // minus the maximum: of the row, and off the support
  double tail = 0.0, hard = 0.0;        // exponentials off the support, and of the row at T = 1
  double scores = 0.0;                  // for label smoothing
  double weighted = 0.0;                // the row's exponentials times their scores
  double not_finite = 0.0;              // NaN where the row holds a NaN or +inf

  Side at_one() const { return {kLog2E, shift, hard}; }

  ColumnSums(const Args& a, const Columns& columns, double c) {
    double top = -kInfinity, top_off = -kInfinity;
    columns.each([&](int64_t, double x, bool on_support) {
      if (x > top) top = x;
      if (!on_support && x > top_off) top_off = x;
      not_finite += x == -kInfinity ? 0.0 : x - x;
    });
    shift = top == -kInfinity ? 0.0 : -top;
    shift_off = top_off == -kInfinity ? shift : -top_off;
    columns.each([&](int64_t, double x, bool on_support) {
      if (!on_support) tail += exp2((x + shift_off) * c);
      const double y = (x + shift) * c, e = a.outputs == nullptr ? 0.0 : exp2(y);
      if (e != 0.0) weighted += e * y;
      if (a.at_one()) {
        hard += exp2((x + shift) * kLog2E);
        scores += (x + shift) * kLog2E;
      }
    });
  }
};

template <class T>
inline void gradient_by_columns(const Args& a, int64_t r, const Columns& columns,
                                const ColumnSums& sums, double c, double scale,
                                const Workspace<T>& w) {
  const Factors f(a, r, scale, 1.0, sums.at_one().log_sum());
  const double of_q = a.restricted ? 0.0 : -w.points.sum / w.points.total;
  const double of_tail = a.restricted || sums.tail == 0.0 ? 0.0 : w.points.tail_slope / sums.tail;
  char* to = a.grad.row(r);
  columns.each([&](int64_t column, double x, bool on_support) {
    if (on_support) return;  // its logit, in place, is needed no more
    double g = f.k * (of_q * exp2((x + sums.shift) * c) + of_tail * exp2((x + sums.shift_off) * c));
    if (a.at_one()) {
      g += f.h * (exp2((x + sums.shift) * kLog2E) / sums.hard) - f.uniform;
      if (column == f.column) g -= f.label;
    }
    narrow_any(&g, to, a.grad.dtype, column, 1);
  });
  write_support(a, r, w, f, sums.shift, sums.hard);
  fill(a, r, a.vocab, 0.0);
}

template <class T>
__attribute__((noinline)) double topk_row_by_columns(const Args& a, int64_t r, Workspace<T>& w) {
  const double c = kLog2E / a.temperature;
  const Columns columns{a, r};
  const ColumnSums sums(a, columns, c);
  if (a.restricted) {
    place_restricted(a, w);
  } else {
    // The tail's share of the row may underflow, so its logarithm is computed by itself.
    const double apart = (sums.shift_off - sums.shift) * c;  // >= 0, in bits
    place_student(a, w, sums.shift, c, sums.tail * exp2(-apart));
    if (sums.tail > 0.0)
      w.points.tail_logq =
          ((__builtin_log2(sums.tail) - apart) - __builtin_log2(w.points.total)) * kLn2;
  }
  const bool finite = sums.not_finite == sums.not_finite;
  const double total = finite ? w.points.total : kNaN;
  const Softmax student{-sums.shift, a.restricted ? 0.0 : total, sums.weighted};
  const Outputs<T> outputs(a, r);
  if (outputs && a.hard != 0.0)
    outputs.hard(a.label[r], __builtin_log2(sums.hard), (label_logit(a, r) + sums.shift) * kLog2E,
                 sums.scores);
  double result;
  if (degenerate(a, total, teacher_mass(w.points), result)) {
    point_outputs(a, r, w, student, result);
    fill_gradient(a, r, result);
    return result;
  }
  a.points(w.points);
  point_outputs(a, r, w, student, w.points.value);
  double loss = a.soft * w.points.value;
  loss += loss_at_one(a, r, sums.at_one(), sums.scores);
  if (a.grad.data == nullptr) return loss;
  const double scale = scale_of<T>(a, r);
  if (scale != scale || loss != loss) {
    fill_gradient(a, r, kNaN);
    return loss;
  }
  gradient_by_columns(a, r, columns, sums, c, scale, w);
  return loss;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
