// The one place where a row kernel is called, with subnormal numbers flushed to 0 or not: torch has
// a switch for that (torch.set_flush_denormal), and whoever sets it calls the kernels so.
#pragma once

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace check {

class Flushing {
 public:
  explicit Flushing(bool on) : before_(get()) {
    if (on) set(before_ | kFlush);
  }
  ~Flushing() { set(before_); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kFlush = 0x8040;  // results (FTZ) and operands (DAZ)
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t to) { _mm_setcsr(static_cast<unsigned>(to)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  static uint64_t get() {
    uint64_t now;
    asm volatile("mrs %0, fpcr" : "=r"(now));
    return now;
  }
  static void set(uint64_t to) { asm volatile("msr fpcr, %0" : : "r"(to)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
  uint64_t before_;
};

inline void call(fastkd::Rows kernel, const fastkd::Args& a, int64_t begin, int64_t end,
                 bool flush) {
  const Flushing flushing(flush);
  kernel(a, begin, end);
}

}  // namespace check
