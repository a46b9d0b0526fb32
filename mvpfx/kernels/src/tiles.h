// The layout that the kernels compute in.
//
// Activations [sequences, tokens, features] are kept as tiles of 16, 32 or 64 tokens, within a tile
// feature by feature: one weight meets tokens that lie side by side, as many as the instruction set
// sums at once. Every sequence is padded to a multiple of 16 tokens, so that 16 neighbours never
// belong to two sequences. The last tile may be narrower, by multiples of 16.
#pragma once

#include <algorithm>
#include <cstdint>

constexpr int kWidest = 64;  // tokens of the widest tile
constexpr int kChunk = 16;

enum Activation { kNone = 0, kGelu, kGeluTanh, kRelu, kSilu, kTanh, kSigmoid, kGeluQuick };

// How many tokens there are, and where.
struct Geometry {
  int64_t sequences;
  int64_t tokens;  // of one sequence
  int64_t tile;    // tokens of a tile
  int64_t padded() const { return (tokens + kChunk - 1) / kChunk * kChunk; }
  int64_t total() const { return sequences * padded(); }
  int64_t tiles() const { return (total() + tile - 1) / tile; }
  int width(int64_t number) const {
    return static_cast<int>(std::min(total() - number * tile, tile));
  }
};

// [first, last).
struct Range {
  int64_t first, last;
};

// Some neighbouring features of tiled activations.
struct Slice {
  float* data;     // of all features; nullptr where there are none
  int64_t stride;  // floats from one full tile to the next; 0: in memory of the tile's own
  int64_t first;   // feature of the slice
  int64_t size;    // floats that `data` has, where it is not the tile's own
  float* at(int64_t tile, int64_t feature, int width) const {
    return data + tile * stride + (first + feature) * width;
  }
};

// What is done with a product before it is stored: activation(product + bias) * factor + addend.
struct Epilogue {
  const float* bias;  // [rows] or nullptr
  int activation;
  Slice factor;
  Slice addend;
};
