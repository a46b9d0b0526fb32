#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx2,prefer-vector-width=512")
#endif
#define KERNEL_AVX512_BF16
#define KERNEL_AMX
#define KERNEL_ISA amx
#define KERNEL_TABLE kAmx
#include "avx512.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
