// Scaled dot-product attention on tiled activations.
//
// Scores are kept with one row a key and one column a query, so that the softmax goes down columns
// and nothing is ever summed across a vector.
#pragma once

#include "attention_call.h"
#include "attention_matrix.h"
#include "multiply.h"

namespace KERNEL_ISA {

// Features of one head, of one sequence: tile after tile, each [features, kTile].
struct Head {
  const float* data;
  int64_t stride;  // floats from tile to tile
};

// One head of a sequence as it lies, where sequences are whole tiles; else a copy in `room`, whose tiles
// are `stride` apart.
inline Head head_of(const Geometry& geometry, const Slice& slice, int64_t first, int64_t features,
                    int64_t sequence, float* room, int64_t stride) {
  int64_t padded = geometry.padded(), base = sequence * padded;
  if (padded % kTile == 0) return {slice.at(base / kTile, first, kTile), slice.stride};
  for (int64_t at = 0; at < padded; at += kChunk) {
    int64_t tile = (base + at) / kTile, lane = (base + at) % kTile;
    int width = geometry.width(tile);
    const float* from = slice.at(tile, first, width) + lane;
    float* to = room + at / kTile * stride + at % kTile;
    for (int64_t f = 0; f < features; ++f)
      std::memcpy(to + f * kTile, from + f * width, kChunk * sizeof(float));
  }
  return {room, stride};
}

// out[r, :] (+)= sum over i of left[i * left_step + r * left_row] * right[i, :], for kCount rows and
// kVectors vectors; rows of `right` and `out` are a tile wide. With kHalves both sides have two bfloat16 in
// the place of each float.
template <bool kHalves, int kCount, int kVectors>
inline void product(const float* left, int64_t left_row, int64_t left_step, const float* right,
                    int64_t length, float* out, bool more) {
  Vector sums[kCount][kVectors] = {};
  if (more)
    for (int r = 0; r < kCount; ++r)
      for (int t = 0; t < kVectors; ++t) sums[r][t] = load(out + r * kTile + t * kLanes);
  for (int64_t i = 0; i < length; ++i) {
    Vector x[kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kVectors; ++t) keep(x[t] = load(right + i * kTile + t * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      Vector w = spread<kHalves>(left[i * left_step + r * left_row]);
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t) sums[r][t] = add_product<kHalves>(sums[r][t], w, x[t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kVectors; ++t) store(out + r * kTile + t * kLanes, sums[r][t]);
}

template <bool kHalves, int kVectors>
inline void products(const float* left, int64_t left_row, int64_t left_step, const float* right,
                     int64_t length, float* out, int64_t rows, bool more) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product<kHalves, kRows, kVectors>(left + r * left_row, left_row, left_step, right, length,
                                      out + r * kTile, more);
  for (; r < rows; ++r)
    product<kHalves, 1, kVectors>(left + r * left_row, left_row, left_step, right, length,
                                  out + r * kTile, more);
}

// The same for `queries` columns, a multiple of 16.
template <bool kHalves>
inline void wide_products(const float* left, int64_t left_row, int64_t left_step,
                          const float* right, int64_t length, float* out, int64_t rows,
                          int64_t queries, bool more) {
  int64_t vectors = queries / kLanes, done = 0;
  for (; vectors - done >= kWide; done += kWide)
    products<kHalves, kWide>(left, left_row, left_step, right + done * kLanes, length,
                             out + done * kLanes, rows, more);
  for (; done < vectors; ++done)
    products<kHalves, 1>(left, left_row, left_step, right + done * kLanes, length,
                         out + done * kLanes, rows, more);
}

inline void add_mask(const Attention& a, int64_t sequence, int64_t head, int64_t first,
                     int64_t queries, int64_t keys, float* scores) {
  const float* mask =
      a.mask + sequence * a.mask_strides[0] + head * a.mask_strides[1];
  for (int64_t j = 0; j < keys; ++j) {
    float* row = scores + j * kTile;
    const float* column = mask + j * a.mask_strides[3];
    if (a.mask_strides[2] == 0) {
      if (column[0] == 0.0f) continue;
      for (int64_t i = 0; i < queries; i += kLanes) store(row + i, load(row + i) + column[0]);
    } else {
      int64_t there = a.geometry.tokens - first < queries ? a.geometry.tokens - first : queries;
      for (int64_t i = 0; i < there; ++i) row[i] += column[(first + i) * a.mask_strides[2]];
    }
  }
}

// exp(score - largest) over the keys of each query, and one over what that sums to. A query that
// sees no key gets nothing: zeros.
template <int kVectors>
inline void softmax_strip(float* scores, int64_t keys, float scale, float* inverse) {
  Vector most[kVectors], sums[kVectors] = {};
  for (int t = 0; t < kVectors; ++t) most[t] = load(scores + t * kLanes);
  for (int64_t j = 1; j < keys; ++j)
    for (int t = 0; t < kVectors; ++t)
      most[t] = at_least(most[t], load(scores + j * kTile + t * kLanes));
  for (int t = 0; t < kVectors; ++t) most[t] = most[t] == -__builtin_inff() ? Vector{} : most[t];
  for (int64_t j = 0; j < keys; ++j) {
    float* row = scores + j * kTile;
    Vector values[kVectors];
    for (int t = 0; t < kVectors; ++t) values[t] = (load(row + t * kLanes) - most[t]) * scale;
    exponentials<kVectors>(values);
    for (int t = 0; t < kVectors; ++t) {
      sums[t] += values[t];
      store(row + t * kLanes, values[t]);
    }
  }
  for (int t = 0; t < kVectors; ++t)
    store(inverse + t * kLanes, sums[t] == 0.0f ? Vector{} : 1.0f / sums[t]);
}

inline void softmax(float* scores, int64_t keys, int64_t queries, float scale, float* inverse) {
  int64_t vectors = queries / kLanes, done = 0;
  for (; vectors - done >= kWide; done += kWide)
    softmax_strip<kWide>(scores + done * kLanes, keys, scale, inverse + done * kLanes);
  for (; done < vectors; ++done)
    softmax_strip<1>(scores + done * kLanes, keys, scale, inverse + done * kLanes);
}

// Scores of some keys of one tile, one row a key; of a matrix unit in whole sixteens, and keys token by
// token.
template <bool kHalves>
inline void score_keys(const float* keys, const float* queries, int64_t width, float* scores,
                       int64_t count, int64_t columns) {
#if defined(KERNEL_AMX)
  if constexpr (kHalves) {
    int64_t pairs = whole_groups(width);
    matrix_products(keys, pairs, queries, pairs, scores, count, columns, false);
    return;
  }
#endif
  wide_products<kHalves>(keys, 1, kTile, queries, width, scores, count, columns, false);
}

// What some tokens, or pairs of them, add to the result.
template <bool kHalves>
inline void sum_values(const float* values, float* weights, int64_t count, float* result,
                       int64_t rows, int64_t columns, bool more) {
  constexpr int64_t kRow = kHalves ? kTile / 2 : kTile;
#if defined(KERNEL_AMX)
  if constexpr (kHalves) {
    int64_t whole = whole_groups(count);
    std::fill(weights + count * kTile, weights + whole * kTile, 0.0f);
    matrix_products(values, kRow, weights, whole, result, rows, columns, more);
    return;
  }
#endif
  wide_products<kHalves>(values, kRow, 1, weights, count, result, rows, columns, more);
}

// One tile of queries of one head, or what there is of it. With kHalves queries and keys are pairs of
// features, values pairs of tokens.
template <bool kHalves>
void attend_tile(const Attention& a, int64_t sequence, int64_t head, int64_t first,
                 const Head& query, const Head& key, const Head& value, float* scratch) {
  const Geometry& g = a.geometry;
  constexpr int kPair = kHalves ? 2 : 1;
  int64_t width = (a.width + kPair - 1) / kPair;
  int64_t left = g.padded() - first, queries = left < kTile ? left : kTile;
  int64_t seen = a.causal && first + queries < g.tokens ? first + queries : g.tokens;
  float* result = scratch;
  float* scores = result + kTile * whole_groups(a.out_width);
  float inverse[kTile] __attribute__((aligned(64)));
  const float* q = query.data + first / kTile * query.stride;
  for (int64_t j = 0; j < seen; j += kTile)
    score_keys<kHalves>(key.data + j / kTile * key.stride, q, width, scores + j * kTile,
                        seen - j < kTile ? seen - j : kTile, queries);
  bool masked = a.mask || a.causal;
  if (masked) {
    for (int64_t i = 0; i < seen * kTile; i += kLanes)
      store(scores + i, load(scores + i) * a.scale);
    if (a.mask) add_mask(a, sequence, head, first, queries, seen, scores);
    for (int64_t j = first + 1; a.causal && j < seen; ++j)
      for (int64_t i = 0; i < queries && first + i < j; ++i)
        scores[j * kTile + i] = -__builtin_inff();
  }
  softmax(scores, seen, queries, masked ? 1.0f : a.scale, inverse);
  if (kHalves) pair_features(seen, kTile, scores, scores);
  for (int64_t j = 0; j < seen; j += kTile) {
    int64_t keys = seen - j < kTile ? seen - j : kTile;
    sum_values<kHalves>(value.data + j / kTile * value.stride, scores + j / kPair * kTile,
                        (keys + kPair - 1) / kPair, result, a.out_width, queries, j > 0);
  }
  int64_t base = sequence * g.padded() + first;
  for (int64_t r = 0; r < a.out_width; ++r)
    for (int64_t at = 0; at < queries; at += kLanes) {
      int64_t tile = (base + at) / kTile, lane = (base + at) % kTile;
      store(a.output.at(tile, head * a.out_width + r, g.width(tile)) + lane,
            load(result + r * kTile + at) * load(inverse + at));
    }
}

#if defined(KERNEL_AVX512_BF16)
// Rows of tokens as pairs of neighbouring tokens.
inline void pair_tokens(int64_t rows, const float* from, float* to) {
  for (int64_t i = 0; i < rows * kTile; i += 2 * kLanes)
    store(to + i / 2, cut_halves(load(from + i), load(from + i + kLanes)));
}

// A head with pairs of tokens in `room`, where it may lie already; its tiles are `stride` apart.
inline Head paired_tokens(const Head& head, int64_t tiles, int64_t features, float* room,
                          int64_t stride) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    pair_tokens(features, head.data + tile * head.stride, room + tile * stride);
  return {room, stride};
}

// The same of features. What a matrix unit multiplies besides is zero.
inline Head paired_features(const Head& head, int64_t tiles, int64_t features, float* room,
                            int64_t stride) {
  const int64_t pairs = (features + 1) / 2;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float* to = room + tile * stride;
    pair_features(features, kTile, head.data + tile * head.stride, to);
    if (kMatrixUnit) std::fill(to + pairs * kTile, to + whole_groups(pairs) * kTile, 0.0f);
  }
  return {room, stride};
}

// Tokens from `token` on that only fill up the last pair, or the last pairs of a matrix unit: whatever
// they hold is multiplied by zero.
inline void drop_tokens(const Head& head, int64_t token, int64_t features) {
  const int64_t inside = token % kTile, lane = inside / 2;
  const int64_t end = kMatrixUnit && inside ? kTile / 2 : (inside + 1) / 2;
  if (lane == end) return;
  float* row = const_cast<float*>(head.data) + token / kTile * head.stride;
  for (int64_t f = 0; f < features; ++f, row += kTile / 2) {
    uint32_t bits;
    std::memcpy(&bits, row + lane, sizeof(bits));
    bits = token % 2 ? bits & 0xffff : 0;
    std::memcpy(row + lane, &bits, sizeof(bits));
    for (int64_t i = lane + 1; i < end; ++i) row[i] = 0.0f;
  }
}

// Keys token by token, as a matrix unit reads them.
inline Head turned_keys(const Head& head, int64_t tiles, int64_t pairs, float* room) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    turn_pairs(head.data + tile * head.stride, pairs, room + tile * pairs * kTile);
  return {room, pairs * kTile};
}
#endif

