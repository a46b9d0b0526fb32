#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512")
#endif
#define KERNEL_AVX512_BF16
#define KERNEL_ISA avx512_bf16
#define KERNEL_TABLE kAvx512Bf16
#include "avx512.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
