// Runs one case through every pass of one instruction set.
#pragma once

#include "row_pass.h"
#include "topk_problem.h"

namespace check {

// A teacher of logits: the fused pass, the passes one by one, and the vocabulary-parallel steps.
template <class T>
class DenseTrial final : public RowPass<T> {
 public:
  using Base = RowPass<T>;
  using Base::c, Base::isa_, Base::n_, Base::report_, Base::size, Base::truth_;

  DenseTrial(Problem<T>& problem, const fastkd::Isa& isa, Report& report)
      : Base(problem, isa, report), p(problem) {}

 private:
  static constexpr int kWide = sizeof(T) == 8;
  const fastkd::Passes& passes() const { return isa_.kernels()->passes[c.divergence]; }

  fastkd::ThreadedPass kernel(bool gradient) const override {
    const bool same = gradient ? c.same() : c.student == c.teacher;
    return passes().fused[int(same ? c.student : kWide ? DType::f64 : DType::f32)];
  }

  void check_more(const Table& fresh, const Guarded& loss) override {
    if (c.grad == c.student && p.teacher_is_student())
      this->in_place("in place, the teacher in the same memory", fresh, loss, true);
    multiply(fresh);
    unfused();
    if constexpr (!kWide) vocab_parallel(fresh, loss);
  }

  // The sums differ in their last digits, so the definitions are the truth.
  void check_without_scratch(const Table& grad, const Guarded& loss) override {
    truth_.losses(loss);
    truth_.gradients(grad, c.vocab);
  }

  // x * by in T, rounded once to the dtype.
  void multiply(const Table& fresh) {
    this->start("multiply");
    Table grad(c.grad, 1, 1, c.width, this->layout());
    const double by = p.random.normal();
    std::memcpy(grad.row(0), fresh.row(n_ - 1), static_cast<size_t>(c.width * size_of(c.grad)));
    grad.seal(c.width, nullptr, true);
    isa_.kernels()->multiply(grad.row(0), c.grad, c.width, by);
    grad.unseal();
    report_.expect(grad.intact(), "bytes beside the product were written");
    for (int64_t j = 0; j < c.width; ++j) {
      const double x = decode(fresh.bits(n_ - 1, j), c.grad);
      const double product =
          c.grad == DType::f64
              ? x * by
              : static_cast<double>(static_cast<float>(x) * static_cast<float>(by));
      const double rounded = decode(encode(product, c.grad), c.grad);
      const double got = decode(grad.bits(0, j), c.grad);
      const bool good = rounded != rounded ? got != got : got == rounded;
      if (!good) report_.expect(false, describe("product", n_ - 1, j, got, rounded, 0));
    }
  }

  // ---- the passes one by one

  void unfused() {
    const Guarded s(3 * n_ * size(), p.random.chance(0.5)), t(3 * n_ * size(), true),
        one(3 * n_ * size(), true);
    stats("stats of the student", p.student, c.temperature, s);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(s, r, p.row(r).s);
    stats("stats of the teacher", p.teacher, c.temperature, t);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(t, r, p.row(r).t);
    stats("stats at T = 1", p.student, 1.0, one);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(one, r, p.row(r).one);
    this->start("loss");
    Guarded both(2 * n_ * size(), p.random.chance(0.5));
    fastkd::Args a = p.args();
    a.stats_s = s.data();
    a.stats_t = t.data();
    a.stats_hard = one.data();
    a.out = both.data();
    call(passes().loss[kWide], a, 0, n_, c.flush);
    report_.expect(both.intact(), "bytes beside the losses were written");
    for (int64_t r = 0; r < n_; ++r)
      truth_.value_and_slope(r, both.as<T>()[2 * r], both.as<T>()[2 * r + 1]);
    this->start("grad");
    both.read_only();
    a.classes = c.classes;  // more than the columns here where the vocabulary is split
    Table grad(c.grad, c.a, c.b, c.width, this->layout());
    a.grad = grad.operand();
    a.pairs = both.data();
    a.out = nullptr;
    grad.seal(c.width, p.keep(), true);
    call(passes().grad[kWide], a, 0, n_, c.flush);
    grad.unseal();
    report_.expect(grad.intact(), "bytes beside the gradient were written");
    truth_.gradients(grad, c.classes);
  }

