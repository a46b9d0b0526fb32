// Masks in a bit a value, for as long as nobody reads them.
#include <cstdint>
#include <cstring>

#include "../../kernels/src/export.h"
#include "../../kernels/src/parallel.h"
#include "chunks.h"

namespace {

// Eight bytes that are 0 or 1, as eight bits: the product brings each to the top byte, none on
// another.
uint8_t pack(const uint8_t* values) {
  uint64_t bytes;
  std::memcpy(&bytes, values, 8);
  return static_cast<uint8_t>((bytes * 0x0102040810204080u) >> 56);
}

// The way back: each of eight copies of the byte keeps a bit of its own, and 1 stands for that.
void unpack(uint8_t bits, uint8_t* values) {
  const uint64_t own = (bits * 0x0101010101010101u) & 0x8040201008040201u;
  const uint64_t bytes = ((own + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
  std::memcpy(values, &bytes, 8);
}

}  // namespace

// bits = mask, eight to a byte; what the last byte has no values for is 0.
EXPORT void mvpfx_pack_mask(const uint8_t* mask, uint8_t* bits, int64_t count, int threads) {
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const uint8_t* from = mask + chunk * kChunk;
    uint8_t* to = bits + chunk * (kChunk / 8);
    const int64_t size = length(chunk, count);
    for (int64_t i = 0; i < size / 8; ++i) to[i] = pack(from + 8 * i);
    if (size % 8) {
      uint8_t last[8] = {};
      std::memcpy(last, from + size / 8 * 8, size % 8);
      to[size / 8] = pack(last);
    }
  });
}

// mask = bits.
EXPORT void mvpfx_unpack_mask(const uint8_t* bits, uint8_t* mask, int64_t count, int threads) {
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const uint8_t* from = bits + chunk * (kChunk / 8);
    uint8_t* to = mask + chunk * kChunk;
    const int64_t size = length(chunk, count);
    for (int64_t i = 0; i < size / 8; ++i) unpack(from[i], to + 8 * i);
    if (size % 8) {
      uint8_t last[8];
      unpack(from[size / 8], last);
      std::memcpy(to + size / 8 * 8, last, size % 8);
    }
  });
}
