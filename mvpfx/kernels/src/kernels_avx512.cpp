#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512")
#endif
#define KERNEL_AVX512
#define KERNEL_ISA avx512
#define KERNEL_TABLE kAvx512
#define KERNEL_VECTOR_BYTES 64
#define KERNEL_WIDE 4
#define KERNEL_ROWS 6
#define KERNEL_HALVES false
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
