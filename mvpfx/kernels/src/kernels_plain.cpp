// What every processor of the architecture has: SSE2, NEON, or no vectors at all.
#define KERNEL_ISA plain
#define KERNEL_TABLE kPlain
#define KERNEL_VECTOR_BYTES 16
#define KERNEL_WIDE 4
#define KERNEL_ROWS 2
#include "kernels.h"
