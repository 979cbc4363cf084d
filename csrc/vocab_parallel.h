// The vocabulary-parallel fused pass: each rank holds some columns of every row. The loops are
// those of pass_fused.h, cut into steps. Between two steps the ranks exchange a few numbers per row
// (fastkd/parallel/vocab_parallel.py sends them).
//
//   sum      sums of the rank's own columns                 -> RowSums or ExpectationSums
//   rate     values and rates, given the whole row's sums   -> Rates
//   close    the loss of the row, and the gradient of the own columns
//
// An expectation skips the step `rate`. The exponentials of a few rows stay in memory between
// steps. Every rank adds the same numbers in the same order, so all ranks have the same bits.
#pragma once

#include "passes.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

inline int64_t step_bytes(int64_t vocab, bool kept) {
  return (Scratch<float>::bytes(vocab, kept) + kLine - 1) / kLine * kLine;
}

template <class D>
inline bool keeps(const Args& a) {
  return D::expectation == Expectation::none || a.grad.data != nullptr;
}

template <class D>
inline Scratch<float> step_scratch(const Args& a, int64_t r) {
  const bool kept = keeps<D>(a);
  return {a.memory + (r - a.first) * step_bytes(a.vocab, kept), a.vocab, kept};
}

template <Expectation E>
using SumsOf = std::conditional_t<E == Expectation::none, RowSums, ExpectationSums>;
inline RowSums& row_sums(RowSums& x) { return x; }
inline const RowSums& row_sums(const RowSums& x) { return x; }
inline RowSums& row_sums(ExpectationSums& x) { return x.row; }
inline const RowSums& row_sums(const ExpectationSums& x) { return x.row; }

template <Expectation E>
inline const SumsOf<E>& sums_of(const Args& a, int64_t rank, int64_t r) {
  return static_cast<const SumsOf<E>*>(a.sums)[rank * a.rows + (r - a.first)];
}

template <DType K, class D>
void sum_step(const Args& a, int64_t begin, int64_t end, const ThreadPool& pool) {
  constexpr Expectation E = D::expectation;
  const Flush flush;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    Partial row;
    double label = 0.0;
    if (!dropped(a, r) && a.vocab > 0) {
      const Scratch<float> scratch = step_scratch<D>(a, r);
      row = keeps<D>(a) ? sum_chunks<K, E, true>(a, r, c, pool, scratch)
                        : sum_chunks<K, E, E == Expectation::none>(a, r, c, pool, scratch);
      // read now: by the last step an in-place gradient may have overwritten it
      if (a.hard != 0.0) label = label_logit(a, r);
    }
    const auto to_float = [](double x) { return static_cast<float>(x); };
    SumsOf<E>& out = static_cast<SumsOf<E>*>(a.sent)[r - a.first];
    row_sums(out) = {row.s.sum,
                     row.t.sum,
                     row.hard.sum,
                     to_float(row.s.base),
                     to_float(row.t.base),
                     to_float(row.hard.base),
                     to_float(label),
                     to_float(row.scores),
                     row.out_of_range ? -1.0f : to_float(row.columns)};
    if constexpr (E != Expectation::none) out.cross = row.cross;
  }
}

// The sums of the whole row, over all ranks.
template <Expectation E>
inline Partial merged(const Args& a, int64_t r, double& label) {
  const double c = rounded<float>(kLog2E / a.temperature), c_t1 = rounded<float>(kLog2E);
  Partial row{{c}, {c}, {c_t1}};
  label = 0.0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const RowSums& x = row_sums(sums_of<E>(a, rank, r));
    const auto wide = [](float base) { return static_cast<double>(base); };
    Partial partial{
        {c, wide(x.s_base), x.s}, {c, wide(x.t_base), x.t}, {c_t1, wide(x.hard_base), x.hard}};
    if constexpr (E != Expectation::none) partial.cross = sums_of<E>(a, rank, r).cross;
    partial.scores = wide(x.scores);
    partial.columns = wide(x.columns);
    partial.out_of_range = x.columns < 0.0f;
    row.add<E>(partial);
    label += static_cast<double>(x.label);
  }
  return row;
}

