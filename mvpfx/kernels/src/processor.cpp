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

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const bool pairs = __builtin_cpu_supports("avx512bf16");
#if defined(HAS_AMX_KERNELS)
    if (pairs && amx_is_there()) found.push_back(&kAmx);
#endif
    // For pairs of bfloat16 Intel's vectors take four times as long as for floats, so that even weights
    // without zeros gain nothing by them; AMD's take as long.
    const bool slow_pairs = __builtin_cpu_is("intel");
    if (pairs && !slow_pairs) found.push_back(&kAvx512Bf16);
    found.push_back(&kAvx512);
    if (pairs && slow_pairs) found.push_back(&kAvx512Bf16);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
  found.push_back(&kPlain);
  return found;
}
