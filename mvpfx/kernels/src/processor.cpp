#include "processor.h"

#if defined(HAS_AMX_KERNELS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether the processor has AMX, and the system lets this process use it.
bool amx_is_there() {
  unsigned a, b, c, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // arch_prctl(2): ARCH_REQ_XCOMP_PERM
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

}  // namespace
#endif

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return &kAvx512;
#if defined(HAS_AMX_KERNELS)
    if (amx_is_there()) return &kAmx;
#endif
    return &kAvx512Bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
#endif
  return &kPlain;
}
