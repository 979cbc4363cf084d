// The inputs of a case in guarded memory, and what each of its rows must give.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "case.h"
#include "oracle.h"

namespace check {

template <class T>
struct WiderOf {
  using Type = double;
};
template <>
struct WiderOf<double> {
  using Type = long double;
};

// The student, labels and factors of a case, and the truth about each row. Derived classes add the
// teacher.
template <class T>  // the kernels' accumulation type
class Batch {
 public:
  using R = typename WiderOf<T>::Type;

  explicit Batch(const Case& given)
      : c(given),
        random{given.seed},
        student(c.student, c.a, c.b, c.vocab, draw_layout(random, true)),
        keep_(c.rows(), random.chance(0.5)),
        label_(c.rows() * 8, random.chance(0.5)),
        scale_(c.rows() * int64_t{sizeof(T)}, random.chance(0.5)) {
    for (int64_t r = 0; r < c.rows(); ++r) {
      keep_.template as<uint8_t>()[r] = !c.keep || random.chance(0.6);
      label_.template as<int64_t>()[r] = draw_label();
      scale_.template as<T>()[r] = draw_scale();
    }
    keep_.read_only();
    label_.read_only();
    scale_.read_only();
  }
  virtual ~Batch() = default;

  virtual void seal() { student.seal(c.vocab, keep(), false); }
  virtual void unseal() { student.unseal(); }
  virtual bool shares() const { return student.shares(); }

  // Other numbers in the rows that are dropped: nothing may depend on them.
  bool refill_dropped() {
    if (!c.keep || shares()) return false;
    unseal();
    for (int64_t r = 0; r < c.rows(); ++r)
      if (!kept(r)) fill(r);
    seal();
    return true;
  }

  bool kept(int64_t r) const { return keep() == nullptr || keep()[r] != 0; }
  const uint8_t* keep() const { return c.keep ? keep_.template as<uint8_t>() : nullptr; }
  const int64_t* label() const { return c.hard != 0.0 ? label_.template as<int64_t>() : nullptr; }
  const T* scale() const { return c.scale ? scale_.template as<T>() : nullptr; }
  // Of a whole row of the gradient.
  R factor(int64_t r) const {
    return static_cast<R>(c.factor) * (c.scale ? static_cast<R>(scale()[r]) : R(1));
  }

  struct Row {
    Softmax<R> s, t, one;  // student and teacher, and the student at T = 1
    RowTruth<R> of;
    bool dead = false;   // nothing has mass on either side, and no term at T = 1
    bool equal = false;  // the same numbers on both sides
  };
  const Row& row(int64_t r) const { return truths_[static_cast<size_t>(r)]; }

  virtual fastkd::Args args() const {
    fastkd::Args a;
    a.student = student.operand();
    a.vocab = c.vocab;
    a.width = c.width;
    a.classes = c.vocab;
    a.keep = keep();
    a.label = label();
    a.scale = scale();
    a.factor = c.factor;
    a.param = c.param;
    a.temperature = c.temperature;
    a.soft = c.soft;
    a.hard = c.hard;
    a.smoothing = c.smoothing;
    a.z = c.z;
    return a;
  }

  Case c;
  Random random;
  Table student;

 protected:
  virtual void fill(int64_t r) = 0;
  virtual Row truth(int64_t r) const = 0;

  // For the constructor of what derives.
  void make_rows() {
    for (int64_t r = 0; r < c.rows(); ++r) fill(r);
    for (int64_t r = 0; r < c.rows(); ++r) truths_.push_back(kept(r) ? truth(r) : Row());
    seal();
  }

  // Differences of the size of the temperature where the dtype has them, else of 1.
  double logit_unit(DType dtype) {
    const Format f = format_of(dtype);
    const double largest = f.largest() / 1e5, smallest = f.smallest() * 1e3;
    const bool fits = c.temperature < largest && c.temperature > smallest;
    return fits && random.chance(0.6) ? c.temperature : 1.0;
  }
  Content draw_content(Content given) {
    if (given != Content::any) return given;
    const bool number = random.chance(0.8);
    return static_cast<Content>(
        random.below(int(number ? Content::count_of_numbers : Content::count)));
  }
  std::vector<R> numbers(const Table& table, int64_t r) const {
    std::vector<R> x;
    for (int64_t i = 0; i < table.length(); ++i)
      x.push_back(static_cast<R>(decode(table.bits(r, i), table.dtype())));
    return x;
  }