  void stats(const char* pass, const Table& x, double temperature, const Guarded& out) {
    this->start(pass);
    fastkd::Args a = p.args();
    a.student = x.operand();
    a.temperature = temperature;
    a.out = out.data();
    call(isa_.kernels()->stats[kWide], a, 0, n_, c.flush);
    out.read_only();
    report_.expect(out.intact(), "bytes beside the stats were written");
  }

  // ---- the vocabulary-parallel steps

  // The arguments of a rank that holds columns [start, stop).
  fastkd::Args columns_of(int64_t start, int64_t stop, const Table& grad, bool inside) {
    fastkd::Args a = p.args();
    a.grad = grad.operand();
    if (inside) a.student = a.grad;
    for (fastkd::Operand* x : {&a.student, &a.teacher, &a.grad})
      x->data += start * fastkd::size_of(x->dtype);
    a.vocab = stop - start;
    a.stream = p.random.chance(0.5);
    return a;
  }

  void vocab_parallel(const Table& fresh, const Guarded& first) {
    this->start("vocabulary-parallel steps");
    const int64_t ranks = p.random.between(1, 3), half = n_ / 2;
    const auto* steps = passes().steps;
    const int kind = int(c.same() ? c.student : DType::f32);
    const bool rates_too = steps[1][kind] != nullptr;
    const bool inside = c.grad == c.student && p.random.chance(0.5);
    Table grad(c.grad, c.a, c.b, c.width, this->layout());
    Guarded loss(n_ * size(), true), redo(n_, true);
    if (inside) {
      p.unseal();
      for (int64_t r = 0; r < n_; ++r)
        std::memcpy(grad.row(r), p.student.row(r),
                    static_cast<size_t>(c.vocab * size_of(c.student)));
      p.seal();
    }
    std::vector<int64_t> cuts{0, c.vocab};
    while (int64_t(cuts.size()) <= ranks) cuts.push_back(p.random.between(0, c.vocab));
    std::sort(cuts.begin(), cuts.end());
    grad.seal(c.width, p.keep(), true);
    // some rows, then the other rows in the same memory
    for (const auto& [begin, end] : {std::pair{int64_t{0}, half}, std::pair{half, n_}}) {
      const int64_t rows = end - begin;
      const int64_t of_sums = rates_too ? sizeof(fastkd::RowSums) : sizeof(fastkd::ExpectationSums);
      const Guarded sums(ranks * rows * of_sums, true);
      const Guarded rates(ranks * rows * int64_t{sizeof(fastkd::Rates)}, true);
      std::vector<std::unique_ptr<Guarded>> memories;
      std::vector<std::vector<int64_t>> labels(static_cast<size_t>(ranks));
      std::vector<fastkd::Args> own;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const int64_t start = cuts[size_t(rank)], stop = cuts[size_t(rank) + 1];
        fastkd::Args a = columns_of(start, stop, grad, inside);
        a.width = (rank + 1 == ranks ? c.width : stop) - start;
        a.first = begin;
        a.rows = rows;
        a.ranks = ranks;
        a.rank = rank;
        auto& label = labels[size_t(rank)];
        for (int64_t r = 0; a.label != nullptr && r < n_; ++r)
          label.push_back(a.label[r] >= start && a.label[r] < stop ? a.label[r] - start : -1);
        if (a.label != nullptr) a.label = label.data();
        memories.emplace_back(new Guarded(rows * isa_.kernels()->step_bytes(a.vocab, true), true));
        a.memory = memories.back()->data();
        a.sums = sums.data();
        a.rates = rates_too ? rates.data() : nullptr;
        a.out = loss.data();
        a.redo = reinterpret_cast<uint8_t*>(redo.data());
        own.push_back(a);
      }
      for (int step = 0; step < 3; ++step) {
        if (step == 1 && !rates_too) continue;
        const Guarded& into = step == 0 ? sums : rates;
        const int64_t bytes = step == 0 ? of_sums : int64_t{sizeof(fastkd::Rates)};
        for (int64_t rank = ranks - 1; rank >= 0; --rank) {
          fastkd::Args& a = own[size_t(rank)];
          a.sent = into.data() + rank * rows * bytes;
          const fastkd::ThreadPool pool = c.threads ? Backwards::pool(2) : fastkd::ThreadPool{};
          call(steps[step][kind], a, begin, end, c.flush, pool);
        }
        if (step == 0) sums.read_only();
        if (step == 1) rates.read_only();
      }
      for (const auto& memory : memories)
        report_.expect(memory->intact(), "bytes beside the memory were written");
    }
    grad.unseal();
    report_.expect(redo.intact(), "bytes beside the marks were written");
    this->finish(grad, loss);
    for (int64_t r = 0; r < n_; ++r) {  // a row marked `redo` must be untouched
      if (redo.template as<uint8_t>()[r] == 0) continue;
      if (inside)
        report_.expect(std::memcmp(grad.row(r), p.student.row(r),
                                   size_t(c.vocab * fastkd::size_of(c.student))) == 0,
                       "a row was touched that is not finished");
      loss.template as<T>()[r] = first.template as<T>()[r];
      std::memcpy(grad.row(r), fresh.row(r), size_t(c.width * fastkd::size_of(c.grad)));
    }
    truth_.losses(loss);
    truth_.gradients(grad, c.vocab);
  }

