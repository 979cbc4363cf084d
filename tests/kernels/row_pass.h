// Runs one case through a pass that computes losses and gradients together. The results are
// compared with the definitions, and bit for bit with other ways of the same call.
#pragma once

#include <thread>

#include "call.h"
#include "compare.h"

namespace check {

template <class T>
class RowPass {
 public:
  RowPass(Batch<T>& problem, const fastkd::Isa& isa, Report& report)
      : p(problem),
        c(problem.c),
        isa_(isa),
        report_(report),
        truth_(problem, report),
        n_(c.rows()) {}
  virtual ~RowPass() = default;

  void run() {
    const fastkd::ThreadedPass none = kernel(false);
    fused_ = kernel(true);
    if (fused_ == nullptr || none == nullptr) return;  // float64 is the baseline's alone
    no_gradient(none);
    Table fresh(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fused("fused", fresh, loss, false);
    truth_.losses(loss);
    truth_.gradients(fresh, c.vocab);
    again("the same again", fresh, loss, false);
    again("streamed", fresh, loss, true);
    if (p.refill_dropped()) again("other numbers in dropped rows", fresh, loss, false);
    if (c.threads) on_threads(fresh, loss);
    if (p.random.chance(0.2)) without_scratch();
    if (c.grad == c.student) in_place("in place", fresh, loss, false);
    check_more(fresh, loss);
  }

 protected:
  static constexpr int64_t size() { return int64_t{sizeof(T)}; }
  Layout layout() { return draw_layout(p.random, false); }

  virtual fastkd::ThreadedPass kernel(bool gradient) const = 0;
  // Further checks of this case.
  virtual void check_more(const Table& fresh, const Guarded& loss) = 0;
  // Checks the result of a call that got no scratch.
  virtual void check_without_scratch(const Table& grad, const Guarded& loss) = 0;

  void start(const char* pass) { report_.start(c, isa_.name, pass); }

  void no_gradient(fastkd::ThreadedPass kernel) {
    start("fused without a gradient");
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fastkd::Args a = p.args();
    a.out = loss.data();
    call(kernel, a, 0, n_, c.flush);
    report_.expect(loss.intact(), "bytes beside the losses were written");
    truth_.losses(loss);
  }

  void fused(const char* pass, const Table& grad, const Guarded& loss, bool stream) {
    start(pass);
    fastkd::Args a = p.args();
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
    fused(pass, grad, loss, stream);
    same(grad, loss, fresh, first);
  }

  // Rows over threads, and the chunks of a row over threads: the bits stay the same.
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
    std::thread other([&] { call(fused_, a, at, n_, c.flush, Backwards::pool(threads)); });
    call(fused_, a, 0, at, c.flush);
    other.join();
    grad.unseal();
    finish(grad, loss);
    same(grad, loss, fresh, first);
  }

  // As where memory is short.
  void without_scratch() {
    scratch_given = false;
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    fused("fused without a scratch", grad, loss, false);
    scratch_given = true;
    check_without_scratch(grad, loss);
  }

  void in_place(const char* pass, const Table& fresh, const Guarded& first, bool alias) {
    Table grad(c.grad, c.a, c.b, c.width, layout());
    Guarded loss(n_ * size(), p.random.chance(0.5));
    p.unseal();
    for (int64_t r = 0; r < n_; ++r)
      std::memcpy(grad.row(r), p.student.row(r), static_cast<size_t>(c.vocab * size_of(c.student)));
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

  Batch<T>& p;
  const Case& c;
  const fastkd::Isa& isa_;
  Report& report_;
  Comparison<T> truth_;
  int64_t n_;

 private:
  fastkd::ThreadedPass fused_ = nullptr;
};

}  // namespace check
