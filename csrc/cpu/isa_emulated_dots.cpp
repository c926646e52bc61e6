// The bfloat16 kernels with the dot products written out in C++.
#include "kernels.h"  // with the standard headers, before the target changes

#define FFATTR_ISA emulated_dots
#define FFATTR_VECTOR_BYTES 16
#define FFATTR_BF16_UNIT 4
#include "unit_table.h"
