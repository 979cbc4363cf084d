// Spreads rows over threads, and the chunks of a row where there are fewer rows than threads.
#pragma once

#include <functional>

#include "kernels.h"

namespace fastkd {

// Whether this build has threads at all.
bool openmp();

// run(begin, end, pool) over all rows. Each thread gets whole rows. Wide rows that are left over
// come one after the other, and all threads share each. The result has the same bits either way.
void over_rows(int64_t rows, int64_t vocab, int threads,
               const std::function<void(int64_t, int64_t, const ThreadPool&)>& run);

}  // namespace fastkd
