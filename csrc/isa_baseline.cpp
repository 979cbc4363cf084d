// x86-64 with SSE2, or aarch64 with NEON: what every such processor has.
#define FASTKD_ISA baseline
#include "kernels.inl"
