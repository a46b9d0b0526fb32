#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512")
#endif
#define KERNEL_AVX512
#define KERNEL_AVX512_BF16
#define KERNEL_AMX
#define KERNEL_ISA amx
#define KERNEL_TABLE kAmx
#define KERNEL_VECTOR_BYTES 64
#define KERNEL_WIDE 4
#define KERNEL_ROWS 6
#define KERNEL_HALVES true
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
