// The arguments of attention.
#pragma once

#include "tiles.h"

// What one call computes. The mask is added to the scaled scores; its strides may be 0.
struct Attention {
  Geometry geometry;
  Slice query, key, value, output;
  int64_t heads, groups;    // groups of heads share a key and a value
  int64_t width, out_width;  // features of a head: of query and key, of value
  float scale;
  bool causal;
  bool halves;  // whether products may be those of bfloat16, where there are such
  const float* mask;  // nullptr, or [sequences, heads, queries, keys]
  int64_t mask_strides[4];

  // Tiles of one sequence, were they its own.
  int64_t tiles() const { return (geometry.padded() + geometry.tile - 1) / geometry.tile; }
};

// Up to the next multiple of what a matrix unit takes at once.
inline int64_t whole_groups(int64_t count) { return (count + kChunk - 1) / kChunk * kChunk; }

// Floats that `attend` needs for itself: keys, values and queries where they have to be copied or
// paired, keys turned, the scores of one tile of queries, and its result.
inline int64_t scratch_floats(const Attention& a) {
  int64_t pairs = whole_groups((a.width + 1) / 2), width = a.width + 1 + kChunk;
  int64_t tile = 2 * width + pairs + whole_groups(a.out_width) + a.geometry.tile;
  return a.geometry.tile * (a.tiles() * tile + whole_groups(a.out_width));
}
