// The instruction sets that the kernels are built for, and which of them this processor runs.
#pragma once

#include <vector>

#if defined(FASTKD_X86)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fastkd {

struct Isa {
  const char* name;
  bool runs;
  const Kernels* (*kernels)();
};

#if defined(FASTKD_X86)
// By cpuid: the builtin of older Clang does not know f16c.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best last.
inline const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> isas = {
      {"baseline", true, baseline::kernels},
#if defined(FASTKD_X86)
      {"avx2", has_avx2(), avx2::kernels},
      {"avx512", has_avx512(), avx512::kernels},
#endif
  };
  return isas;
}

}  // namespace fastkd
