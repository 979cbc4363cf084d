// exp2, log and the half precisions of every instruction set, against the C library in double.
#pragma once

#include <vector>

#include "trial.h"

namespace check {

// Largest error in units in the last place of the exact result.
template <class F>
double worst_ulp(void (*ours)(const float*, float*, int64_t), F exact,
                 const std::vector<float>& x) {
  std::vector<float> y(x.size());
  ours(x.data(), y.data(), static_cast<int64_t>(x.size()));
  double worst = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double truth = exact(static_cast<double>(x[i]));
    int exponent;
    std::frexp(truth, &exponent);
    worst = std::fmax(worst, std::fabs(y[i] - truth) / std::ldexp(1.0, exponent - 24));
  }
  return worst;
}

inline std::vector<float> between(double a, double b, bool logarithmic) {
  Random random{7};
  std::vector<float> x;
  for (int i = 0; i < 100000; ++i)
    x.push_back(static_cast<float>(logarithmic ? a * std::pow(b / a, random.unit())
                                               : a + (b - a) * random.unit()));
  return x;
}

inline void functions(const fastkd::Isa& isa, Report& report) {
  report.about = std::string(isa.name) + ", exp2 and log";
  const fastkd::Kernels* k = isa.kernels();
  for (double low : {-126.0, -24.0, -1.0, -1e-6}) {
    const double ulp = worst_ulp(
        k->exp2, [](double x) { return std::exp2(x); }, between(low, low < -1 ? 1.0 : -low, false));
    report.expect(ulp <= fastkd::kExp2Ulp, "exp2 is wrong by " + std::to_string(ulp) + " ulp");
  }
  for (double low : {1.2e-38, 1e-3, 0.5, 1.0 - 1e-4, 1.0}) {
    std::vector<float> x = between(low, low < 1e-30 ? 1e30 : 2.0 - low + 1e-4, true);
    for (float& v : x)
      if (v == 1.0f) v = 2.0f;
    const double ulp = worst_ulp(k->log, [](double v) { return std::log(v); }, x);
    report.expect(ulp <= fastkd::kLogUlp, "log is wrong by " + std::to_string(ulp) + " ulp");
  }
  const float ends[] = {0.0f, 1.0f, -1.0f, -126.0f, -128.0f, -1e9f, -INFINITY, NAN};
  const float powers[] = {1.0f, 2.0f, 0.5f, 1.17549435e-38f, 0.0f, 0.0f, 0.0f, NAN};
  float got[8];
  k->exp2(ends, got, 8);
  for (int i = 0; i < 8; ++i)
    report.expect(got[i] == powers[i] || (powers[i] != powers[i] && got[i] != got[i]),
                  "exp2 of " + std::to_string(ends[i]));
  const float one = 1.0f;
  k->log(&one, got, 1);
  report.expect(got[0] == 0.0f, "log of 1");
}

// Every number of 16 bits: read exactly (the maximum of one column), and written rounded to
// nearest.
inline void halves(const fastkd::Isa& isa, Report& report) {
  for (DType dtype : {DType::bf16, DType::f16}) {
    report.about = std::string(isa.name) + ", every " + name_of(dtype);
    std::vector<uint16_t> every(65536);
    for (size_t i = 0; i < every.size(); ++i) every[i] = static_cast<uint16_t>(i);
    std::vector<float> stats(3 * every.size());
    fastkd::Args a;
    a.student = {reinterpret_cast<char*>(every.data()), dtype, 65536, 0, 1};
    a.vocab = 1;
    a.out = stats.data();
    for (bool flush : {false, true}) {
      call(isa.kernels()->stats[0], a, 0, 65536, flush);
      for (size_t i = 0; i < every.size(); ++i) {
        const double x = decode(i, dtype);
        if (!(std::fabs(x) < kInf)) continue;
        const float* row = stats.data() + 3 * i;
        const bool subnormal = std::fabs(x) < std::numeric_limits<float>::min();
        const bool read = row[0] == x || (subnormal && row[0] == 0.0f);
        if (!read || row[1] != 1.0f || row[2] != 0.0f)
          report.expect(false, "stats of the number " + std::to_string(i) +
                                   (flush ? ", subnormals flushed" : ""));
      }
    }
    // in one piece, and in pieces that are shorter than any vector
    for (int64_t piece : {65536, 7}) {
      for (double by : {0.7, 1.0009765625, 3.0, 1e-4, 300.0}) {
        std::vector<uint16_t> product = every;
        for (int64_t i = 0; i < 65536; i += piece)
          isa.kernels()->multiply(reinterpret_cast<char*>(product.data() + i), dtype,
                                  std::min(piece, 65536 - i), by);
        for (size_t i = 0; i < every.size(); ++i) {
          const double exact = static_cast<float>(decode(i, dtype)) * static_cast<float>(by);
          const double got = decode(product[i], dtype);
          const bool good = exact == exact ? product[i] == encode(exact, dtype) : got != got;
          if (!good)
            report.expect(false, "number " + std::to_string(i) + " times " + std::to_string(by));
        }
      }
    }
  }
}

}  // namespace check
