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
  for (int64_t r = 0; r < rows; r += kChunk) {
    if (more) load_sums<kChunks>(out + r * kTile);
    else zero_sums();
    for (int64_t i = 0; i < pairs; i += kChunk)
      add_matrices<kChunks>(left + r * left_row + i, left_row * int64_t{sizeof(float)},
                            right + i * kTile, kChunk, kSumStride);
    store_sums<kChunks>(out + r * kTile);
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
#endif

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

}  // namespace KERNEL_ISA
