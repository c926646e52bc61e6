// The CPU kernels compiled for AVX2.
#include "kernels.h"  // with the standard headers, before the target changes

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define FFATTR_ISA avx2
#define FFATTR_VECTOR_BYTES 32
#include "kernel_table.h"
#endif
