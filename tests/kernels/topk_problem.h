// The inputs of a case with a top-k teacher, as the kernels get them (TopKRows in
// fastkd/backends/base.py): some columns of each row with their log-probabilities, and the tail.
#pragma once

#include <string>
#include <vector>

#include "isas.h"
#include "problem.h"

namespace check {

template <class T>
class TopKProblem final : public Batch<T> {
 public:
  using Base = Batch<T>;
  using Base::c, Base::random, Base::student, Base::kept, Base::label;
  using typename Base::R;
  using typename Base::Row;

  explicit TopKProblem(const Case& given)
      : Base(given),
        logprobs(kOut, 1, c.rows(), c.k, flat()),
        indices(DType::f64, 1, c.rows(), c.k, flat()),  // of the size of an index
        tail(kOut, 1, c.rows(), 1, flat()) {
    this->make_rows();
  }

  void seal() override {
    Base::seal();
    for (const Table* table : {&logprobs, &indices, &tail})
      table->seal(table->length(), this->keep(), false);
  }
  void unseal() override {
    Base::unseal();
    for (const Table* table : {&logprobs, &indices, &tail}) table->unseal();
  }

  fastkd::Args args() const override {
    fastkd::Args a = Base::args();
    a.logprobs = logprobs.row(0);
    a.indices = reinterpret_cast<const int64_t*>(indices.row(0));
    a.tail = has_tail() ? tail.row(0) : nullptr;
    a.k = c.k;
    a.restricted = c.kind == TeacherKind::restricted;
    const auto definition = definition_of<double>(kDivergences[c.divergence]);
    a.centre = centre_of(definition, c.param);
    // always in double, and so only in the baseline's table
    a.points = fastkd::all_isas().front().kernels()->passes[c.divergence].points;
    return a;
  }

 private:
  static constexpr DType kOut = sizeof(T) == 8 ? DType::f64 : DType::f32;
  static constexpr R inf = std::numeric_limits<R>::infinity();

  bool has_tail() const {
    return c.kind == TeacherKind::bucket || c.kind == TeacherKind::renormalize;
  }
  Layout flat() {
    Layout layout;
    layout.at_end = random.chance(0.5);
    return layout;
  }
  int64_t index(int64_t r, int64_t place) const {
    return static_cast<int64_t>(indices.bits(r, place));
  }
  void put(const Table& table, int64_t r, int64_t place, R x) {
    write_bits(table.at(r, place), kOut, encode(static_cast<double>(x), kOut));
  }

  // ---- drawing

  void fill(int64_t r) override {
    fill_row(random, random.next(), this->draw_content(c.content), student, r,
             this->logit_unit(c.student));
    if (!kept(r)) return garbage(r);
    name_columns(r);
    const std::vector<R> x = this->numbers(student, r);
    draw_mass(r, softmax<R, T>(x, c.temperature));
  }

  // Fills a row that must not be read.
  void garbage(int64_t r) {
    for (int64_t i = 0; i < c.k; ++i) {
      write_bits(indices.at(r, i), indices.dtype(), random.next());
      write_bits(logprobs.at(r, i), kOut, random.next());
    }
    write_bits(tail.at(r, 0), kOut, random.next());
  }

  // With this column in the support, little of the student's mass may be left for the tail.
  int64_t most_probable(int64_t r) const {
    const std::vector<R> x = this->numbers(student, r);
    return std::max_element(x.begin(), x.end()) - x.begin();
  }

  // Draws the support: each column at most once, in any order, with padding between.
  void name_columns(int64_t r) {
    const double padding = random.chance(0.5) ? 0.0 : random.unit();
    const bool together = random.chance(0.2), all = random.chance(0.3), top = random.chance(0.4);
    std::vector<int64_t> support;
    std::vector<bool> seen(static_cast<size_t>(c.vocab));
    const int64_t first = random.below(c.vocab);
    for (int64_t i = 0; i < c.k && static_cast<int64_t>(support.size()) < c.vocab; ++i) {
      if (!all && random.chance(padding)) continue;
      int64_t column = together                      ? (first + i) % c.vocab
                       : top && support.empty()      ? most_probable(r)
                       : i < 2 && random.chance(0.3) ? (i == 0 ? c.vocab - 1 : 0)
                                                     : random.below(c.vocab);
      while (seen[static_cast<size_t>(column)]) column = (column + 1) % c.vocab;
      seen[static_cast<size_t>(column)] = true;
      support.push_back(column);
    }
    support.resize(static_cast<size_t>(c.k), -1);
    for (int64_t i = c.k - 1; i > 0; --i)
      std::swap(support[static_cast<size_t>(i)], support[static_cast<size_t>(random.below(i + 1))]);
    for (int64_t i = 0; i < c.k; ++i)
      write_bits(indices.at(r, i), indices.dtype(),
                 static_cast<uint64_t>(support[static_cast<size_t>(i)]));
  }

