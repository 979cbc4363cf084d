// Compares results with the definitions, and reports those that differ.
#pragma once

#include <string>

#include "problem.h"

namespace check {

// The current case, for the report of a crash.
inline char current_case[640] = "nothing";

struct Report {
  std::string about;
  int failures = 0;

  void start(const Case& c, const char* isa, const char* pass) {
    about = std::string(isa) + ", " + pass + ": " + c.text();
    std::snprintf(current_case, sizeof current_case, "%s", about.c_str());
  }
  // Prints the first failure of a pass, for the first 12 passes; the others are only counted.
  void expect(bool good, const std::string& what) {
    if (good) return;
    ++failures;
    if (about == last_shown || ++shown > 12) return;
    last_shown = about;
    std::printf("FAILED %s\n  in %s\n", what.c_str(), about.c_str());
  }
  std::string last_shown;
  int shown = 0;
};

inline std::string describe(const char* what, int64_t row, int64_t column, long double got,
                            long double exact, long double slack) {
  char text[200];
  std::snprintf(text, sizeof text, "%s of row %lld column %lld: %.17Lg, expected %.17Lg +- %.3Lg",
                what, static_cast<long long>(row), static_cast<long long>(column), got, exact,
                slack);
  return text;
}

// Whether `got`, stored as `dtype` by kernels that accumulate in T, may stand for the truth.
template <class T, class R>
bool stands_for(double got, R exact, R slack, DType dtype) {
  if (exact != exact) return got != got;
  if (exact == R(kInf) || exact == -R(kInf)) return static_cast<R>(got) == exact;
  const Format f = format_of(dtype);
  const R narrow = std::min(static_cast<R>(f.largest()), R(std::numeric_limits<T>::max()));
  // subnormal numbers may be flushed: in T, and of a result all but those of f16
  const R stored = static_cast<R>(dtype == DType::f16 ? f.smallest() : f.smallest_normal());
  const R tiny = R(2) * (stored + std::numeric_limits<T>::min());
  const R allowed = slack + static_cast<R>(f.unit()) * std::fabs(exact) + tiny;
  if (std::fabs(got) == kInf) return (got > 0 ? exact : -exact) + allowed >= narrow;
  return std::fabs(static_cast<R>(got) - exact) <= allowed;
}

template <class T>
class Comparison {
  using R = typename Batch<T>::R;
  static constexpr DType kOut = sizeof(T) == 8 ? DType::f64 : DType::f32;

 public:
  Comparison(const Batch<T>& problem, Report& report)
      : p(problem), c(problem.c), report_(report), n_(c.rows()) {}

  void losses(const Guarded& loss) {
    for (int64_t r = 0; r < n_; ++r) {
      const T got = loss.as<T>()[r];
      const auto& row = p.row(r);
      const auto& of = row.of;
      R exact = R(0), slack = R(0);
      if (p.kept(r) && !row.dead) {
        if (of.vague) continue;
        if (c.soft == 0.0 && !(of.value.value < R(kInf))) continue;
        exact = static_cast<R>(c.soft) * of.value.value;
        slack = static_cast<R>(c.soft) * of.value.slack;
        if (c.hard != 0.0) {
          exact += static_cast<R>(c.hard) * of.hard.value;
          slack += static_cast<R>(c.hard) * of.hard.slack;
        }
        exact += of.z.value;
        slack += of.z.slack;
        if (of.broken) exact = std::numeric_limits<R>::quiet_NaN();
      }
      report_.expect(stands_for<T>(got, exact, slack, kOut),
                     describe("loss", r, 0, got, exact, slack));
      if (exactly_nothing(r))
        report_.expect(got == T(0), describe("loss of equal sides", r, 0, got, 0, 0));
    }
  }

