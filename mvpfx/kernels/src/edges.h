// The edges of tiled regions: from and to activations as torch keeps them, token by token.
#pragma once

#include <algorithm>

#include "vector.h"

namespace KERNEL_ISA {

typedef float Row __attribute__((vector_size(4 * kChunk), aligned(64)));
typedef float UnalignedRow __attribute__((vector_size(4 * kChunk), aligned(4), may_alias));

// 16 x 16 values: four rounds, each interleaving rows that are 8 apart, so that the bits of row and
// column rotate.
inline void interleave(const Row (&from)[kChunk], Row (&to)[kChunk]) {
#pragma GCC unroll 8
  for (int i = 0; i < kChunk / 2; ++i) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                        21, 6, 22, 7, 23);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                            28, 13, 29, 14, 30, 15, 31);
  }
}

inline void transpose(Row (&rows)[kChunk]) {
  Row other[kChunk];
  interleave(rows, other);
  interleave(other, rows);
  interleave(rows, other);
  interleave(other, rows);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounded to the nearest, ties to even, as torch rounds.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Row read_row(const float* from) { return *reinterpret_cast<const UnalignedRow*>(from); }
inline Row read_row(const uint16_t* from) {
  Row row;
  for (int i = 0; i < kChunk; ++i) row[i] = from_bf16(from[i]);
  return row;
}
inline void write_row(float* to, Row row) { *reinterpret_cast<UnalignedRow*>(to) = row; }
inline void write_row(uint16_t* to, Row row) {
  for (int i = 0; i < kChunk; ++i) to[i] = to_bf16(row[i]);
}

// The same for fewer than 16 values.
template <typename Value>
inline Row read_some(const Value* from, int count) {
  Value values[kChunk] = {};
  std::memcpy(values, from, count * sizeof(Value));
  return read_row(values);
}
template <typename Value>
inline void write_some(Value* to, Row row, int count) {
  Value values[kChunk];
  write_row(values, row);
  std::memcpy(to, values, count * sizeof(Value));
}

// Tokens [chunk * 16, +16) of padded activations, from a tensor whose features lie side by side.
template <typename Value>
void enter(const Geometry& geometry, int64_t chunk, const Value* x, int64_t sequence_stride,
           int64_t token_stride, int64_t features, const Slice& tiles) {
  int64_t position = chunk * kChunk, tile = position / kTile, lane = position % kTile;
  int64_t sequence = position / geometry.padded(), token = position % geometry.padded();
  int there = static_cast<int>(std::min<int64_t>(kChunk, geometry.tokens - token));
  const Value* from = x + sequence * sequence_stride + token * token_stride;
  int width = geometry.width(tile);
  for (int64_t f = 0; f < features; f += kChunk) {
    int wide = static_cast<int>(std::min<int64_t>(kChunk, features - f));
    bool whole = wide == kChunk && there == kChunk;
    Row rows[kChunk];
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i)
      rows[i] = whole       ? read_row(from + i * token_stride + f)
                : i < there ? read_some(from + i * token_stride + f, wide)
                            : Row{};
    transpose(rows);
    float* to = tiles.at(tile, f, width) + lane;
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i)
      if (i < wide) write_row(to + i * width, rows[i]);
  }
}

// The way back; what was padded stays behind.
template <typename Value>
void leave(const Geometry& geometry, int64_t chunk, const Slice& tiles, int64_t features,
           Value* x, int64_t sequence_stride, int64_t token_stride) {
  int64_t position = chunk * kChunk, tile = position / kTile, lane = position % kTile;
  int64_t sequence = position / geometry.padded(), token = position % geometry.padded();
  int there = static_cast<int>(std::min<int64_t>(kChunk, geometry.tokens - token));
  Value* to = x + sequence * sequence_stride + token * token_stride;
  int width = geometry.width(tile);
  for (int64_t f = 0; f < features; f += kChunk) {
    int wide = static_cast<int>(std::min<int64_t>(kChunk, features - f));
    const float* from = tiles.at(tile, f, width) + lane;
    Row rows[kChunk];
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) rows[i] = i < wide ? read_row(from + i * width) : Row{};
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) {
      if (i >= there) continue;
      if (wide == kChunk) write_row(to + i * token_stride + f, rows[i]);
      else write_some(to + i * token_stride + f, rows[i], wide);
    }
  }
}

}  // namespace KERNEL_ISA
