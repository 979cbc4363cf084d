// Compiled with the compiler's own default: SSE2 on x86-64, NEON on aarch64. Has float64 for all.
#define FASTKD_ISA baseline
#define FASTKD_WITH_F64
#include "kernels.inl"