  // Label smoothing is spread over so many classes.
  void gradients(const Table& grad, int64_t classes) {
    const R uniform = static_cast<R>(c.smoothing) / static_cast<R>(classes);
    for (int64_t r = 0; r < n_; ++r) {
      const auto& row = p.row(r);
      for (int64_t j = c.vocab; j < c.width; ++j) one(grad, r, j, R(0), R(0));
      if (!p.kept(r) || row.dead) {
        for (int64_t j = 0; j < c.vocab; ++j) one(grad, r, j, R(0), R(0));
        continue;
      }
      const R factor = p.factor(r), soft = static_cast<R>(c.soft) / static_cast<R>(c.temperature);
      const bool broken = row.of.broken || factor != factor;
      if (!broken && (row.of.vague || row.of.no_gradient)) continue;
      for (int64_t j = 0; j < c.vocab; ++j) {
        if (broken) {
          one(grad, r, j, std::numeric_limits<R>::quiet_NaN(), R(0));
          continue;
        }
        const size_t i = static_cast<size_t>(j);
        R exact = soft * row.of.soft_grad[i].value, slack = soft * row.of.soft_grad[i].slack;
        if (c.hard != 0.0) {
          exact += static_cast<R>(c.hard) * (row.of.hard_grad[i].value - uniform);
          slack +=
              static_cast<R>(c.hard) * (row.of.hard_grad[i].slack +
                                        R(kUnits<T>) * std::numeric_limits<T>::epsilon() * uniform);
        }
        if (c.z != 0.0) {
          exact += row.of.z_grad[i].value;
          slack += row.of.z_grad[i].slack;
        }
        if (exactly_nothing(r)) exact = slack = R(0);
        slack *= std::fabs(factor);
        if (!exactly_nothing(r))
          slack += R(2) * std::numeric_limits<T>::min() * row.of.steepness[i];
        one(grad, r, j, factor * exact, slack);
      }
    }
  }

  void stat(const Guarded& out, int64_t r, const Softmax<R>& side) {
    const T top = out.as<T>()[3 * r], sum = out.as<T>()[3 * r + 1], below = out.as<T>()[3 * r + 2];
    if (!p.kept(r)) {
      report_.expect(top == T(0) && sum == T(0) && below == T(0), "stats of a dropped row");
    } else if (side.broken) {
      report_.expect(sum != sum, describe("sum of a row with NaN", r, 0, sum, NAN, 0));
    } else {
      // a subnormal logit may count as 0
      const R flushed = R(std::numeric_limits<float>::min());
      report_.expect(static_cast<R>(top) == side.top || std::fabs(top - side.top) <= flushed,
                     describe("maximum", r, 0, top, side.top, flushed));
      report_.expect(stands_for<T>(sum, side.sum, side.sum_slack, kOut),
                     describe("sum", r, 0, sum, side.sum, side.sum_slack));
      // blocks are summed in T, and may overflow there where the whole does not
      if (side.empty || std::fabs(side.below.value) > std::numeric_limits<T>::max() / 4) return;
      const R slack = side.below.slack + R(2 * c.vocab) * flushed;
      report_.expect(stands_for<T>(below, side.below.value, slack, kOut),
                     describe("sum below", r, 0, below, side.below.value, slack));
    }
  }

  void value_and_slope(int64_t r, T value, T slope) {
    const auto& row = p.row(r);
    const auto& of = row.of;
    const bool one_empty = p.kept(r) && row.s.empty != row.t.empty;
    // with a term at T = 1 the row has no loss, and what of that stands here does not matter
    if (p.kept(r) && row.s.empty && row.t.empty && c.at_one()) return;
    if (!p.kept(r) || (row.s.empty && row.t.empty)) {
      report_.expect(value == T(0) && slope == T(0),
                     describe("value or slope where there is nothing", r, 0, value, 0, 0));
    } else if (of.broken || one_empty) {
      report_.expect(value != value, describe("value of a broken row", r, 0, value, NAN, 0));
    } else if (!of.vague) {
      report_.expect(stands_for<T>(value, of.sum.value, of.sum.slack, kOut),
                     describe("value", r, 0, value, of.sum.value, of.sum.slack));
      if (!of.no_gradient)
        report_.expect(stands_for<T>(slope, of.slope.value, of.slope.slack, kOut),
                       describe("slope", r, 0, slope, of.slope.value, of.slope.slack));
    }
  }

 private:
  bool exactly_nothing(int64_t r) const {
    const std::string name = kDivergences[c.divergence];
    const auto& row = p.row(r);
    // of two dtypes one may be flushed where the other is not
    if (c.flush && c.student != c.teacher) return false;
    return p.kept(r) && row.equal && !row.of.broken && !c.at_one() &&
           (name == "kl" || name == "reverse_kl" || name == "tv" || name == "acceptance");
  }

  void one(const Table& grad, int64_t r, int64_t j, R exact, R slack) {
    const double got = decode(grad.bits(r, j), c.grad);
    const bool good =
        exact == R(0) && slack == R(0) ? got == 0.0 : stands_for<T>(got, exact, slack, c.grad);
    if (!good) report_.expect(false, describe("gradient", r, j, got, exact, slack));
  }

  const Batch<T>& p;
  const Case& c;
  Report& report_;
  int64_t n_;
};

}  // namespace check
