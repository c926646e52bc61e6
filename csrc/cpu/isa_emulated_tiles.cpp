// The bfloat16 kernels with the matrix unit's instructions written out in C++.
#include "kernels.h"  // with the standard headers, before the target changes

#define FFATTR_ISA emulated_tiles
#define FFATTR_VECTOR_BYTES 16
#define FFATTR_BF16_UNIT 3
#include "unit_table.h"
