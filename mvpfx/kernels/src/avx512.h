// All kernels with vectors of 512 bits: what the instruction sets that have them share.
#define KERNEL_AVX512
#define KERNEL_VECTOR_BYTES 64
#define KERNEL_WIDE 4
#define KERNEL_ROWS 6
#include "kernels.h"
