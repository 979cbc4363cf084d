#include "threads.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_WIN32)
#include <malloc.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastkd {
namespace {

#if defined(_OPENMP)
void run_pool(int threads, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) task(argument, i);
}
#endif

constexpr int64_t kHuge = int64_t{1} << 21;

// Windows has no posix_memalign. Its own function needs its own counterpart of free.
void* aligned(int64_t alignment, int64_t bytes) {
#if defined(_WIN32)
  return _aligned_malloc(static_cast<size_t>(bytes), static_cast<size_t>(alignment));
#else
  void* memory = nullptr;
  const int failed =
      posix_memalign(&memory, static_cast<size_t>(alignment), static_cast<size_t>(bytes));
  return failed ? nullptr : memory;
#endif
}

void release(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

struct Block {
  char* memory = nullptr;
  int64_t bytes = 0;
  ~Block() { release(memory); }
};

}  // namespace

bool openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

// The thread keeps the memory, because fresh memory costs page faults in every call. It is at most
// 2 MB for a row (row_state.h), and 48 MB for the rows between vocabulary-parallel steps
// (fastkd/backends/cpu.py).
char* scratch(int64_t bytes) {
  static thread_local Block block;
  if (block.bytes < bytes) {
    release(block.memory);
    const int64_t page = bytes < kHuge ? 64 : kHuge;
    bytes = (bytes + page - 1) / page * page;
    void* memory = aligned(page, bytes);
#if defined(MADV_HUGEPAGE)
    // a row's exponentials take 128 small pages; a few rows take more than a TLB holds
    if (memory != nullptr && page == kHuge)
      madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    block.memory = static_cast<char*>(memory);
    block.bytes = memory == nullptr ? 0 : bytes;
  }
  return block.memory;
}

void over_rows(int64_t rows, int64_t vocab, int threads,
               const std::function<void(int64_t, int64_t, const ThreadPool&)>& run) {
#if defined(_OPENMP)
  if (threads > 1) {
    const int64_t chunks = (vocab + kChunk - 1) / kChunk;
    int64_t rest = rows % threads;
    // sharing pays where fewer rows are left than threads can work on one row
    if (rest >= (chunks < threads ? chunks : threads)) rest = 0;
    const int64_t whole = rows - rest;
    if (whole > 0) {
#pragma omp parallel num_threads(threads)
      {
        const int64_t k = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t begin = whole * k / n, end = whole * (k + 1) / n;
        if (begin < end) run(begin, end, ThreadPool{});
      }
    }
    if (rest > 0) run(whole, rows, ThreadPool{threads, run_pool});
    return;
  }
#else
  (void)vocab, (void)threads;
#endif
  run(0, rows, ThreadPool{});
}

}  // namespace fastkd
