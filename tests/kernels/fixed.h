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

inline bool has_parameter(int divergence) {
  const std::string name = kDivergences[divergence];
  return name != "kl" && name != "reverse_kl" && name != "tv" && name != "acceptance";
}

// Cases of former faults, in every divergence and pair of dtypes. Returns how many.
inline int64_t regressions(uint64_t seed, Report& report) {
  Case late;  // what was kept of blocks that are -inf became NaN under a maximum far below 0
  late.vocab = 2100;
  late.b = 4;
  late.content = Content::late;
  Case tails;  // a product of alpha and a small probability was flushed, and divided by
  tails.vocab = 500;
  tails.temperature = 0.1;
  tails.flush = true;
  tails.content = Content::normal;
  Case cold;  // a factor of the gradient was more than a float, and columns without weight NaN
  cold.vocab = 40;
  cold.temperature = 1e-18;
  cold.content = Content::wide;
  Case outgrown;  // an infinite difference of columns that lose their weight to a later block
  outgrown.vocab = 4500;
  outgrown.b = 4;
  outgrown.temperature = 0.02;
  outgrown.content = Content::plateau;
  outgrown.of_teacher = Content::some_minus_inf;
  Case equal_terms;  // a sum of equal terms, one after the other in float, lost digits
  equal_terms.vocab = 4096;
  equal_terms.hard = 0.5;
  equal_terms.smoothing = 0.5;
  equal_terms.content = Content::plateau;
  Case flat;  // sums of equal terms again: sides that are equal overlapped by less than 1
  flat.vocab = 4096;
  flat.b = 4;
  flat.temperature = 4.0;
  flat.content = Content::plateau;
  flat.equal = true;
  Case
      heavy;  // a factor times a difference of scores was more than a float, and what they made not
  heavy.vocab = 3;
  heavy.b = 40;
  heavy.temperature = 1e-5;
  heavy.factor = 1e25;
  heavy.content = Content::peaked;
  heavy.of_teacher = Content::wide;
  int64_t number = 0;
  for (const Case& once : {late, tails, cold, outgrown, equal_terms, flat, heavy}) {
    for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
      for (const Pair& pair : kPairs) {
        for (double param : {0.1, 1.0 - 1e-6}) {
          if (param != 0.1 && (pair.student == DType::f64 || !has_parameter(divergence))) continue;
          Case c = once;
          c.seed = seed + static_cast<uint64_t>(number++);
          c.divergence = divergence;
          c.param = param;
          c.student = c.grad = pair.student;
          c.teacher = pair.teacher;
          c.width = c.classes = c.vocab;
          check_case(c, report);
        }
      }
    }
  }
  return number;
}

// turn: takes one of the four around each of the larger sizes.
inline std::vector<int64_t> small_vocabs(int64_t turn) {
  std::vector<int64_t> all;
  for (int64_t v = 1; v <= 40; ++v) all.push_back(v);
  for (int64_t at : {64, 128, 256})
    for (int64_t v = at - 1; v <= at + 2; ++v) all.push_back(v);
  for (int64_t at : {512, 1024, 2048, 4096}) all.push_back(at - 1 + turn++ % 4);
  return all;
}

// Top-k teachers of every kind. Returns how many cases.
inline int64_t topk_cases(Report& report) {
  uint64_t seed = 1;
  int64_t number = 0;
  for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
    for (TeacherKind kind : {TeacherKind::bucket, TeacherKind::renormalize, TeacherKind::restricted,
                             TeacherKind::drop}) {
      for (const Pair& pair : kPairs) {
        Case c;
        c.divergence = divergence;
        c.kind = kind;
        c.student = c.grad = pair.student;
        c.teacher = pair.teacher;
        const auto run = [&](int64_t vocab, int64_t k, Content content, Mass mass,
                             double temperature = 1.0) {
          c.seed = seed++;
          c.vocab = c.classes = vocab;
          c.width = vocab + (number % 3 == 0 ? 5 : 0);
          c.k = k;
          c.temperature = number % 2 == 0 ? temperature : 2.0 * temperature;
          c.param = number % 5 < 3 ? 0.5 : 0.1;
          c.hard = number % 3 == 1 ? 0.25 : 0.0;
          c.soft = 1.0 - c.hard;
          c.smoothing = number % 6 == 1 ? 0.1 : 0.0;
          c.scale = number % 4 == 1;
          c.keep = number % 7 == 3;
          c.threads = number % 16 == 5 || vocab > fastkd::kChunk;
          c.flush = number % 13 == 7;
          c.content = content;
          c.mass = mass;
          ++number;
          check_case(c, report);
        };
        static const int64_t sizes[] = {1, 15, 16, 17, 31, 32, 33, 257};
        static const int64_t large[] = {2047, 2049, 4096, 8191, 8193, 16386};
        run(sizes[number % 8], number % 3 + 1, Content::flat, Mass::drawn);
        run(c.wide() ? 300 : large[number % 6], 64, Content::normal, Mass::student);
        for (int mass = 0; mass <= int(Mass::any); ++mass) {
          const int64_t content = number % int(Content::count);
          run(75, number % 4 == 0 ? 80 : 12, static_cast<Content>(content),
              static_cast<Mass>(mass));
        }
        // little left of the student's row: less than float32 holds beside the most probable column
        run(75, 60, Content::peaked, Mass::drawn, 0.1);
        // the maximum of a row far below 0 beside a rest that is -inf everywhere made NaN
        run(33, 40, Content::late, Mass::drawn);
      }
    }
  }
  return number;
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
        c.threads = number % 16 == 5 || vocab > fastkd::kChunk;
        c.flush = number % 13 == 7;
        c.equal = number % 11 == 4;
        c.content = content;
        ++number;
        check_case(c, report);
      };
      // long double takes its time where it is software (aarch64): fewer long rows of float64
      for (int64_t vocab : small_vocabs(divergence + (&pair - kPairs)))
        if (!c.wide() || vocab <= 40 || vocab % 9 == 0) run(vocab, Content::flat);
      for (int content = 0; content < int(Content::count); ++content)
        run(75, static_cast<Content>(content));
      c.b = 1;
      static const int64_t large[] = {8191, 8193, 16383, 16385, 16386, 33000};
      run(c.wide() ? fastkd::kChunk + 1 : large[(number / 3) % 6], Content::flat);
      c.b = 2;
    }
  }
  return number + regressions(seed, report) + topk_cases(report);
}

}  // namespace check
