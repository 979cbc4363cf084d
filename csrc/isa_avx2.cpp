// Compiled with AVX2, FMA and F16C (see setup.py).
#if defined(__GNUC__) && !defined(__clang__)
// Instructions in the order that this processor's pipes take, before registers are given out: of a
// core's time 5 to 8 % less (kl, bfloat16, 64 x 128 256). Without the second, js takes 4 % more.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif
#define FASTKD_ISA avx2
#include "kernels.inl"
