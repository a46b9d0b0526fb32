#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace {

struct Shared {
  std::atomic<int64_t> next;
  int64_t count;
  const std::function<void(int64_t)>* work;
};

void take(void* data) {
  Shared* shared = static_cast<Shared*>(data);
  for (int64_t i = shared->next++; i < shared->count; i = shared->next++) (*shared->work)(i);
}

// The threads of torch's own OpenMP, where it is GNU's: others beside them would wait for a core.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

Region find_region() {
#if defined(_WIN32)
  return nullptr;
#else
  return reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  Shared shared{{0}, count, &work};
  static const Region region = find_region();
  if (region) {
    region(take, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take, &shared);
  take(&shared);
  for (std::thread& other : others) other.join();
}