template <DType K, class D>
void rate_step(const Args& a, int64_t begin, int64_t end, const ThreadPool& pool) {
  const Flush flush;
  for (int64_t r = begin; r < end; ++r) {
    Rates& out = static_cast<Rates*>(a.sent)[r - a.first];
    out = {};
    if (dropped(a, r) || a.vocab == 0) continue;
    double label, result;
    Partial row = merged<D::expectation>(a, r, label);
    if (row.out_of_range || degenerate(a, row.s.sum, row.t.sum, result)) continue;
    const Scratch<float> scratch = step_scratch<D>(a, r);
    const Top<float> top = a.grad.data == nullptr
                               ? Top<float>{centred<D>(static_cast<float>(a.param))}
                               : top_rate<float, D>(a, scratch, row);
    rate_chunks<float, D>(a, pool, scratch, row, top.origin);
    out = {row.value, static_cast<float>(row.slope), top.rate};
  }
}

// Adds up the row's value and slope. The slope is relative to the rank's own `from`, which is
// returned.
inline double add_rates(const Args& a, int64_t r, Partial& row) {
  const auto rates = [&](int64_t rank) {
    return static_cast<const Rates*>(a.rates)[rank * a.rows + (r - a.first)];
  };
  const auto from = [&](int64_t rank) { return static_cast<double>(rates(rank).from); };
  const auto mass = [&](int64_t rank) {  // of the student's probability
    const RowSums& x = sums_of<Expectation::none>(a, rank, r);
    return x.s * ToProbability::factor(row.s, static_cast<double>(x.s_base));
  };
  int64_t heaviest = 0;
  for (int64_t rank = 1; rank < a.ranks; ++rank)
    if (mass(rank) > mass(heaviest)) heaviest = rank;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const Rates x = rates(rank);
    row.value += x.value;
    row.slope += static_cast<double>(x.slope) + (from(rank) - from(heaviest)) * mass(rank);
  }
  row.slope += from(heaviest) - from(a.rank);
  return from(a.rank);
}

// The gradient of a row whose factors overflow a float, by the general loop.
template <class D>
__attribute__((noinline)) void general_gradient(const Args& a, int64_t r, const Partial& row,
                                                double slope) {
  Buffers<float> buffers;
  const auto stats = [](const Side& side) {
    Stats out;
    out.top = -side.base;
    out.sum = side.sum;
    return out;
  };
  const double c = kLog2E / a.temperature;
  const Slopes<float> slopes{{Score<float>(stats(row.s), c), Score<float>(stats(row.t), c)},
                             Score<float>(stats(a.at_one() ? row.hard : row.s), kLog2E),
                             slope,
                             row.by,
                             row.hard.log_sum(),
                             scale_of<float>(a, r)};
  grad_loop<float, D>(a, r, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t), slopes,
                      buffers.g);
}

template <DType K, class D>
void close_step(const Args& a, int64_t begin, int64_t end, const ThreadPool& pool) {
  constexpr Expectation E = D::expectation;
  const Flush flush;
  float* out = static_cast<float*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    double label, result = 0.0, from = 0.0;
    a.redo[r] = 0;
    out[r] = 0;
    if (dropped(a, r)) {
      fill_gradient(a, r, 0.0);
      continue;
    }
    Partial row = merged<E>(a, r, label);
    if (!row.out_of_range && degenerate(a, row.s.sum, row.t.sum, result)) {
      out[r] = static_cast<float>(result);
      fill_gradient(a, r, result);
      continue;
    }
    if (E == Expectation::none && !row.out_of_range) from = add_rates(a, r, row);
    if (row.out_of_range || !expectation_value<E>(row)) {
      a.redo[r] = 1;
      continue;
    }
    close_value<float, D>(row);
    out[r] = static_cast<float>(row_loss<float>(a, row, label));
    if (a.grad.data == nullptr) continue;
    if (a.vocab == 0) {
      fill_gradient(a, r, 0.0);
    } else if (too_steep<float>(a, r, row)) {
      general_gradient<D>(a, r, row, row.slope + from);
    } else {
      row_gradient<K, E>(a, r, pool, step_scratch<D>(a, r), row);
    }
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
