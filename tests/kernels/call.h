// The one place where a pass is called, with what it needs: a thread pool, a scratch, and the
// processor's state. torch.set_flush_denormal flushes subnormal numbers to 0, and passes must work
// under it.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "guard.h"

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

// Threads that take the tasks from the last to the first, so that an order is no help.
struct Backwards {
  static fastkd::ThreadPool pool(int threads) { return {threads, run}; }
  static void run(int threads, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
    const auto share = [=](int64_t from) {
      for (int64_t i = tasks - 1 - from; i >= 0; i -= threads) task(argument, i);
    };
    std::vector<std::thread> check_more;
    for (int k = 1; k < threads; ++k) check_more.emplace_back(share, k);
    share(0);
    for (std::thread& other : check_more) other.join();
  }
};

// Whether the kernels get a scratch. Without one they use their slow form.
inline bool scratch_given = true;

// Calls a pass, with subnormal numbers flushed or not.
inline void call(fastkd::Pass kernel, const fastkd::Args& a, int64_t begin, int64_t end,
                 bool flush) {
  const Flushing flushing(flush);
  kernel(a, begin, end);
}
inline void call(fastkd::ThreadedPass kernel, const fastkd::Args& a, int64_t begin, int64_t end,
                 bool flush, const fastkd::ThreadPool& pool = {}) {
  const Flushing flushing(flush);
  kernel(a, begin, end, pool);
}

// The kernels' scratch() in this binary: new for every call, between guard pages, full of NaN.
inline char* fresh_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<Guarded> given;
  given.reset();
  if (!scratch_given) return nullptr;
  given.reset(new Guarded((bytes + 63) / 64 * 64, true));
  given->hide();
  given->show(given->data(), bytes);
  return given->data();
}

}  // namespace check
