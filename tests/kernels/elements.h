// The passes over losses of one logit each, between guard pages, against their definition.
#pragma once

#include "call.h"
#include "compare.h"
#include "isas.h"

namespace check {

using fastkd::BernoulliArgs;
using fastkd::LabelKind;
using Real = long double;

inline Real log_sigmoid(Real x) {
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}

struct Sides {  // a probability of yes and of no, and their logarithms
  Real log_yes, log_no, yes, no;
  explicit Sides(Real x)
      : log_yes(log_sigmoid(x)), log_no(log_sigmoid(-x)), yes(std::exp(log_yes)),
        no(std::exp(log_no)) {}
};

struct Element {
  Real value = 0, by_s = 0, by_t = 0, size = 1;  // size: of what was added up
};

// soft D(sigmoid(t / T), sigmoid(s / T)) + hard BCE(y, s), and its slopes.
inline Element element(const BernoulliArgs& a, Real s, Real t, Real y, Real pos) {
  const Real temperature = static_cast<Real>(a.temperature), soft = static_cast<Real>(a.soft);
  const Real hard = static_cast<Real>(a.hard), beta = static_cast<Real>(a.param);
  const Sides p(t / temperature), q(s / temperature), own(s);
  Element e;
  e.size += (std::fabs(s) + std::fabs(t)) * (1 + 1 / temperature) * (soft + hard);
  const auto kl = [](const Sides& x, const Sides& z) {
    return x.yes * (x.log_yes - z.log_yes) + x.no * (x.log_no - z.log_no);
  };
  const auto rate = [](const Sides& x, Real log_yes, Real log_no) {
    return x.yes * x.no * ((x.log_yes - log_yes) - (x.log_no - log_no));
  };
  Real value, by_s, by_t;
  if (a.divergence == 1) {
    value = kl(p, q), by_t = rate(p, q.log_yes, q.log_no), by_s = q.yes * p.no - p.yes * q.no;
  } else if (a.divergence == 2) {
    value = kl(q, p), by_s = rate(q, p.log_yes, p.log_no), by_t = p.yes * q.no - q.yes * p.no;
  } else {
    Sides m(0);
    m.log_yes = std::log(beta * p.yes + (1 - beta) * q.yes);
    m.log_no = std::log(beta * p.no + (1 - beta) * q.no);
    value = beta * kl(p, m) + (1 - beta) * kl(q, m);
    by_t = beta * rate(p, m.log_yes, m.log_no);
    by_s = (1 - beta) * rate(q, m.log_yes, m.log_no);
  }
  if (soft != 0) {
    e.value = soft * value;
    e.by_s = soft / temperature * by_s;
    e.by_t = soft / temperature * by_t;
  }
  if (hard != 0) {
    e.value -= hard * (pos * y * own.log_yes + (1 - y) * own.log_no);
    e.by_s += hard * ((1 - y) * own.yes - pos * y * own.no);
  }
  return e;
}

// One call of `bernoulli` and one of `counted`, with everything that they take.
template <class T>
class ElementProblem {
  static constexpr DType kAcc = sizeof(T) == 8 ? DType::f64 : DType::f32;

 public:
  ElementProblem(uint64_t seed, int64_t n, DType student, DType teacher, int divergence)
      : n_(n), random_{seed}, at_end_(random_.chance(0.5)), s_(n * size_of(student), at_end_),
        t_(n * size_of(teacher), at_end_), grad_s_(s_.bytes(), at_end_),
        grad_t_(t_.bytes(), at_end_), values_(n * kSize, at_end_), upstream_(n * kSize, at_end_) {
    a_.student_dtype = student, a_.teacher_dtype = teacher;
    a_.divergence = divergence == 0 ? 1 : divergence;
    a_.param = random_.chance(0.5) ? 0.5 : 0.1;
    a_.temperature = random_.chance(0.5) ? 2.0 : 0.5;
    a_.soft = divergence == 0 ? 0.0 : 0.7;
    a_.hard = divergence == 0 || random_.chance(0.5) ? 0.3 : 0.0;
    a_.factor = 1.7;
    a_.ignored = ignored_, a_.ignored_count = 2;
    for (int64_t i = 0; i < n; ++i) {
      const double logit = random_.normal() * (random_.chance(0.1) ? 30.0 : 3.0);
      put(s_, student, i, logit);
      put(t_, teacher, i, random_.chance(0.1) ? logit : 3.0 * random_.normal());
      put(upstream_, kAcc, i, random_.normal());
    }
    labels();
    weight_ = factor(a_.weight), pos_ = factor(a_.pos_weight);
    a_.student = s_.data(), a_.teacher = t_.data();
    a_.grad_s = grad_s_.data(), a_.grad_t = grad_t_.data(), a_.values = values_.data();
    if (random_.chance(0.5)) a_.upstream = upstream_.data();
    for (const Guarded* x : {&s_, &t_, &upstream_}) x->read_only();
  }

