// The CPU kernels compiled for any processor of the platform.
#include "kernels.h"  // with the standard headers, before the target changes

#define FFATTR_ISA baseline
#define FFATTR_VECTOR_BYTES 16
#include "kernel_table.h"
