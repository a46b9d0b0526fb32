// Arrays in pieces that threads take one at a time.
#pragma once

#include <algorithm>
#include <cstdint>

constexpr int64_t kChunk = 1 << 15;  // values in a piece: a multiple of 8

inline int64_t chunks(int64_t count) { return (count + kChunk - 1) / kChunk; }

inline int64_t length(int64_t chunk, int64_t count) {
  return std::min(kChunk, count - chunk * kChunk);
}