// All queries of one head of one sequence.
void attend(const Attention& a, int64_t sequence, int64_t head, float* scratch) {
  int64_t group = head / (a.heads / a.groups), tiles = a.tiles();
  const int64_t stride = kTile * (a.width + 1 + kChunk), out_stride = kTile * whole_groups(a.out_width);
  const int64_t pairs = whole_groups((a.width + 1) / 2);
  float* keys = scratch;
  float* values = keys + tiles * stride;
  float* queries = values + tiles * out_stride;
  float* turned = queries + tiles * stride;
  float* rest = turned + tiles * kTile * pairs;
  Head key = head_of(a.geometry, a.key, group * a.width, a.width, sequence, keys, stride);
  Head value = head_of(a.geometry, a.value, group * a.out_width, a.out_width, sequence, values,
                       out_stride);
  Head query = head_of(a.geometry, a.query, head * a.width, a.width, sequence, queries, stride);
  const int64_t padded = a.geometry.padded();
#if defined(KERNEL_AVX512_BF16)
  if (a.halves) {
    key = paired_features(key, tiles, a.width, keys, stride);
    value = paired_tokens(value, tiles, a.out_width, values, out_stride);
    drop_tokens(value, a.geometry.tokens, a.out_width);
    query = paired_features(query, tiles, a.width, queries, stride);
    if (kMatrixUnit) key = turned_keys(key, tiles, pairs, turned);
    MatrixUnit unit(kChunk);
    for (int64_t first = 0; first < padded; first += kTile)
      attend_tile<true>(a, sequence, head, first, query, key, value, rest);
    return;
  }
#endif
  for (int64_t first = 0; first < padded; first += kTile)
    attend_tile<false>(a, sequence, head, first, query, key, value, rest);
}

}  // namespace KERNEL_ISA