  void run(const fastkd::Isa& isa, Report& report) {
    const fastkd::Kernels& first = *fastkd::all_isas()[0].kernels();
    a_.read_labels = first.read_labels[kWide];
    double sum, counted;
    {
      const Flushing flushing(random_.chance(0.2));
      sum = isa.kernels()->bernoulli[kWide](a_, 0, n_);
      counted = first.counted[kWide](a_, 0, n_);
    }
    Real total = 0, slacks = 0, weights = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const bool kept = y_[static_cast<size_t>(i)] == y_[static_cast<size_t>(i)];
      const Real w = of(weight_, a_.weight, i);
      const Real up = a_.upstream == nullptr ? 1 : get(upstream_, kAcc, i);
      Element e;
      if (kept)
        e = element(a_, get(s_, a_.student_dtype, i), get(t_, a_.teacher_dtype, i),
                    y_[static_cast<size_t>(i)], of(pos_, a_.pos_weight, i));
      const Real by = w * up * static_cast<Real>(a_.factor);
      const Real slack = 24 * std::numeric_limits<T>::epsilon() * e.size * (1 + std::fabs(by));
      weights += kept ? w : 0;
      total += w * up * e.value, slacks += slack;
      one(report, "value", i, get(values_, kAcc, i), w * up * e.value, slack, kAcc, kept);
      one(report, "student", i, get(grad_s_, a_.student_dtype, i), by * e.by_s, slack,
          a_.student_dtype, kept);
      one(report, "teacher", i, get(grad_t_, a_.teacher_dtype, i), by * e.by_t, slack,
          a_.teacher_dtype, kept);
    }
    report.expect(std::fabs(sum - total) <= slacks, describe("sum", 0, 0, sum, total, slacks));
    report.expect(std::fabs(counted - weights) <= 1e-12L * n_, "the sum of the weights");
    for (const Guarded* x : {&grad_s_, &grad_t_, &values_})
      report.expect(x->intact(), "memory beside an output was written");
    if (a_.label_kind == LabelKind::none) return;
    labels_->open();
    put_label(random_.below(n_), 2.0);
    report.expect(first.counted[kWide](a_, 0, n_) == -kInf, "a label of 2 was counted");
  }

 private:
  static constexpr bool kWide = sizeof(T) == 8;
  static constexpr int64_t kSize = sizeof(T);

  static void put(const Guarded& x, DType dtype, int64_t i, double value) {
    write_bits(x.data() + i * size_of(dtype), dtype, encode(value, dtype));
  }
  static Real get(const Guarded& x, DType dtype, int64_t i) {
    return static_cast<Real>(decode(read_bits(x.data() + i * size_of(dtype), dtype), dtype));
  }

