#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KERNEL_AVX2
#define KERNEL_ISA avx2
#define KERNEL_TABLE kAvx2
#define KERNEL_VECTOR_BYTES 32
#define KERNEL_WIDE 4
#define KERNEL_ROWS 2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
