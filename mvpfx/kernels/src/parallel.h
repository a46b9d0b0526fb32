// Work that is shared among as many threads as torch is set to use.
#pragma once

#include <cstdint>
#include <functional>

// Calls work(i) for all i in [0, count), on up to `threads` threads; returns when all are done.
void parallel(int64_t count, int threads, const std::function<void(int64_t)>& work);
