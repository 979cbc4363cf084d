// The fused trip where a row's columns are split over ranks: the same sweeps, in stages, with an
// exchange of a few numbers a row between each two (see fastkd/split.py, which sends them).
//
//   sum      the sums of the own columns                  -> RowSums, to every rank
//   rate     values and rates under the whole row's sums  -> Rates, to every rank
//   close    the row's loss, and the gradient of the own columns
//
// An expectation needs no second stage. The exponentials of a few rows at a time stay in memory from
// stage to stage. Every rank merges the same numbers in the same order, and so has the same bits.
#pragma once

#include "rows.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

inline int64_t slot(int64_t vocab, bool kept) {
  return (Scratch<float>::bytes(vocab, kept) + kLine - 1) / kLine * kLine;
}

template <class D>
inline bool keeps(const Args& a) {
  return D::expectation == Expectation::none || a.grad.data != nullptr;
}

template <class D>
inline Scratch<float> slot_of(const Args& a, int64_t r) {
  const bool kept = keeps<D>(a);
  return {a.memory + (r - a.first) * slot(a.vocab, kept), a.vocab, kept};
}

inline double base_of(float base) { return static_cast<double>(base); }

template <DType K, class D>
void sum_stage(const Args& a, int64_t begin, int64_t end, const Team& team) {
  constexpr Expectation E = D::expectation;
  const Flush flush;
  const double c = kLog2E / a.temperature;
  for (int64_t r = begin; r < end; ++r) {
    Part row;
    double label = 0.0;
    if (!dropped(a, r) && a.vocab > 0) {
      const Scratch<float> scratch = slot_of<D>(a, r);
      row = keeps<D>(a) ? first_trip<K, E, true>(a, r, c, team, scratch)
                        : first_trip<K, E, E == Expectation::none>(a, r, c, team, scratch);
      // now: an in-place gradient may have overwritten it by the time the others know it
      if (a.hard != 0.0) label = label_logit(a, r);
    }
    const auto to_float = [](double x) { return static_cast<float>(x); };
    static_cast<RowSums*>(a.sent)[r - a.first] = {row.s.sum,
                                                  row.t.sum,
                                                  row.hard.sum,
                                                  row.cross,
                                                  row.scores,
                                                  to_float(row.s.base),
                                                  to_float(row.t.base),
                                                  to_float(row.hard.base),
                                                  to_float(label),
                                                  to_float(row.columns),
                                                  row.strange};
  }
}

// What all ranks' columns add up to.
template <Expectation E>
inline Part merged(const Args& a, int64_t r, double& label) {
  const double c = rounded<float>(kLog2E / a.temperature), unit = rounded<float>(kLog2E);
  Part row{{c}, {c}, {unit}};
  label = 0.0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const RowSums& x = static_cast<const RowSums*>(a.sums)[rank * a.rows + (r - a.first)];
    Part part{{c, base_of(x.s_base), x.s}, {c, base_of(x.t_base), x.t},
              {unit, base_of(x.hard_base), x.hard}};
    part.cross = x.cross;
    part.scores = x.scores;
    part.columns = static_cast<double>(x.columns);
    part.strange = x.strange != 0;
    row.add<E>(part);
    label += static_cast<double>(x.label);
  }
  return row;
}

template <DType K, class D>
void rate_stage(const Args& a, int64_t begin, int64_t end, const Team& team) {
  const Flush flush;
  for (int64_t r = begin; r < end; ++r) {
    Rates& out = static_cast<Rates*>(a.sent)[r - a.first];
    out = {};
    if (dropped(a, r) || a.vocab == 0) continue;
    double label, result;
    Part row = merged<D::expectation>(a, r, label);
    if (row.strange || degenerate(a, row.s.sum, row.t.sum, result)) continue;
    const Scratch<float> scratch = slot_of<D>(a, r);
    const float from = a.grad.data == nullptr ? 0.0f : top_rate<float, D>(a, scratch, row);
    rates_trip<float, D>(a, team, scratch, row, from);
    out.value = row.value;
    out.slope = row.slope;
    out.from = static_cast<double>(from);
    for (int64_t at = 0; at < a.vocab; at += kBlock)
      out.mass += scratch.blocks[at / kBlock].s_sum * ToProbability(scratch, at, row).q;
  }
}

// Puts a row's value and slope together, the slope relative to the own `from`; returns that.
inline double add_rates(const Args& a, int64_t r, Part& row) {
  const auto* rates = static_cast<const Rates*>(a.rates) + (r - a.first);
  const Rates* heaviest = rates;
  for (int64_t rank = 1; rank < a.ranks; ++rank)
    if (rates[rank * a.rows].mass > heaviest->mass) heaviest = rates + rank * a.rows;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const Rates& x = rates[rank * a.rows];
    row.value += x.value;
    row.slope += x.slope + (x.from - heaviest->from) * x.mass;
  }
  const double own = rates[a.rank * a.rows].from;
  row.slope += heaviest->from - own;
  return own;
}

// The gradient of a row whose factors are beyond float, by the general sweep.
template <class D>
__attribute__((noinline)) void steep_gradient(const Args& a, int64_t r, const Part& row,
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
                             Score<float>(stats(a.hard != 0.0 ? row.hard : row.s), kLog2E),
                             slope,
                             scale_of<float>(a, r)};
  grad_sweep<float, D>(a, r, plain(a.student, r, buffers.s), plain(a.teacher, r, buffers.t), slopes,
                       buffers.g);
}

template <DType K, class D>
void close_stage(const Args& a, int64_t begin, int64_t end, const Team& team) {
  constexpr Expectation E = D::expectation;
  const Flush flush;
  float* out = static_cast<float*>(a.out);
  for (int64_t r = begin; r < end; ++r) {
    double label, result = 0.0, from = 0.0;
    a.redo[r] = 0;
    out[r] = 0;
    if (dropped(a, r)) {
      finish(a, r, 0.0);
      continue;
    }
    Part row = merged<E>(a, r, label);
    if (!row.strange && degenerate(a, row.s.sum, row.t.sum, result)) {
      out[r] = static_cast<float>(result);
      finish(a, r, result);
      continue;
    }
    if (E == Expectation::none && !row.strange) from = add_rates(a, r, row);
    if (row.strange || !expected<E>(row)) {
      a.redo[r] = 1;
      continue;
    }
    out[r] = static_cast<float>(loss_of<float>(a, row, label));
    if (a.grad.data == nullptr) continue;
    if (a.vocab == 0) {
      finish(a, r, 0.0);
    } else if (steep<float>(a, r, row)) {
      steep_gradient<D>(a, r, row, row.slope + from);
    } else {
      gradient_of<K, E>(a, r, team, slot_of<D>(a, r), row);
    }
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
