// The CPU kernels compiled for AVX512.
#include "kernels.h"  // with the standard headers, before the target changes

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define FFATTR_ISA avx512
#define FFATTR_VECTOR_BYTES 64
#include "kernel_table.h"
#endif
