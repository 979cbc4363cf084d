// One case: its seed and settings determine everything, so that a seed repeats it.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "guard.h"

namespace check {

using fastkd::kDivergenceCount;
using fastkd::kDivergences;

enum class Content {
  normal,  // 3 x randn
  flat,    // 0.1 x randn: every column counts
  wide,    // uniform in +-1e4
  far,     // ordinary differences far from 0
  peaked,  // nearly all mass on one column
  ties,    // few different values
  constant,
  plateau,    // one number in all columns but one
  masked,     // a third of the columns -inf, on both sides alike
  one_hot,    // -inf everywhere but in one column
  late,       // -inf up to a column of the last quarter, then numbers far below or above 0
  subnormal,  // numbers below the dtype's normal ones, and 0
  largest,    // the largest finite number, of either sign
  finite,     // bits of any finite number
  count_of_numbers,
  bits = count_of_numbers,  // any bits
  one_nan,                  // one column a NaN of any payload
  one_infinity,             // one column +inf
  some_minus_inf,           // a few columns -inf, on this side alone
  empty,                    // -inf everywhere
  count,
  any = count,  // drawn by row
};

// The kind of teacher: logits, or a top-k teacher with its kind of tail (fastkd.TopK).
enum class TeacherKind { logits, bucket, renormalize, restricted, drop, count };

inline const char* name_of(TeacherKind kind) {
  static const char* const names[] = {"logits", "bucket", "renormalize", "restrict", "drop"};
  return names[static_cast<int>(kind)];
}

// The log-probabilities of a top-k teacher's row.
enum class Mass {
  drawn,         // a softmax of few or many
  student,       // the student's own probabilities
  shared,        // exactly 1 in equal powers of two
  one_hot,       // all on one column
  extreme,       // any: 0, subnormal, far below what exp can tell from 0
  nothing,       // -inf everywhere
  not_a_number,  // in one place
  any,           // drawn by row
};

struct Case {
  uint64_t seed = 1;  // of values and layouts
  int divergence = 0;
  DType student = DType::f32, teacher = DType::f32, grad = DType::f32;
  int64_t a = 1, b = 2, vocab = 1, width = 1, classes = 1;
  double temperature = 1.0, param = 0.5, soft = 1.0, hard = 0.0, smoothing = 0.0, z = 0.0;
  double factor = 1.0;
  bool keep = false, scale = false, equal = false, threads = false, flush = false;
  Content content = Content::any, of_teacher = Content::any;  // any: as the student's
  TeacherKind kind = TeacherKind::logits;
  Mass mass = Mass::any;
  int64_t k = 0;  // columns that a top-k teacher gives per row

  bool wide() const { return student == DType::f64 || teacher == DType::f64; }
  int64_t rows() const { return a * b; }
  bool at_one() const { return hard != 0.0 || z != 0.0; }              // a term at T = 1
  bool same() const { return student == teacher && student == grad; }  // dtypes