  Problem<T>& p;
};

// A top-k teacher.
template <class T>
class TopKTrial final : public RowPass<T> {
 public:
  using Base = RowPass<T>;
  using Base::Base;
  using Base::c, Base::isa_, Base::n_, Base::p, Base::report_;

 private:
  fastkd::ThreadedPass kernel(bool gradient) const override {
    constexpr bool wide = sizeof(T) == 8;
    const bool native = (c.student == DType::f64) == wide && (!gradient || c.grad == c.student);
    return isa_.kernels()->topk[int(native ? c.student : wide ? DType::f64 : DType::f32)];
  }
  void check_more(const Table&, const Guarded&) override {}
  // There is no slow form here: every kept row must be NaN.
  void check_without_scratch(const Table& grad, const Guarded& loss) override {
    for (int64_t r = 0; r < n_; ++r) {
      const T got = loss.template as<T>()[r];
      report_.expect(p.kept(r) ? got != got : got == T(0), "loss of row " + std::to_string(r));
      for (int64_t j = 0; j < c.width; ++j) {
        const double g = decode(grad.bits(r, j), c.grad);
        if (!(p.kept(r) && j < c.vocab ? g != g : g == 0.0))
          report_.expect(false, describe("gradient", r, j, g, 0, 0));
      }
    }
  }
};

// Checks one case on every instruction set that this processor runs.
template <class P, class Each>
void check_case_on(const Case& c, Report& report) {
  report.start(c, "no instruction set", "making the case");
  P problem(c);
  for (const fastkd::Isa& isa : fastkd::all_isas())
    if (isa.runs) Each(problem, isa, report).run();
}

template <class T>
void check_case_in(const Case& c, Report& report) {
  if (c.kind == TeacherKind::logits) {
    check_case_on<Problem<T>, DenseTrial<T>>(c, report);
  } else {
    check_case_on<TopKProblem<T>, TopKTrial<T>>(c, report);
  }
}

// `check PARTS`: one case of so many is checked, picked by a hash of their order, so that what cycles
// in a list of cases goes into every part.
inline uint64_t parts = 1, left_out = 0, met = 0;

inline void check_case(const Case& c, Report& report) {
  if ((++met * 0x9e3779b97f4a7c15u >> 40) % parts != 0) {
    ++left_out;
    return;
  }
  if (c.wide()) {
    check_case_in<double>(c, report);
  } else {
    check_case_in<float>(c, report);
  }
}

}  // namespace check
