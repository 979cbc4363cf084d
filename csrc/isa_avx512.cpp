// Compiled with AVX-512 F, BW, DQ, VL (see setup.py).
#define FASTKD_ISA avx512
#include "kernels.inl"