  std::string text() const {
    char line[440], teachers[40];
    std::snprintf(teachers, sizeof teachers,
                  kind == TeacherKind::logits ? "%s" : "%s (%lld places)", name_of(kind),
                  static_cast<long long>(k));
    std::snprintf(line, sizeof line,
                  "seed %llu: %s, student %s, teacher %s %s, gradient %s, rows %lld x %lld, vocab "
                  "%lld of %lld, T %g, param %g, soft %g, hard %g, smoothing %g, z %g, factor "
                  "%g%s%s%s%s",
                  static_cast<unsigned long long>(seed), kDivergences[divergence], name_of(student),
                  name_of(teacher), teachers, name_of(grad), static_cast<long long>(a),
                  static_cast<long long>(b), static_cast<long long>(vocab),
                  static_cast<long long>(width), temperature, param, soft, hard, smoothing, z,
                  factor, keep ? ", keep" : "", scale ? ", scale" : "",
                  equal ? ", equal sides" : "", flush ? ", subnormals flushed" : "");
    return line;
  }
};

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

inline int64_t draw_vocab(Random& random) {
  static const int64_t edges[] = {15,   16,   17,   31,   32,   33,   255,  256,  257,
                                  1023, 1024, 1025, 2047, 2048, 2049, 3072, 4095, 4097};
  const double kind = random.unit();
  if (kind < 0.5) return random.between(1, 80);
  if (kind < 0.7) return random.pick(edges);
  if (kind < 0.98) return random.between(81, 3000);
  // around the chunks that threads take, and several of them
  if (kind < 0.99) return fastkd::kChunk * random.between(1, 2) + random.between(-2, 2);
  return random.between(3000, 4 * fastkd::kChunk);
}

inline double draw_temperature(Random& random) {
  static const double some[] = {1.0, 1.0, 2.0, 0.5, 4.0, 0.01, 1000.0, 1e-18, 1e18};
  return random.chance(0.7) ? random.pick(some) : std::exp(random.normal() * 10.0);
}

inline double draw_share(Random& random) {  // strictly between 0 and 1
  static const double some[] = {0.5, 0.1, 0.9, 0.01, 0.99, 1e-6, 1.0 - 1e-6, 1e-12};
  return random.chance(0.6) ? random.pick(some) : 0.001 + 0.998 * random.unit();
}

inline Case draw(uint64_t seed) {
  Random random{seed * 0x2545F4914F6CDD1Du + 1};
  Case c;
  c.seed = seed;
  c.divergence = static_cast<int>(random.below(kDivergenceCount));
  c.student = random.pick(kDTypes);
  c.teacher = random.chance(0.6) ? c.student : random.pick(kDTypes);
  c.grad = random.chance(0.8) ? c.student : random.pick(kDTypes);
  c.vocab = draw_vocab(random);
  c.a = random.between(1, 2);
  c.b = random.between(1, c.vocab > 3000 ? 2 : 4);
  c.width = c.vocab + (random.chance(0.3) ? random.between(1, 70) : 0);
  c.classes = c.vocab + (random.chance(0.1) ? random.between(1, 1000) : 0);
  c.temperature = std::fmin(1e18, std::fmax(1e-18, draw_temperature(random)));
  c.param = draw_share(random);
  c.soft = random.chance(0.3) ? random.unit() * 4.0 : 1.0;
  if (random.chance(0.4)) {
    c.hard = random.chance(0.3) ? 1.0 : random.unit();
    if (random.chance(0.5)) c.smoothing = random.chance(0.5) ? 0.1 : random.unit();
  }
  c.factor = random.chance(0.5) ? 1.0 : random.normal();
  c.keep = random.chance(0.4);
  c.scale = random.chance(0.4);
  c.equal = random.chance(0.1);
  c.threads = random.chance(c.vocab > fastkd::kChunk ? 0.8 : 0.2);
  c.flush = random.chance(0.1);
  if (random.chance(0.5)) c.content = static_cast<Content>(random.below(int(Content::count)));
  if (random.chance(0.3)) c.of_teacher = static_cast<Content>(random.below(int(Content::count)));
  if (random.chance(0.4)) {
    c.kind = static_cast<TeacherKind>(random.between(1, int(TeacherKind::count) - 1));
    c.k = random.chance(0.2) ? c.vocab + 3 : random.chance(0.1) ? 0 : 70;
    c.k = std::min<int64_t>(c.k, random.chance(0.3) ? 70 : random.between(1, 12));
  }
  if (random.chance(0.2)) c.z = random.chance(0.5) ? 1e-4 : random.unit();
  return c;
}

inline Layout draw_layout(Random& random, bool read_only) {
  Layout layout;
  const double kind = random.unit();
  layout.placing = kind < 0.5                ? Placing::packed
                   : kind < 0.6              ? Placing::transposed
                   : kind < 0.7 && read_only ? Placing::shared
                   : kind < 0.9              ? Placing::paged
                                             : Placing::packed;
  layout.gap = random.chance(0.5) ? random.between(0, 3) : random.between(0, 70);
  if (random.chance(0.2)) layout.gap = 0;
  if (random.chance(0.3)) layout.extra = random.between(0, 20);
  layout.at_end = random.chance(0.6);
  return layout;
}

// The bits of one column. `unit` is what differences between logits are measured in.
inline uint64_t draw_bits(Random& random, Content content, DType dtype, double unit) {
  const Format f = format_of(dtype);
  const uint64_t sign = random.next() << (f.mantissa + f.exponent);
  const uint64_t mask = f.exponent + f.mantissa == 63
                            ? ~uint64_t{0}
                            : (uint64_t{1} << (f.exponent + f.mantissa + 1)) - 1;
  double x = 3.0 * random.normal();
  switch (content) {
    case Content::flat: x = 0.1 * random.normal(); break;
    case Content::wide: x = (2.0 * random.unit() - 1.0) * 1e4; break;
    case Content::far: x += 1000.0; break;
    case Content::ties: x = static_cast<double>(random.between(-2, 2)); break;
    case Content::constant: x = 1.5; break;
    case Content::plateau: x = -0.7; break;
    case Content::subnormal:
      return ((random.next() & ((uint64_t{1} << f.mantissa) - 1)) | sign) & mask;
    case Content::largest:
      return encode((random.next() & 1) != 0 ? f.largest() : -f.largest(), dtype);
    case Content::bits: return random.next() & mask;
    case Content::finite: {
      uint64_t bits = random.next() & mask;
      while (!(std::fabs(decode(bits, dtype)) < kInf)) bits = random.next() & mask;
      return bits;
    }
    default: break;
  }
  return encode(std::fmax(-f.largest(), std::fmin(f.largest(), x * unit)), dtype);
}

// One row. What both sides share (dead columns, the place of a peak) comes from `common`.
inline void fill_row(Random& random, uint64_t common, Content content, const Table& table,
                     int64_t r, double unit) {
  const DType dtype = table.dtype();
  const Format f = format_of(dtype);
  const int64_t n = table.length();
  const uint64_t minus_inf = encode(-kInf, dtype);
  Random shared{common};
  const int64_t one = shared.chance(0.7) ? shared.below(n) : random.below(n);
  const double far = std::fmax(-f.largest() / 2, 1000.0 * random.normal() * unit);
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits = draw_bits(random, content, dtype, unit);
    if ((content == Content::peaked || content == Content::plateau) && i == one)
      bits = encode(std::fmin(f.largest(), 40.0 * unit), dtype);
    if (content == Content::masked && shared.chance(0.33) && i != one) bits = minus_inf;
    if (content == Content::one_hot && i != one) bits = minus_inf;
    if (content == Content::late)
      bits = i < n - 1 - one / 4 ? minus_inf : encode(far + decode(bits, dtype), dtype);
    if (content == Content::empty) bits = minus_inf;
    if (content == Content::some_minus_inf && random.chance(0.05)) bits = minus_inf;
    if (content == Content::one_infinity && i == one) bits = encode(kInf, dtype);
    if (content == Content::one_nan && i == one) {
      const uint64_t payload = random.next() & ((uint64_t{1} << f.mantissa) - 1);
      bits = encode(kInf, dtype) | (payload == 0 ? 1 : payload);
      bits |= (random.next() & 1) << (f.mantissa + f.exponent);
    }
    write_bits(table.at(r, i), dtype, bits);
  }
}

}  // namespace check