  int64_t label_size() const {
    static const int64_t sizes[] = {4, 2, 2, 8, 8, 4, 2, 1, 1};
    return sizes[static_cast<int>(a_.label_kind)];
  }
  void put_label(int64_t i, double y) {
    const int kind = static_cast<int>(a_.label_kind);
    if (kind < 4) return put(*labels_, static_cast<DType>(kind), i, y);
    const int64_t whole = static_cast<int64_t>(y), size = label_size();
    std::memcpy(labels_->data() + i * size, &whole, static_cast<size_t>(size));
  }
  // 0, 1, a quarter where there are fractions; left out by either number, or NaN.
  void labels() {
    a_.label_kind = static_cast<LabelKind>(random_.below(a_.hard != 0.0 ? 9 : 10));
    y_.assign(static_cast<size_t>(n_), 0.0);
    if (a_.label_kind == LabelKind::none) return;
    const bool floats = static_cast<int>(a_.label_kind) < 4;
    labels_.reset(new Guarded(n_ * label_size(), at_end_));
    for (int64_t i = 0; i < n_; ++i) {
      static const double some[] = {0.0, 1.0, 1.0, 0.25, 100.0, -100.0, kNaN};
      const int64_t which = random_.below(floats ? 7 : a_.label_kind == LabelKind::u8 ? 5 : 6);
      const double y = !floats && which == 3 ? 0.0 : some[which];
      put_label(i, y);
      y_[static_cast<size_t>(i)] = y == 100.0 || y == -100.0 ? kNaN : y;
      if (y_[static_cast<size_t>(i)] == y) continue;
      // what is left out may hold anything
      put(s_, a_.student_dtype, i, kNaN), put(t_, a_.teacher_dtype, i, kInf);
    }
    a_.labels = labels_->data();
    labels_->read_only();
  }

  std::unique_ptr<Guarded> factor(fastkd::Factor& f) {
    if (random_.chance(0.3)) return nullptr;
    f.repeat = random_.chance(0.5) ? 1 : random_.between(1, n_);
    f.count = random_.chance(0.3) ? 1 : random_.between(1, (n_ + f.repeat - 1) / f.repeat);
    std::unique_ptr<Guarded> data(new Guarded(f.count * kSize, at_end_));
    for (int64_t i = 0; i < f.count; ++i) put(*data, kAcc, i, random_.unit());
    data->read_only();
    f.data = data->data();
    return data;
  }
  static Real of(const std::unique_ptr<Guarded>& data, const fastkd::Factor& f, int64_t i) {
    return data == nullptr ? 1 : get(*data, kAcc, i / f.repeat % f.count);
  }

  void one(Report& report, const char* what, int64_t i, Real got, Real exact, Real slack,
           DType dtype, bool kept) {
    const bool good = kept ? stands_for<T, Real>(static_cast<double>(got), exact, slack, dtype)
                           : got == 0;
    report.expect(good, describe(what, 0, i, got, kept ? exact : 0, slack));
  }

  int64_t n_;
  Random random_;
  bool at_end_;
  BernoulliArgs a_;
  Guarded s_, t_, grad_s_, grad_t_, values_, upstream_;
  std::unique_ptr<Guarded> labels_, weight_, pos_;
  std::vector<double> y_;  // NaN where left out
  const int64_t ignored_[2] = {-100, 100};
};

// Returns how many.
inline int64_t elements(const fastkd::Isa& isa, Report& report) {
  static const int64_t sizes[] = {1, 7, 15, 16, 17, 33, 255, 511, 512, 513, 1025};
  const bool baseline = isa.kernels() == fastkd::all_isas()[0].kernels();
  int64_t number = 0;
  for (int divergence = 0; divergence < 4; ++divergence)
    for (const DType student : kDTypes)
      for (const DType teacher : kDTypes)
        for (const int64_t n : sizes) {
          const bool wide = student == DType::f64 || teacher == DType::f64;
          if (wide && !baseline) continue;
          const uint64_t seed = static_cast<uint64_t>(++number);
          std::snprintf(current_case, sizeof current_case,
                        "%s, bernoulli: seed %lld, divergence %d, student %s, teacher %s, n %lld",
                        isa.name, static_cast<long long>(seed), divergence, name_of(student),
                        name_of(teacher), static_cast<long long>(n));
          report.about = current_case;
          if (wide)
            ElementProblem<double>(seed, n, student, teacher, divergence).run(isa, report);
          else
            ElementProblem<float>(seed, n, student, teacher, divergence).run(isa, report);
        }
  return number;
}

}  // namespace check
