// The definitions: every divergence as a sum over columns, differentiated by arithmetic on (value,
// derivative) pairs, in a wider type than the kernels'. Nothing here is theirs but the names.
//
// p is the teacher, q the student. Beside each number stands how far a computation in the type T of
// the kernels may be from it: the change when every log-probability moves by a few units in the
// last place of T, and when a probability below T's normal numbers counts as 0.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "values.h"

namespace check {

// Units in the last place of T that a log-probability may be wrong by, relative to its size and to
// spread(n) of a row of n columns: the shift, the scale, exp2 and log are one to three each, a sum
// of n rounded terms a few more as n grows. A logarithm near 0 is known to as many parts of 1.
// Of double more: a block of it is two sums of a thousand columns.
template <class T>
constexpr double kUnits = sizeof(T) == 8 ? 64.0 : 8.0;

// A lane of the narrowest vectors adds up to 256 terms of a block, one after the other; where they
// are equal, and small beside what they are added to, every rounding goes the same way.
template <class R>
R spread_of(size_t n) {
  const R terms = static_cast<R>(n);
  return R(1) + std::log(terms) + std::min(terms, R(2048)) / R(256);
}

template <class R>
struct Dual {
  R x;
  R d;  // derivative by log q
};
template <class R>
R product(R a, R b) {  // 0 * anything = 0
  return a == R(0) || b == R(0) ? R(0) : a * b;
}
template <class R>
Dual<R> operator+(Dual<R> a, Dual<R> b) {
  return {a.x + b.x, a.d + b.d};
}
template <class R>
Dual<R> operator-(Dual<R> a, Dual<R> b) {
  return {a.x - b.x, a.d - b.d};
}
template <class R>
Dual<R> operator*(R k, Dual<R> a) {
  return {product(k, a.x), product(k, a.d)};
}
// w * x, 0 where the weight w is
template <class R>
Dual<R> weighted(Dual<R> w, Dual<R> x) {
  if (w.x == R(0)) return {R(0), R(0)};
  return {product(w.x, x.x), product(w.d, x.x) + product(w.x, x.d)};
}
template <class R>
Dual<R> log(Dual<R> a) {
  if (a.x == R(0)) return {-std::numeric_limits<R>::infinity(), R(0)};
  return {std::log(a.x), a.d / a.x};
}

// One column; a probability stands beside its logarithm because the two may be treated apart.
template <class R>
struct Point {
  R logp, logq, p, q;
  Point(R lp, R lq) : logp(lp), logq(lq), p(std::exp(lp)), q(std::exp(lq)) {}
};

// The column's numbers as functions of log q.
template <class R>
struct Column {
  Dual<R> p, q, logp, logq;
  explicit Column(const Point<R>& at)
      : p{at.p, R(0)}, q{at.q, at.q}, logp{at.logp, R(0)}, logq{at.logq, R(1)} {}
};

// l(log p, log q) by its definition; a is the divergence's parameter.
template <class R>
using Definition = Dual<R> (*)(const Column<R>& c, R a);

template <class R>
Definition<R> definition_of(const std::string& name) {
  using C = const Column<R>&;
  if (name == "kl") return [](C c, R) { return weighted(c.p, c.logp - c.logq); };
  if (name == "reverse_kl") return [](C c, R) { return weighted(c.q, c.logq - c.logp); };
  if (name == "js")
    return [](C c, R a) {
      const Dual<R> logm = log(a * c.p + (R(1) - a) * c.q);
      return a * weighted(c.p, c.logp - logm) + (R(1) - a) * weighted(c.q, c.logq - logm);
    };
  if (name == "skew_kl")
    return [](C c, R a) { return weighted(c.p, c.logp - log(a * c.p + (R(1) - a) * c.q)); };
  if (name == "skew_reverse_kl")
    return [](C c, R a) { return weighted(c.q, c.logq - log((R(1) - a) * c.p + a * c.q)); };
  if (name == "tv")
    return [](C c, R) {
      const R sign = c.p.x > c.q.x ? R(1) : c.p.x < c.q.x ? R(-1) : R(0);
      return (sign / R(2)) * (c.p - c.q);
    };
  if (name == "acceptance")
    return [](C c, R) { return c.q.x < c.p.x ? c.q : c.p.x < c.q.x ? c.p : Dual<R>{c.p.x, R(0)}; };
  std::fprintf(stderr, "oracle.h: no definition of the divergence '%s'\n", name.c_str());
  std::exit(2);
}

template <class R>
Dual<R> pointwise(Definition<R> definition, const Point<R>& at, R a) {
  if (at.p == R(0) && at.q == R(0)) return {R(0), R(0)};
  return definition(Column<R>(at), a);
}

// The slope per unit of q at p = q, which the kernels leave out (fastkd/divergence.py: "centred").
template <class R>
R centre_of(Definition<R> definition, R a) {
  return pointwise(definition, Point<R>(R(0), R(0)), a).d;
}

// A number, how far T may be from it, and whether T can say anything about it at all.
template <class R>
struct Truth {
  R value = R(0);
  R slack = R(0);
};

template <class R>
struct Softmax {
  std::vector<R> logs;     // log probability of each column
  std::vector<bool> lost;  // whether its distance from the maximum is more than T can hold
  R spread = R(0);         // see above, of all columns that were summed
  R top = -std::numeric_limits<R>::infinity();
  R sum = R(0);    // of exp((x - top) / temperature)
  Truth<R> below;  // sum of x - top
  R sum_slack = R(0);
  bool empty = false;   // -inf everywhere
  bool broken = false;  // a NaN or +inf
};

template <class R, class T>
Softmax<R> softmax(const std::vector<R>& x, double temperature) {
  constexpr R unit = std::numeric_limits<T>::epsilon(), largest = std::numeric_limits<T>::max();
  constexpr R least = std::numeric_limits<T>::min();
  const R spread = spread_of<R>(x.size());
  Softmax<R> side;
  side.spread = spread;
  for (R v : x) {
    side.broken |= !(v < std::numeric_limits<R>::infinity());
    side.top = std::max(side.top, v);
  }
  side.empty = !side.broken && side.top == -std::numeric_limits<R>::infinity();
  if (side.broken || side.empty) return side;
  const R t = static_cast<R>(temperature);
  for (R v : x) {
    const R score = (v - side.top) / t, e = std::exp(score);
    side.logs.push_back(score);
    // in units of log 2, as the kernels count; a quarter for a sum or difference of such scores
    side.lost.push_back(v > -std::numeric_limits<R>::infinity() &&
                        (side.top - v > largest / 2 || -score > largest / 4));
    side.sum += e;
    side.sum_slack += product(e, unit * R(kUnits<T>) * (spread - score));
    side.below.value += v - side.top;
    side.below.slack += R(kUnits<T>) * unit * spread * (side.top - v) + R(3) * least;
  }
  for (R& y : side.logs) y -= std::log(side.sum);
  return side;
}

template <class R>
struct RowTruth {
  bool broken = false;  // NaN in the loss and in every column of the gradient
  bool vague = false;   // beyond what T can hold: only NaN or not is undefined, nothing is checked
  bool no_gradient = false;         // an infinite loss has none
  Truth<R> sum, slope;              // sums of values and of centred slopes
  Truth<R> value;                   // the divergence, a function of the sum of values
  Truth<R> hard;                    // the cross-entropy
  Truth<R> z;                       // the weighted square of the log-sum-exp at T = 1
  std::vector<Truth<R>> soft_grad;  // by column, of the divergence by the logit times T
  std::vector<R> steepness;  // what q times the row's factor is multiplied by, and may underflow
  std::vector<Truth<R>> hard_grad, z_grad;
};

// Turns the sum of values into the divergence. All but one are the sum itself.
template <class R, class T>
void of_sum(const std::string& name, RowTruth<R>& row) {
  row.value = row.sum;
  if (name != "acceptance") return;
  const R least = std::ldexp(R(1), -100), whole = std::ldexp(R(1), sizeof(T) == 8 ? -40 : -16);
  const R x = row.sum.value, slack = row.sum.slack;
  row.vague |= (x - slack < least) != (x + slack < least);
  const R by = x < least ? R(0) : R(1) / x, share = R(1.1) * slack * by;
  row.vague |= !(share < R(0.1));
  const R loss = -std::log(std::max(x, least));
  const R rounding = std::numeric_limits<T>::epsilon() * std::fabs(loss);
  row.value = {loss, share + rounding + (x + slack + whole > R(1) ? whole : R(0))};
  for (Truth<R>& g : row.soft_grad)
    g = {-by * g.value, by * (R(1.1) * g.slack + share * std::fabs(g.value))};
  for (R& steep : row.steepness) steep *= by;
}

// The divergence of one row. Where it is `partial`, the last outcome has no term of its own, and
// slopes are not centred.
template <class R, class T>
void soft_truth(const std::string& name, R a, const Softmax<R>& s, const Softmax<R>& t,
                RowTruth<R>& row, bool partial = false) {
  constexpr R unit = R(kUnits<T>) * std::numeric_limits<T>::epsilon();
  const R tiny = R(8) * std::numeric_limits<T>::min(), inf = std::numeric_limits<R>::infinity();
  const size_t n = s.logs.size();
  const R spread = s.spread;
  // below this a product of a probability and a share of the mixture is no normal number of T
  const R lost = tiny / std::min(a, R(1) - a);
  const Definition<R> definition = definition_of<R>(name);
  const R centre = partial ? R(0) : centre_of(definition, a);
  std::vector<Truth<R>> slopes(n);
  const auto centred = [&](const Point<R>& at, R param) {
    Dual<R> l = pointwise(definition, at, param);
    l.d -= product(centre, at.q);
    return l;
  };
  for (size_t i = 0; i < n - partial; ++i) {
    const Point<R> at(t.logs[i], s.logs[i]);
    const Dual<R> l = centred(at, a);
    // an overlap is one of the two probabilities, and not made of both
    const R both = name == "acceptance" ? R(0) : at.p + at.q;
    R slack = lost + unit * (spread * std::fabs(l.x) + both);
    R slope_slack = lost + unit * (std::fabs(l.d) + both);
    const auto moved = [&](const Point<R>& other, R param) {
      const Dual<R> m = centred(other, param);
      row.vague |= (m.x < inf) != (l.x < inf);
      // a little more, for the move itself changes p and q
      if (m.x != l.x) slack += R(1.01) * std::fabs(m.x - l.x);
      if (m.d != l.d) slope_slack += R(1.01) * std::fabs(m.d - l.d);
    };
    const R by_p = unit * (spread - at.logp), by_q = unit * (spread - at.logq);
    if (by_p < inf) moved(Point<R>(at.logp - by_p, at.logq), a);
    if (by_q < inf) moved(Point<R>(at.logp, at.logq - by_q), a);
    moved(at, a * (R(1) - unit));
    Point<R> flushed = at;
    if (at.p < tiny) flushed.p = R(0);
    if (at.q < tiny) flushed.q = R(0);
    if (t.lost[i]) flushed.logp = -inf;
    if (s.lost[i]) flushed.logq = -inf;
    if (at.p < tiny || at.q < tiny) moved(flushed, a);
    // the rate of a q that counts as 0 is that of the least number, and may still meet the q itself
    if (at.q < tiny) slope_slack -= at.q * std::log(std::numeric_limits<T>::min());
    row.sum.value += l.x;
    row.sum.slack += slack;
    row.slope.value += l.d;
    row.slope.slack += slope_slack + unit * spread * std::fabs(l.d);
    slopes[i] = {l.d, slope_slack};
  }
  row.vague |= !(row.sum.slack < inf) && row.sum.value < inf;
  row.no_gradient = !(row.sum.value < inf) || !(row.slope.slack < inf);
  // kernels may take all slopes relative to that of the most probable column, per unit of q
  const size_t top =
      static_cast<size_t>(std::max_element(s.logs.begin(), s.logs.end()) - s.logs.begin());
  const R shared = unit * spread * std::fabs(slopes[top].value) / std::exp(s.logs[top]);
  for (size_t i = 0; i < n; ++i) {
    const R q = std::exp(s.logs[i]);
    const R by_q = tiny + product(q, unit * (spread - s.logs[i]));
    const R of_sum = product(q, row.slope.value);
    row.soft_grad.push_back(
        {slopes[i].value - of_sum, slopes[i].slack + product(by_q, std::fabs(row.slope.value)) +
                                       product(q, row.slope.slack + shared) +
                                       unit * (std::fabs(slopes[i].value) + std::fabs(of_sum))});
    const R rate = q > R(0) ? std::fabs(slopes[i].value / q) : R(0);
    row.steepness.push_back(rate + std::fabs(row.slope.value));
  }
  of_sum<R, T>(name, row);
}

// Cross-entropy at T = 1; a label that is no column here takes its term from a logit of 0. In its
// gradient smoothing / classes is still to be taken off.
template <class R, class T>
void hard_truth(const Softmax<R>& s, int64_t label, R smoothing, RowTruth<R>& row) {
  constexpr R unit = R(kUnits<T>) * std::numeric_limits<T>::epsilon();
  const int64_t n = static_cast<int64_t>(s.logs.size());
  const R tiny = R(8) * std::numeric_limits<T>::min();
  const R inf = std::numeric_limits<R>::infinity(), log_sum = std::log(s.sum);
  const R spread = spread_of<R>(s.logs.size());
  const bool here = label >= 0 && label < n;
  const R at_label = here ? s.logs[static_cast<size_t>(label)] : -(s.top + log_sum);
  row.hard.value = product(smoothing - R(1), at_label);
  row.hard.slack = unit * (spread + std::fabs(at_label) + (here ? R(0) : std::fabs(s.top)));
  // in units of log 2, see softmax
  const R most = std::numeric_limits<T>::max() / R(4);
  if (here ? bool(s.lost[static_cast<size_t>(label)]) : std::fabs(s.top) > most) row.vague = true;
  if (smoothing != R(0)) {
    const R mean = s.below.value / static_cast<R>(n);
    row.hard.value += smoothing * (log_sum - mean);
    row.hard.slack += smoothing * (unit * spread + s.below.slack / static_cast<R>(n));
    if (s.below.value > -inf && -s.below.value > most)
      row.vague = true;  // the sum over a block is one of T
  }
  if (!(row.hard.value < inf)) row.hard.slack = R(0);
  for (int64_t j = 0; j < n; ++j) {
    const R logq = s.logs[static_cast<size_t>(j)], q = std::exp(logq);
    const R hot = j == label ? R(1) - smoothing : R(0);
    const R by_q = tiny + product(q, unit * (spread - logq));
    row.hard_grad.push_back({q - hot, by_q + unit * hot});
  }
}

// z times the square of the log-sum-exp at T = 1.
template <class R, class T>
void z_truth(const Softmax<R>& s, R z, RowTruth<R>& row) {
  constexpr R unit = R(kUnits<T>) * std::numeric_limits<T>::epsilon();
  const R tiny = R(8) * std::numeric_limits<T>::min();
  const R log_sum = s.top + std::log(s.sum), size = std::fabs(log_sum);
  const R slack = unit * (s.spread + std::fabs(s.top));
  if (R(2) * z * size > std::numeric_limits<T>::max() / R(1e6)) row.vague = true;
  row.z = {z * log_sum * log_sum, z * (R(2) * size + slack) * slack};
  for (R logq : s.logs) {
    const R q = std::exp(logq), by_q = tiny + product(q, unit * (s.spread - logq));
    row.z_grad.push_back({R(2) * z * log_sum * q, R(2) * z * (size * by_q + slack * q)});
  }
}

}  // namespace check
