// The cases that always run: shapes around every edge of the loops, and whatever was once wrong.
#pragma once

#include <vector>

#include "trial.h"

namespace check {

struct Pair {
  DType student, teacher;
};
constexpr Pair kPairs[] = {
    {DType::f32, DType::f32},  {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
    {DType::f64, DType::f64},  {DType::bf16, DType::f32},  {DType::f32, DType::bf16},
    {DType::f16, DType::bf16}, {DType::f64, DType::f32},   {DType::f16, DType::f64},
};

// Rows whose first blocks are -inf and whose maximum is far below 0: what an expectation keeps from
// such a block is 0, and stays 0 under a maximum that is smaller than the 0 it was shifted by.
inline int64_t late_maxima(uint64_t seed, Report& report) {
  int64_t number = 0;
  for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
    for (const Pair& pair : kPairs) {
      Case c;
      c.seed = seed + static_cast<uint64_t>(number++);
      c.divergence = divergence;
      c.student = c.grad = pair.student;
      c.teacher = pair.teacher;
      c.vocab = c.width = c.classes = 2100;
      c.b = 4;
      c.content = Content::late;
      attempt(c, report);
    }
  }
  return number;
}

// Torch's switch for subnormal numbers, where tails of probabilities meet a small parameter.
inline int64_t flushed_tails(uint64_t seed, Report& report) {
  int64_t number = 0;
  for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
    for (double param : {0.1, 0.9, 1e-6}) {
      for (const Pair& pair : kPairs) {
        Case c;
        c.seed = seed + static_cast<uint64_t>(number++);
        c.divergence = divergence;
        c.student = c.grad = pair.student;
        c.teacher = pair.teacher;
        c.vocab = c.width = c.classes = 500;
        c.temperature = 0.1;
        c.param = param;
        c.flush = true;
        c.content = Content::normal;
        attempt(c, report);
      }
    }
  }
  return number;
}

inline std::vector<int64_t> small_vocabs() {
  std::vector<int64_t> all;
  for (int64_t v = 1; v <= 40; ++v) all.push_back(v);
  for (int64_t at : {64, 128, 256, 512, 1024, 2048, 4096})
    for (int64_t v = at - 1; v <= at + 2; ++v) all.push_back(v);
  return all;
}

// Returns how many.
inline int64_t fixed_cases(Report& report) {
  uint64_t seed = 1;
  int64_t number = 0;
  for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
    for (const Pair& pair : kPairs) {
      Case c;
      c.divergence = divergence;
      c.student = c.grad = pair.student;
      c.teacher = pair.teacher;
      const auto run = [&](int64_t vocab, Content content) {
        c.seed = seed++;
        c.vocab = c.classes = vocab;
        c.width = vocab + (number % 3 == 0 ? 5 : 0);
        c.temperature = number % 2 == 0 ? 1.0 : 2.0;
        c.param = number % 5 < 3 ? 0.5 : 0.1;
        c.hard = number % 3 == 1 ? 0.25 : 0.0;
        c.soft = 1.0 - c.hard;
        c.smoothing = number % 6 == 1 ? 0.1 : 0.0;
        c.scale = number % 4 == 1;
        c.keep = number % 7 == 3;
        c.threads = number % 16 == 5;
        c.flush = number % 13 == 7;
        c.equal = number % 11 == 4;
        c.content = content;
        ++number;
        attempt(c, report);
      };
      for (int64_t vocab : small_vocabs())
        if (!c.wide() || vocab <= 40 || vocab % 3 == 0) run(vocab, Content::flat);
      for (int content = 0; content < int(Content::count); ++content)
        run(75, static_cast<Content>(content));
      c.b = 1;
      static const int64_t large[] = {16383, 16384, 16385, 16386, 33000};
      run(large[(number / 3) % 5], Content::flat);
      c.b = 2;
    }
  }
  return number + late_maxima(seed, report) + flushed_tails(seed, report);
}

}  // namespace check