 private:
  int64_t draw_label() {
    static const int64_t wrong[] = {-1, -100, std::numeric_limits<int64_t>::min(),
                                    std::numeric_limits<int64_t>::max()};
    if (random.chance(0.1)) return random.pick(wrong);
    if (random.chance(0.05)) return c.vocab;
    return random.chance(0.2) ? c.vocab - 1 : random.below(c.vocab);
  }
  T draw_scale() {
    if (random.chance(0.1)) return T(0);
    if (random.chance(0.1)) return std::numeric_limits<T>::quiet_NaN();
    return static_cast<T>(random.normal());
  }

  Guarded keep_, label_, scale_;
  std::vector<Row> truths_;
};

// A case with a teacher of logits.
template <class T>
class Problem final : public Batch<T> {
 public:
  using Base = Batch<T>;
  using Base::c, Base::random, Base::student, Base::kept, Base::label;
  using typename Base::R;
  using typename Base::Row;

  explicit Problem(const Case& given)
      : Base(given), teacher(c.teacher, c.a, c.b, c.vocab, draw_layout(random, true)) {
    this->make_rows();
  }

  void seal() override {
    Base::seal();
    teacher.seal(c.vocab, this->keep(), false);
  }
  void unseal() override {
    Base::unseal();
    teacher.unseal();
  }
  bool shares() const override { return student.shares() || teacher.shares(); }

  // Bit for bit, in the rows that are kept; not where rows share memory, which the other may not.
  bool teacher_is_student() const {
    if (!c.equal || c.student != c.teacher) return false;
    for (int64_t r = 0; r < c.rows(); ++r)
      if (kept(r) && std::memcmp(student.row(r), teacher.row(r),
                                 static_cast<size_t>(c.vocab * size_of(c.student))) != 0)
        return false;
    return true;
  }

  fastkd::Args args() const override {
    fastkd::Args a = Base::args();
    a.teacher = teacher.operand();
    return a;
  }

  Table teacher;

 private:
  void fill(int64_t r) override {
    const uint64_t common = random.next();
    fill_row(random, common, this->draw_content(c.content), student, r,
             this->logit_unit(c.student));
    if (c.equal) {
      for (int64_t i = 0; i < c.vocab; ++i)
        write_bits(teacher.at(r, i), c.teacher,
                   c.student == c.teacher
                       ? student.bits(r, i)
                       : encode(decode(student.bits(r, i), c.student), c.teacher));
    } else {
      const Content own = c.of_teacher != Content::any ? c.of_teacher : c.content;
      fill_row(random, common, this->draw_content(own), teacher, r, this->logit_unit(c.teacher));
    }
  }

  Row truth(int64_t r) const override {
    Row row;
    const std::vector<R> x = this->numbers(student, r), y = this->numbers(teacher, r);
    row.s = softmax<R, T>(x, c.temperature);
    row.t = softmax<R, T>(y, c.temperature);
    row.one = softmax<R, T>(x, 1.0);
    row.equal = x == y;
    row.dead = row.s.empty && row.t.empty && !c.at_one();
    row.of.broken = row.s.broken || row.t.broken || ((row.s.empty || row.t.empty) && !row.dead);
    if (row.of.broken || row.dead) return row;
    soft_truth<R, T>(kDivergences[c.divergence], static_cast<R>(c.param), row.s, row.t, row.of);
    if (c.hard != 0.0) hard_truth<R, T>(row.one, label()[r], static_cast<R>(c.smoothing), row.of);
    if (c.z != 0.0) z_truth<R, T>(row.one, static_cast<R>(c.z), row.of);
    return row;
  }
};

}  // namespace check
