// Rows over threads, and the chunks of a row where there are fewer rows than threads.
#pragma once

#include <functional>

#include "kernels.h"

namespace fastkd {

// Whether this build has threads at all.
bool openmp();

// run(begin, end, team) over all rows: whole rows on a thread each, and the rest, where they are
// wide, one after the other with the threads as their team. Neither changes a bit of the result.
void share(int64_t rows, int64_t vocab, int threads,
           const std::function<void(int64_t, int64_t, const Team&)>& run);

}  // namespace fastkd
