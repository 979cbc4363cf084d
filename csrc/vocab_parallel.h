// The fused trip where a row's columns are split over ranks: the same sweeps, in stages, with an
// exchange of a few numbers a row between each two (see fastkd/parallel/vocab_parallel.py, which sends them).
//
//   sum      the sums of the own columns                  -> RowSums or WeighedSums, to every rank
//   rate     values and rates under the whole row's sums  -> Rates, to every rank
//   close    the row's loss, and the gradient of the own columns
//
// An expectation needs no second stage. The exponentials of a few rows at a time stay in memory from
// stage to stage. Every rank merges the same numbers in the same order, and so has the same bits.
#pragma once

#include "passes.h"

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

template <Expectation E>
using SumsOf = std::conditional_t<E == Expectation::none, RowSums, WeighedSums>;
inline RowSums& shared(RowSums& x) { return x; }
inline const RowSums& shared(const RowSums& x) { return x; }
inline RowSums& shared(WeighedSums& x) { return x.row; }
inline const RowSums& shared(const WeighedSums& x) { return x.row; }

template <Expectation E>
inline const SumsOf<E>& sums_of(const Args& a, int64_t rank, int64_t r) {
  return static_cast<const SumsOf<E>*>(a.sums)[rank * a.rows + (r - a.first)];
}

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
    SumsOf<E>& out = static_cast<SumsOf<E>*>(a.sent)[r - a.first];
    shared(out) = {row.s.sum,
                   row.t.sum,
                   row.hard.sum,
                   to_float(row.s.base),
                   to_float(row.t.base),
                   to_float(row.hard.base),
                   to_float(label),
                   to_float(row.scores),
                   row.strange ? -1.0f : to_float(row.columns)};
    if constexpr (E != Expectation::none) out.cross = row.cross;
  }
}

// What all ranks' columns add up to.
template <Expectation E>
inline Part merged(const Args& a, int64_t r, double& label) {
  const double c = rounded<float>(kLog2E / a.temperature), unit = rounded<float>(kLog2E);
  Part row{{c}, {c}, {unit}};
  label = 0.0;
  for (int64_t rank = 0; rank < a.ranks; ++rank) {
    const RowSums& x = shared(sums_of<E>(a, rank, r));
    const auto wide = [](float base) { return static_cast<double>(base); };
    Part part{{c, wide(x.s_base), x.s}, {c, wide(x.t_base), x.t}, {unit, wide(x.hard_base), x.hard}};
    if constexpr (E != Expectation::none) part.cross = sums_of<E>(a, rank, r).cross;
    part.scores = wide(x.scores);
    part.columns = wide(x.columns);
    part.strange = x.columns < 0.0f;
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
    const Top<float> top =
        a.grad.data == nullptr ? Top<float>{centred<D>(static_cast<float>(a.param))}
                               : top_rate<float, D>(a, scratch, row);
    rates_trip<float, D>(a, team, scratch, row, top.origin);
    out = {row.value, static_cast<float>(row.slope), top.rate};
  }
}

// Puts a row's value and slope together, the slope relative to the own `from`; returns that.
inline double add_rates(const Args& a, int64_t r, Part& row) {
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
