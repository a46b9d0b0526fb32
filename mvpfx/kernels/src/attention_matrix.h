// What attention does with AMX: products of its heads, and heads as these products read them.
#pragma once

#include "attention_call.h"
#include "edges.h"
#include "matrix_unit.h"

namespace KERNEL_ISA {

#if defined(KERNEL_AMX)
// out[r, :] (+)= sum over i of left[r * left_row + i] * right[i, :], for kChunks times 16 columns and rows
// in sixteens; rows of `right` and `out` are 64 wide, `pairs` of two bfloat16 a multiple of 16.
template <int kChunks>
void matrix_products(const float* left, int64_t left_row, const float* right, int64_t pairs,
                     float* out, int64_t rows, bool more) {
  constexpr int kStride = kTile * sizeof(float);
  const int64_t step = left_row * int64_t{sizeof(float)};
  for (int64_t r = 0; r < rows; r += kChunk) {
    float* to = out + r * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (more) {
      _tile_loadd(0, to, kStride);
      if constexpr (kChunks > 1) _tile_loadd(1, to + kChunk, kStride);
      if constexpr (kChunks > 2) _tile_loadd(2, to + 2 * kChunk, kStride);
      if constexpr (kChunks > 3) _tile_loadd(3, to + 3 * kChunk, kStride);
    }
    for (int64_t i = 0; i < pairs; i += kChunk) {
      const float* x = right + i * kTile;
      _tile_loadd(4, left + r * left_row + i, step);
      _tile_loadd(5, x, kStride);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (kChunks > 1) {
        _tile_loadd(6, x + kChunk, kStride);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (kChunks > 2) {
        _tile_loadd(7, x + 2 * kChunk, kStride);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (kChunks > 3) {
        _tile_loadd(5, x + 3 * kChunk, kStride);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, to, kStride);
    if constexpr (kChunks > 1) _tile_stored(1, to + kChunk, kStride);
    if constexpr (kChunks > 2) _tile_stored(2, to + 2 * kChunk, kStride);
    if constexpr (kChunks > 3) _tile_stored(3, to + 3 * kChunk, kStride);
  }
}

// The same for `queries` columns.
inline void matrix_products(const float* left, int64_t left_row, const float* right, int64_t pairs,
                            float* out, int64_t rows, int64_t queries, bool more) {
  constexpr decltype(&matrix_products<4>) kProducts[] = {matrix_products<1>, matrix_products<2>,
                                                         matrix_products<3>, matrix_products<4>};
  settle();
  kProducts[queries / kChunk - 1](left, left_row, right, pairs, out, rows, more);
  settle();
}

// Pairs of features of 64 tokens, [pairs, 64], token by token: [64, pairs], in sixteens.
inline void turn_pairs(const float* from, int64_t pairs, float* to) {
  for (int64_t p = 0; p < pairs; p += kChunk)
    for (int64_t token = 0; token < kTile; token += kChunk) {
      Row rows[kChunk];
#pragma GCC unroll 16
      for (int i = 0; i < kChunk; ++i) rows[i] = read_row(from + (p + i) * kTile + token);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kChunk; ++i) write_row(to + (token + i) * pairs + p, rows[i]);
    }
}
#endif

}  // namespace KERNEL_ISA
