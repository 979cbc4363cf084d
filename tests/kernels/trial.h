// One case through every pass of one instruction set: against the definitions, and bit for bit
// against the same computed another way.
#pragma once

#include <thread>

#include "call.h"
#include "compare.h"

namespace check {

template <class T>
class Trial {
 public:
  Trial(Problem<T>& problem, const fastkd::Isa& isa, Report& report)
      : p(problem), c(problem.c), isa_(isa), report_(report), truth_(problem, report), n_(c.rows()) {
    constexpr int wide = sizeof(T) == 8;
    const fastkd::Passes& passes = isa.kernels()->passes[c.divergence];
    const DType widest = wide ? DType::f64 : DType::f32;
    bare_ = passes.fused[int(c.student == c.teacher ? c.student : widest)];
    fused_ = passes.fused[int(c.same() ? c.student : widest)];
    loss_ = passes.loss[wide];
    grad_ = passes.grad[wide];
    stats_ = isa.kernels()->stats[wide];
  }

  void run() {
    if (fused_ == nullptr) return;  // float64 is the baseline's alone
    no_gradient();
    Table fresh(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fused("fused", fresh, loss, p.teacher.operand(), false);
    truth_.losses(loss);
    truth_.gradients(fresh, c.vocab);
    again("the same again", fresh, loss, false);
    again("streamed", fresh, loss, true);
    if (p.refill_dropped()) again("other numbers in dropped rows", fresh, loss, false);
    if (c.threads) on_threads(fresh, loss);
    if (p.random.chance(0.2)) without_scratch();
    if (c.grad == c.student) {
      in_place("in place", fresh, loss, false);
      if (p.teacher_is_student())
        in_place("in place, the teacher in the same memory", fresh, loss, true);
    }
    multiply(fresh);
    split();
  }

 private:
  static constexpr int64_t size() { return int64_t{sizeof(T)}; }
  Layout layout() { return draw_layout(p.random, false); }

  void start(const char* pass) { report_.start(c, isa_.name, pass); }

  void no_gradient() {
    start("fused without a gradient");
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fastkd::Args a = p.args();
    a.out = loss.data();
    call(bare_, a, 0, n_, c.flush);
    report_.expect(loss.intact(), "bytes beside the losses were written");
    truth_.losses(loss);
  }

  void fused(const char* pass, const Table& grad, const Guarded& loss, fastkd::Operand teacher,
             bool stream) {
    start(pass);
    fastkd::Args a = p.args();
    a.teacher = teacher;
    a.grad = grad.operand();
    a.stream = stream;
    a.out = loss.data();
    grad.seal(c.width, p.keep(), true);
    call(fused_, a, 0, n_, c.flush);
    grad.unseal();
    finish(grad, loss);
  }

  void finish(const Table& grad, const Guarded& loss) {
    report_.expect(loss.intact(), "bytes beside the losses were written");
    report_.expect(grad.intact(), "bytes beside the gradient were written");
  }

  // ---- bit for bit

  void same(const Table& grad, const Guarded& loss, const Table& fresh, const Guarded& first) {
    report_.expect(std::memcmp(loss.data(), first.data(), static_cast<size_t>(n_ * size())) == 0,
                   "losses differ from the first run's");
    for (int64_t r = 0; r < n_; ++r)
      report_.expect(std::memcmp(grad.row(r), fresh.row(r),
                                 static_cast<size_t>(c.width * size_of(c.grad))) == 0,
                     "gradient of row " + std::to_string(r) + " differs from the first run's");
  }

  void again(const char* pass, const Table& fresh, const Guarded& first, bool stream) {
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fused(pass, grad, loss, p.teacher.operand(), stream);
    same(grad, loss, fresh, first);
  }

  // Rows over threads, and the chunks of a row over a team: in any split the same bits.
  void on_threads(const Table& fresh, const Guarded& first) {
    start("fused on several threads");
    const int threads = static_cast<int>(p.random.between(2, 4));
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fastkd::Args a = p.args();
    a.grad = grad.operand();
    a.out = loss.data();
    const int64_t at = p.random.between(0, n_);
    grad.seal(c.width, p.keep(), true);
    std::thread other([&] { call(fused_, a, at, n_, c.flush, Backwards::team(threads)); });
    call(fused_, a, 0, at, c.flush);
    other.join();
    grad.unseal();
    finish(grad, loss);
    same(grad, loss, fresh, first);
  }

  // As where memory is short; the sums are then others, so against the definitions.
  void without_scratch() {
    scratch_given = false;
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fused("fused without a scratch", grad, loss, p.teacher.operand(), false);
    scratch_given = true;
    truth_.losses(loss);
    truth_.gradients(grad, c.vocab);
  }

  void in_place(const char* pass, const Table& fresh, const Guarded& first, bool alias) {
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    p.unseal();
    for (int64_t r = 0; r < n_; ++r)
      std::memcpy(grad.row(r), p.student.row(r),
                  static_cast<size_t>(c.vocab * size_of(c.student)));
    p.seal();
    start(pass);
    fastkd::Args a = p.args();
    a.student = a.grad = grad.operand();
    if (alias) a.teacher = a.grad;
    a.out = loss.data();
    grad.seal(c.width, p.keep(), true);
    call(fused_, a, 0, n_, c.flush);
    grad.unseal();
    finish(grad, loss);
    same(grad, loss, fresh, first);
  }

  // x * by in T, rounded once to the dtype.
  void multiply(const Table& fresh) {
    start("multiply");
    Table grad(c.grad, 1, 1, c.width, layout());
    const double by = p.random.normal();
    std::memcpy(grad.row(0), fresh.row(n_ - 1), static_cast<size_t>(c.width * size_of(c.grad)));
    grad.seal(c.width, nullptr, true);
    isa_.kernels()->multiply(grad.row(0), c.grad, c.width, by);
    grad.unseal();
    report_.expect(grad.intact(), "bytes beside the product were written");
    for (int64_t j = 0; j < c.width; ++j) {
      const double x = decode(fresh.bits(n_ - 1, j), c.grad);
      const double product = c.grad == DType::f64
                                 ? x * by
                                 : static_cast<double>(static_cast<float>(x) *
                                                       static_cast<float>(by));
      const double rounded = decode(encode(product, c.grad), c.grad);
      const double got = decode(grad.bits(0, j), c.grad);
      const bool good = rounded != rounded ? got != got : got == rounded;
      if (!good) report_.expect(false, in_words("product", n_ - 1, j, got, rounded, 0));
    }
  }

  // ---- the passes one by one

  void split() {
    const Guarded s(3 * n_ * size(), p.random.chance(0.5)), t(3 * n_ * size(), true),
        one(3 * n_ * size(), true);
    stats("stats of the student", p.student, c.temperature, s);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(s, r, p.row(r).s);
    stats("stats of the teacher", p.teacher, c.temperature, t);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(t, r, p.row(r).t);
    stats("stats at T = 1", p.student, 1.0, one);
    for (int64_t r = 0; r < n_; ++r) truth_.stat(one, r, p.row(r).one);
    start("loss");
    Guarded both(2 * n_ * size(), p.random.chance(0.5)), slope(n_ * size(), true);
    fastkd::Args a = p.args();
    a.stats_s = s.data();
    a.stats_t = t.data();
    a.stats_hard = one.data();
    a.out = both.data();
    call(loss_, a, 0, n_, c.flush);
    report_.expect(both.intact(), "bytes beside the losses were written");
    for (int64_t r = 0; r < n_; ++r) {
      slope.as<T>()[r] = both.as<T>()[2 * r + 1];
      truth_.value_and_slope(r, both.as<T>()[2 * r], both.as<T>()[2 * r + 1]);
    }
    start("grad");
    slope.read_only();
    a.classes = c.classes;  // more than the columns here where the vocabulary is split
    Table grad(c.grad, c.a, c.b, c.width, layout());
    a.grad = grad.operand();
    a.slope = slope.data();
    a.out = nullptr;
    grad.seal(c.width, p.keep(), true);
    call(grad_, a, 0, n_, c.flush);
    grad.unseal();
    report_.expect(grad.intact(), "bytes beside the gradient were written");
    truth_.gradients(grad, c.classes);
  }

  void stats(const char* pass, const Table& x, double temperature, const Guarded& out) {
    start(pass);
    fastkd::Args a = p.args();
    a.student = x.operand();
    a.temperature = temperature;
    a.out = out.data();
    call(stats_, a, 0, n_, c.flush);
    out.read_only();
    report_.expect(out.intact(), "bytes beside the stats were written");
  }

  Problem<T>& p;
  const Case& c;
  const fastkd::Isa& isa_;
  Report& report_;
  Against<T> truth_;
  int64_t n_;
  fastkd::TeamRows bare_, fused_;  // without and with a gradient
  fastkd::Rows loss_, grad_, stats_;
};

// Whether one case holds on every instruction set that this processor runs.
template <class T>
void attempt_as(const Case& c, Report& report) {
  report.start(c, "no instruction set", "making the case");
  Problem<T> problem(c);
  for (const fastkd::Isa& isa : fastkd::all_isas())
    if (isa.runs) Trial<T>(problem, isa, report).run();
}

inline void attempt(const Case& c, Report& report) {
  if (c.wide()) {
    attempt_as<double>(c, report);
  } else {
    attempt_as<float>(c, report);
  }
}

}  // namespace check