  void draw_mass(int64_t r, const Softmax<R>& s) {
    Mass mass = c.mass != Mass::any  ? c.mass
                : random.chance(0.4) ? Mass::drawn
                                     : static_cast<Mass>(random.below(int(Mass::any)));
    if (mass == Mass::student && (s.broken || s.empty)) mass = Mass::drawn;
    const size_t k = static_cast<size_t>(c.k);
    std::vector<size_t> support;
    for (size_t i = 0; i < k; ++i)
      if (index(r, static_cast<int64_t>(i)) >= 0) support.push_back(i);
    std::vector<R> logp(k, -inf);
    R rest = -inf;
    const R width = random.chance(0.2) ? R(30) : R(3);
    const int64_t count = static_cast<int64_t>(support.size());
    const size_t hot = support.empty() ? 0 : support[static_cast<size_t>(random.below(count))];
    if (mass == Mass::drawn) {
      R sum = R(0);
      for (size_t i : support) sum += std::exp(logp[i] = width * static_cast<R>(random.normal()));
      if (random.chance(0.8)) rest = width * static_cast<R>(random.normal());
      const R log_sum = std::log(sum + std::exp(rest));
      for (size_t i : support) logp[i] -= log_sum;
      rest -= log_sum;
      if (random.chance(0.2) && !support.empty()) logp[hot] = -inf;
    } else if (mass == Mass::student) {
      for (size_t i : support)
        logp[i] = s.logs[static_cast<size_t>(index(r, static_cast<int64_t>(i)))];
      rest = log_sum_of(off(r, s.logs));
    } else if (mass == Mass::shared) {
      const R log_share =
          std::log(R(0.5)) * std::ceil(std::log2(static_cast<R>(support.size() + 1)));
      for (size_t i : support) logp[i] = log_share;
      const R left = R(1) - static_cast<R>(support.size()) * std::exp(log_share);
      if (random.chance(0.5)) rest = std::log(std::max(left, R(0)));
    } else if (mass == Mass::one_hot) {
      if (!support.empty()) logp[hot] = R(0);
    } else if (mass == Mass::extreme) {
      static const double some[] = {-0.0,   -1e-40, -1e-310, -1e-7, -87.5, -103.9,
                                    -104.1, -708.5, -745.2,  -1e4,  -1e30, -3e38};
      for (size_t i : support) logp[i] = static_cast<R>(random.pick(some));
      rest = random.chance(0.5) ? static_cast<R>(random.pick(some)) : -inf;
    }
    if (c.kind == TeacherKind::renormalize || c.kind == TeacherKind::restricted) {
      const R log_sum = log_sum_of(logp);
      for (R& x : logp) x -= log_sum;  // NaN where there is nothing, as torch has it
      rest = -inf;
    }
    for (int64_t i = 0; i < c.k; ++i)
      put(logprobs, r, i, std::min(logp[static_cast<size_t>(i)], R(0)));
    put(tail, r, 0, std::min(rest, R(0)));
    if (mass != Mass::not_a_number) return;
    // also in padding, where an index was invalid
    constexpr R nan = std::numeric_limits<R>::quiet_NaN();
    if (c.k == 0 || random.chance(0.2)) {
      put(tail, r, 0, nan);
    } else {
      put(logprobs, r, random.below(c.k), nan);
    }
  }

  // ---- the truth

  std::vector<R> off(int64_t r, std::vector<R> x) const {
    for (int64_t i = 0; i < c.k; ++i)
      if (index(r, i) >= 0) x[static_cast<size_t>(index(r, i))] = -inf;
    return x;
  }
  static R log_sum_of(const std::vector<R>& x) {
    R top = -inf, sum = R(0);
    for (R y : x) top = std::max(top, y);
    if (!(top > -inf)) return top;
    for (R y : x) sum += std::exp(y - top);
    return top + std::log(sum);
  }
  // x on the support; `none` stands for padding.
  std::vector<R> on(int64_t r, const std::vector<R>& x, R none) const {
    std::vector<R> y;
    for (int64_t i = 0; i < c.k; ++i)
      y.push_back(index(r, i) >= 0 ? x[static_cast<size_t>(index(r, i))] : none);
    return y;
  }

