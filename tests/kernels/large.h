// Rows that lie more than 2^31 elements apart, and rows longer than what the kernels keep of one.
#pragma once

#include "trial.h"

namespace check {

// Address space with memory in it only where a row lies.
class Distant {
 public:
  Distant(DType dtype, int64_t rows, int64_t length)
      : dtype_(dtype), bytes_((rows - 1) * kStride * size_of(dtype) + length * size_of(dtype)) {
    void* all = mmap(nullptr, static_cast<size_t>(bytes_), PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = all == MAP_FAILED ? nullptr : static_cast<char*>(all);
    for (int64_t r = 0; data_ != nullptr && r < rows; ++r)
      mprotect(row(r), static_cast<size_t>(length * size_of(dtype)), PROT_READ | PROT_WRITE);
  }
  ~Distant() {
    if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  }
  Distant(const Distant&) = delete;
  Distant& operator=(const Distant&) = delete;

  bool there() const { return data_ != nullptr; }
  char* row(int64_t r) const { return data_ + r * kStride * size_of(dtype_); }
  fastkd::Operand operand() const { return {data_, dtype_, 2, 0, kStride}; }

 private:
  // more than an int holds, and whole pages in every dtype
  static constexpr int64_t kStride = (int64_t{1} << 31) + 4096;
  DType dtype_;
  int64_t bytes_;
  char* data_ = nullptr;
};

// Two such rows give the bits that they give side by side. Returns how many cases.
inline int64_t distant_rows(const fastkd::Isa& isa, Report& report) {
  constexpr int64_t kVocab = 1100;
  int64_t cases = 0;
  for (DType dtype : {DType::f32, DType::bf16}) {
    report.about = std::string(isa.name) + ", rows far apart, " + name_of(dtype);
    const Distant s(dtype, 2, kVocab), t(dtype, 2, kVocab), g(dtype, 2, kVocab);
    if (!s.there() || !t.there() || !g.there()) {
      std::printf("rows far apart: no address space for them here\n");
      return cases;
    }
    Random random{5};
    std::vector<char> x(static_cast<size_t>(2 * kVocab * size_of(dtype))), y = x, expected = x;
    const auto near = [&](std::vector<char>& of) {
      return fastkd::Operand{of.data(), dtype, 2, 0, kVocab};
    };
    for (int64_t r = 0; r < 2; ++r) {
      for (int64_t i = 0; i < kVocab; ++i) {
        const int64_t at = (r * kVocab + i) * size_of(dtype);
        for (char* to : {x.data() + at, s.row(r) + i * size_of(dtype)})
          write_bits(to, dtype, encode(static_cast<double>(i % 7 + r), dtype));
        const double other = random.normal();
        for (char* to : {y.data() + at, t.row(r) + i * size_of(dtype)})
          write_bits(to, dtype, encode(other, dtype));
      }
    }
    for (int divergence = 0; divergence < kDivergenceCount; ++divergence, ++cases) {
      fastkd::Args a;
      a.vocab = a.width = a.classes = kVocab;
      a.param = 0.5;
      float losses[2], first[2];
      const fastkd::ThreadedPass fused = isa.kernels()->passes[divergence].fused[int(dtype)];
      a.student = near(x), a.teacher = near(y), a.grad = near(expected), a.out = first;
      call(fused, a, 0, 2, false);
      a.student = s.operand(), a.teacher = t.operand(), a.grad = g.operand(), a.out = losses;
      call(fused, a, 0, 2, false);
      report.expect(std::memcmp(losses, first, sizeof losses) == 0, "losses differ");
      for (int64_t r = 0; r < 2; ++r)
        report.expect(std::memcmp(g.row(r), expected.data() + r * kVocab * size_of(dtype),
                                  static_cast<size_t>(kVocab * size_of(dtype))) == 0,
                      "gradient of row " + std::to_string(r) + " differs");
    }
  }
  return cases;
}

// The widest that get a scratch (kMostColumns), and one column more.
inline int64_t long_rows(uint64_t seed, Report& report) {
  int64_t number = 0;
  for (; number < kDivergenceCount; ++number) {
    Case c;
    c.seed = seed + static_cast<uint64_t>(number);
    c.divergence = static_cast<int>(number);
    c.student = c.teacher = c.grad = number % 2 == 0 ? DType::f32 : DType::bf16;
    c.b = 1;
    c.vocab = c.width = c.classes = (int64_t{1} << 18) + (number % 4 < 2 ? 1 : 0);
    c.content = Content::flat;
    c.hard = number % 3 == 1 ? 0.25 : 0.0;
    check_case(c, report);
    // a top-k pass keeps half as much per column, and so takes rows twice as wide
    c.kind = static_cast<TeacherKind>(1 + number % (int(TeacherKind::count) - 1));
    c.k = 40;
    c.vocab = c.width = c.classes = 2 * c.vocab;
    check_case(c, report);
  }
  return 2 * number;
}

}  // namespace check
