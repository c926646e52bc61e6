// The bfloat16 kernels by the matrix unit (AMX).
#include "kernels.h"  // with the standard headers, before the target changes

#if FFATTR_HAS_UNITS
#include <immintrin.h>

#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define FFATTR_ISA amx
#define FFATTR_VECTOR_BYTES 64
#define FFATTR_BF16_UNIT 1
#include "unit_table.h"
#endif