  Row truth(int64_t r) const override {
    Row row;
    const bool at_one = c.at_one(), restricted = c.kind == TeacherKind::restricted;
    const bool partial = c.kind == TeacherKind::drop;
    const std::vector<R> x = this->numbers(student, r);
    const Softmax<R> whole = softmax<R, T>(x, c.temperature);
    row.one = softmax<R, T>(x, 1.0);
    row.s = restricted ? softmax<R, T>(on(r, x, -inf), c.temperature) : whole;
    row.t.logs = this->numbers(logprobs, r);
    if (has_tail()) row.t.logs.push_back(this->numbers(tail, r)[0]);
    bool some = partial;
    for (R y : row.t.logs) {
      some |= y != -inf;
      row.of.broken |= y != y;
    }
    row.dead = row.s.empty && !some && !at_one;
    row.of.broken |=
        row.s.broken || (at_one && whole.broken) || ((row.s.empty || !some) && !row.dead);
    if (row.of.broken || row.dead) return row;
    row.t.lost.resize(row.t.logs.size(), false);
    if (!restricted) {
      const std::vector<R> rest = off(r, whole.logs);
      row.s.logs = on(r, whole.logs, -inf);
      row.s.logs.push_back(log_sum_of(rest));
      row.s.lost.clear();
      for (int64_t i = 0; i < c.k; ++i)
        row.s.lost.push_back(index(r, i) >= 0 && whole.lost[static_cast<size_t>(index(r, i))]);
      const auto most = std::max_element(rest.begin(), rest.end()) - rest.begin();
      row.s.lost.push_back(rest[static_cast<size_t>(most)] > -inf &&
                           whole.lost[static_cast<size_t>(most)]);
      if (partial) row.t.logs.push_back(-inf), row.t.lost.push_back(false);
    }
    soft_truth<R, T>(kDivergences[c.divergence], static_cast<R>(c.param), row.s, row.t, row.of,
                     partial);
    to_columns(r, whole.logs, row);
    if (c.hard != 0.0) hard_truth<R, T>(row.one, label()[r], static_cast<R>(c.smoothing), row.of);
    if (c.z != 0.0) z_truth<R, T>(row.one, static_cast<R>(c.z), row.of);
    return row;
  }

  // Turns the gradient by outcomes into one by columns: each column off the support has its share
  // of the tail's.
  void to_columns(int64_t r, const std::vector<R>& logs, Row& row) const {
    constexpr R unit = R(kUnits<T>) * std::numeric_limits<T>::epsilon();
    // exponentials under their block's shift, which need not be its maximum, times a factor
    constexpr R kMost = R(4096);
    const size_t n = static_cast<size_t>(c.vocab);
    const std::vector<Truth<R>> of = row.of.soft_grad;
    row.of.soft_grad.assign(n, {});
    row.of.steepness.assign(n, R(0));
    if (c.kind != TeacherKind::restricted) {
      const R log_rest = row.s.logs.back();
      const Truth<R> rest = of.back();
      // An exponential that T cannot hold beside the row's largest counts as 0. Where the teacher
      // gives the rest mass, its columns keep their digits however little the student's have.
      const R tiny = R(8) * std::numeric_limits<T>::min();
      const R lost = log_rest == -inf           ? R(0)
                     : row.t.logs.back() > -inf ? std::min(tiny / std::exp(log_rest), R(1e-12))
                                                : tiny / std::exp(log_rest);
      for (size_t j = 0; j < n; ++j) {
        const R share = logs[j] == -inf ? R(0) : std::exp(logs[j] - log_rest);
        const R by_share = lost + product(share, unit * (row.s.spread - logs[j]));
        row.of.soft_grad[j] = {share * rest.value,
                               share * rest.slack + product(by_share, std::fabs(rest.value))};
        row.of.steepness[j] = kMost;
      }
    }
    for (int64_t i = 0; i < c.k; ++i) {
      if (index(r, i) < 0) continue;
      row.of.soft_grad[static_cast<size_t>(index(r, i))] = of[static_cast<size_t>(i)];
      row.of.steepness[static_cast<size_t>(index(r, i))] = R(0);
    }
  }

  Table logprobs, indices, tail;
};

}  // namespace check
