// The matrix unit of processors with AMX.
#pragma once

#include "vector.h"

namespace KERNEL_ISA {

#if defined(KERNEL_AMX)
constexpr bool kMatrixUnit = true;

// Sets up tiles of 64 bytes a row, and gives them back at the end: of so many rows the first five, for
// sums and what is multiplied from the left, of 16 the others.
class MatrixUnit {
 public:
  explicit MatrixUnit(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (int i = 0; i < 5; ++i) config.rows[i] = static_cast<uint8_t>(rows);
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// The compiler does not know which memory the instructions of the matrix unit read and write.
inline void settle() { asm volatile("" ::: "memory"); }

// Sums of kChunks times 16 tokens are tiles 0 to 3; in memory their rows are 64 tokens wide.
constexpr int kSumStride = kTile * sizeof(float);

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int kChunks>
inline void load_sums(const float* from) {
  _tile_loadd(0, from, kSumStride);
  if constexpr (kChunks > 1) _tile_loadd(1, from + kChunk, kSumStride);
  if constexpr (kChunks > 2) _tile_loadd(2, from + 2 * kChunk, kSumStride);
  if constexpr (kChunks > 3) _tile_loadd(3, from + 3 * kChunk, kSumStride);
}

template <int kChunks>
inline void store_sums(float* to) {
  _tile_stored(0, to, kSumStride);
  if constexpr (kChunks > 1) _tile_stored(1, to + kChunk, kSumStride);
  if constexpr (kChunks > 2) _tile_stored(2, to + 2 * kChunk, kSumStride);
  if constexpr (kChunks > 3) _tile_stored(3, to + 3 * kChunk, kSumStride);
}

// sums += left * right: rows of 16 pairs that are `left_stride` bytes apart, times 16 pairs of each 16
// tokens, which are `stride` bytes apart; `chunk` floats from 16 tokens to the next.
template <int kChunks>
inline void add_matrices(const float* left, int64_t left_stride, const float* right, int64_t chunk,
                         int64_t stride) {
  _tile_loadd(4, left, left_stride);
  _tile_loadd(5, right, stride);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kChunks > 1) {
    _tile_loadd(6, right + chunk, stride);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kChunks > 2) {
    _tile_loadd(7, right + 2 * chunk, stride);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (kChunks > 3) {
    _tile_loadd(5, right + 3 * chunk, stride);
    _tile_dpbf16ps(3, 4, 5);
  }
}
#else
constexpr bool kMatrixUnit = false;

struct MatrixUnit {
  explicit MatrixUnit(int) {}
};
#endif

}  // namespace KERNEL_ISA
