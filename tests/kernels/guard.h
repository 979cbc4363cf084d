// Memory between pages that nobody may touch, and tables of rows in it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "values.h"

// Where the kernels are built with AddressSanitizer: it works to the byte, pages do not.
#if defined(CHECK_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace check {

inline int64_t page() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

// Every byte that is not filled is this: read as a number of any dtype it is a NaN.
constexpr unsigned char kCanary = 0xFF;

// `bytes` bytes whose end (or start) is the end (the start) of a page, with no access beyond.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end)
      : inside_((std::max<int64_t>(bytes, 1) + page() - 1) / page() * page()), bytes_(bytes) {
    void* all = mmap(nullptr, mapped(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    start_ = static_cast<char*>(all) + page();
    open();
    std::memset(start_, kCanary, static_cast<size_t>(inside_));
    data_ = at_end ? start_ + inside_ - bytes : start_;
  }
  ~Guarded() {
    show();
    munmap(start_ - page(), mapped());
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  void open() const { protect(start_, start_ + inside_, PROT_READ | PROT_WRITE); }
  void read_only() const { protect(start_, start_ + inside_, PROT_READ); }
  // No access to the pages that lie wholly within [from, to).
  void close(const char* from, const char* to) const {
    char* first = start_ + (from - start_ + page() - 1) / page() * page();
    char* last = start_ + (to - start_) / page() * page();
    if (first < last) protect(first, last, PROT_NONE);
  }

  // For AddressSanitizer, which works to the byte: all of it hidden, then parts shown again.
  void hide() const {
#if defined(CHECK_ASAN)
    __asan_poison_memory_region(start_, static_cast<size_t>(inside_));
#endif
  }
  void show() const { show(start_, inside_); }
  void show(const char* from, int64_t bytes) const {
#if defined(CHECK_ASAN)
    __asan_unpoison_memory_region(from, static_cast<size_t>(bytes));
#else
    (void)from, (void)bytes;
#endif
  }

  // The page's bytes around the data hold what they held.
  bool intact() const {
    return std::all_of(start_, data_, is_canary) &&
           std::all_of(data_ + bytes_, start_ + inside_, is_canary);
  }
  static bool is_canary(char byte) { return static_cast<unsigned char>(byte) == kCanary; }

 private:
  size_t mapped() const { return static_cast<size_t>(inside_ + 2 * page()); }
  static void protect(char* from, char* to, int access) {
    if (mprotect(from, static_cast<size_t>(to - from), access) != 0) {
      std::perror("mprotect");
      std::exit(2);
    }
  }
  int64_t inside_;
  int64_t bytes_;
  char* start_ = nullptr;
  char* data_ = nullptr;
};

enum class Placing {
  packed,      // one row after the other, a few elements between them
  transposed,  // the outer index moves fastest
  shared,      // one row for all inner (or outer) indices, for operands that are read only
  paged,       // each row on pages of its own, with closed pages between
};

struct Layout {
  Placing placing = Placing::packed;
  int64_t gap = 0;    // elements between rows
  int64_t extra = 0;  // elements between groups of rows
  bool at_end = true;
};

// Rows [a, b, length] of one dtype.
class Table {
 public:
  Table(DType dtype, int64_t a, int64_t b, int64_t length, const Layout& layout)
      : dtype_(dtype), b_(b), rows_(a * b), length_(length) {
    const int64_t size = size_of(dtype);
    int64_t pitch = length + layout.gap;
    if (layout.placing == Placing::paged) {
      paged_ = true;
      pitch = ((length * size + page() - 1) / page() + 1) * page() / size;
    }
    inner_ = pitch;
    outer_ = pitch * b + layout.extra;
    if (layout.placing == Placing::transposed) {
      outer_ = pitch;
      inner_ = pitch * a + layout.extra;
    } else if (layout.placing == Placing::shared) {
      (layout.gap % 2 ? inner_ : outer_) = 0;
    } else if (paged_) {
      outer_ = pitch * b;
    }
    const int64_t extent = (a - 1) * outer_ + (b - 1) * inner_ + length;
    memory_.reset(new Guarded(extent * size, layout.at_end));
  }

  fastkd::Operand operand() const { return {memory_->data(), dtype_, b_, outer_, inner_}; }
  char* row(int64_t r) const {
    return memory_->data() + ((r / b_) * outer_ + (r % b_) * inner_) * size_of(dtype_);
  }
  char* at(int64_t r, int64_t column) const { return row(r) + column * size_of(dtype_); }
  uint64_t bits(int64_t r, int64_t column) const { return read_bits(at(r, column), dtype_); }
  DType dtype() const { return dtype_; }
  int64_t length() const { return length_; }
  bool shares() const { return rows_ > 1 && (inner_ == 0 || outer_ == 0); }

  // Nothing but the first `columns` of the rows that are kept can be reached any more, and those
  // are read only where `writes` is false; a dropped row can be written, not read, if it `writes`.
  void seal(int64_t columns, const uint8_t* keep, bool writes) const {
    if (!writes) memory_->read_only();
    memory_->hide();
    const int64_t bytes = columns * size_of(dtype_);
    const char* last = memory_->data();
    for (int64_t r = 0; r < rows_; ++r) {
      const bool reached = writes || keep == nullptr || keep[r] != 0;
      if (paged_) {
        if (reached) memory_->close(last, row(r));
        if (reached) last = row(r) + bytes;
      }
      if (reached) memory_->show(row(r), bytes);
    }
    if (paged_) memory_->close(last, memory_->data() + memory_->bytes());
  }
  void unseal() const {
    memory_->open();
    memory_->show();
  }

  // Every byte beside the rows holds what it held.
  bool intact() const {
    if (!memory_->intact()) return false;
    std::vector<char> beside(memory_->data(), memory_->data() + memory_->bytes());
    for (int64_t r = 0; r < rows_; ++r)
      std::memset(beside.data() + (row(r) - memory_->data()), kCanary,
                  static_cast<size_t>(length_ * size_of(dtype_)));
    return std::all_of(beside.begin(), beside.end(), Guarded::is_canary);
  }

 private:
  DType dtype_;
  int64_t b_, rows_, length_;
  int64_t inner_ = 0, outer_ = 0;
  bool paged_ = false;
  std::unique_ptr<Guarded> memory_;
};

}  // namespace check
