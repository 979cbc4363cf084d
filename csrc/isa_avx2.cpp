// Compiled with AVX2, FMA and F16C (see setup.py).
#define FASTKD_ISA avx2
#include "kernels.inl"
