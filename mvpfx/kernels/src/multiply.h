// Sparse weight times tiled activations.
#pragma once

#include <algorithm>
#include <type_traits>

#include "packed.h"
#include "vector.h"

namespace KERNEL_ISA {

// Some tokens of one tile, and what a block of weights reads and writes of them.
struct Strip {
  const float* input;  // first column of the block
  float* output;       // first row of all
  int64_t tile;
  int width, lane;
};

// How the sums of a block begin and end.
enum Stage { kMiddle = 0, kFirst = 1, kLast = 2, kOnly = 3 };
template <int kStage>
using Stage_ = std::integral_constant<int, kStage>;

template <int kVectors>
inline void finish(Vector (&sums)[kVectors], const Epilogue& epilogue, int64_t row,
                   const Strip& strip) {
  activate<kVectors>(sums, epilogue.activation);
  for (int t = 0; t < kVectors; ++t) {
    int lane = strip.lane + t * kLanes;
    if (epilogue.factor.data)
      sums[t] *= load(epilogue.factor.at(strip.tile, row, strip.width) + lane);
    if (epilogue.addend.data)
      sums[t] += load(epilogue.addend.at(strip.tile, row, strip.width) + lane);
  }
}

// Where a column begins; offsets are those of a full tile.
template <bool kFull>
inline const float* column(const Strip& strip, uint16_t offset) {
  return strip.input + (kFull ? offset : int64_t{offset} / kTile * strip.width);
}

// Asks for the sums of a unit. Rows of like length follow each other, wherever they are: the
// processor does not foresee them.
template <int kGroup, int kVectors>
inline void expect(const int32_t* unit, const Strip& strip, int width) {
#pragma GCC unroll 4
  for (int r = 0; r < kGroup; ++r)
    for (int lane = 0; lane < kVectors * kLanes; lane += kChunk)
      __builtin_prefetch(strip.output + int64_t{unit[r]} * width + lane, 1);
}

// Asks for some of the columns after a block of so many: with each unit two cache lines, so that all are
// near when their turn comes.
inline void approach(const Strip& strip, int64_t depth, int64_t unit) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const float* next = strip.input + depth * kTile + 2 * unit * kLine;
  if (2 * unit * kLine >= depth * kTile) return;
  __builtin_prefetch(next, 0, 2);
  __builtin_prefetch(next + kLine, 0, 2);
}

// sums + w * x, or of both halves.
template <bool kHalves>
inline Vector add_product(Vector sums, Vector w, Vector x) {
  if constexpr (kHalves) return add_halves(sums, w, x);
  return sums + w * x;
}

// A value for all tokens; where it is two halves it may look like a NaN, which is no matter to bits.
template <bool kHalves>
inline Vector spread(float value) {
  if constexpr (!kHalves) return broadcast(value);
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (Vector)(Ints{} + bits);
}

template <int kVectors, bool kHalves>
inline void add_products(Vector (&sums)[kVectors], Vector w, const float* x) {
#pragma GCC unroll 4
  for (int t = 0; t < kVectors; ++t)
    sums[t] = add_product<kHalves>(sums[t], w, load(x + t * kLanes));
}

// Entries whose column all rows of the unit meet: it is read once. They and the rest move `values` and
// `offsets` on. Sums stay in registers only if these calls become part of the loop over units.
template <int kGroup, bool kHalves, int kVectors, bool kFull>
__attribute__((always_inline)) inline void add_shared(
    Vector (&sums)[kGroup][kVectors], const float*& values, const uint16_t*& offsets, int32_t count,
    const Strip& strip) {
  for (int32_t e = 0; e < count; ++e, values += kGroup, ++offsets) {
    const float* x = column<kFull>(strip, offsets[0]);
    Vector xs[kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kVectors; ++t) keep(xs[t] = load(x + t * kLanes));
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      Vector w = spread<kHalves>(values[r]);
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t)
        sums[r][t] = add_product<kHalves>(sums[r][t], w, xs[t]);
    }
  }
}

// Entries of two rows with a column for each. Loads are what the sums wait for, so offsets are read four
// at a time, and values too where a processor can spread each of four in less time than it reads one.
template <bool kHalves, int kVectors, bool kFull>
__attribute__((always_inline)) inline void add_own(
    Vector (&sums)[2][kVectors], const float*& values, const uint16_t*& offsets, int32_t count,
    const Strip& strip) {
  int32_t e = 0;
  for (; e + 2 <= count; e += 2, values += 4, offsets += 4) {
    uint64_t four;
    std::memcpy(&four, offsets, sizeof(four));
    const Fours fours(values);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint16_t offset = static_cast<uint16_t>(four >> (16 * i));
      Vector w = kSpreadsFours ? fours.spread(i) : spread<kHalves>(values[i]);
      add_products<kVectors, kHalves>(sums[i % 2], w, column<kFull>(strip, offset));
    }
  }
  if (e < count) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
      add_products<kVectors, kHalves>(sums[r], spread<kHalves>(values[r]),
                                      column<kFull>(strip, offsets[r]));
    values += 2, offsets += 2;
  }
}

// All units of a block, for kVectors vectors of tokens. kPlain: there is nothing to finish.
template <int kGroup, bool kHalves, int kVectors, bool kFull, int kStage, bool kPlain>
void multiply_strip(const Packed& packed, const Block& block, const Epilogue& epilogue,
                    const Strip& strip) {
  // Sums that begin may be far, and of few tokens are soon done.
  constexpr int kAhead = kTile < kWidest && (kStage & kFirst) ? 4 : 1;
  const int width = kFull ? kTile : strip.width;
  const int32_t* unit = packed.units.data() + block.unit * (kGroup + 2);
  const float* values = packed.values.data() + block.value;
  const uint16_t* offsets = packed.offsets.data() + block.offset;
  for (int64_t u = 0; u < block.units; ++u, unit += kGroup + 2) {
    if (kFull) approach(strip, packed.depth, u);
    if (u + kAhead < block.units)
      expect<kGroup, kVectors>(unit + kAhead * (kGroup + 2), strip, width);
    Vector sums[kGroup][kVectors];
    float* to[kGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      to[r] = strip.output + int64_t{unit[r]} * width;
      Vector bias = broadcast(kStage & kFirst && epilogue.bias ? epilogue.bias[unit[r]] : 0.0f);
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t)
        sums[r][t] = kStage & kFirst ? bias : load(to[r] + t * kLanes);
    }
    add_shared<kGroup, kHalves, kVectors, kFull>(sums, values, offsets, unit[kGroup], strip);
    if constexpr (kGroup == 2)
      add_own<kHalves, kVectors, kFull>(sums, values, offsets, unit[kGroup + 1], strip);
    // The last row first: one that stands in for a missing row is written over by the row itself.
#pragma GCC unroll 4
    for (int r = kGroup - 1; r >= 0; --r) {
      if constexpr (!kPlain) finish<kVectors>(sums[r], epilogue, unit[r], strip);
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t) store(to[r] + t * kLanes, sums[r][t]);
    }
  }
}

template <int kGroup, bool kHalves, int kVectors, bool kFull>
void multiply_stage(const Packed& packed, const Block& block, const Epilogue& epilogue,
                    const Strip& strip, int stage) {
  bool plain = epilogue.activation == kNone && !epilogue.factor.data && !epilogue.addend.data;
  auto run = [&](auto chosen, auto nothing) {
    multiply_strip<kGroup, kHalves, kVectors, kFull, chosen(), nothing()>(packed, block, epilogue,
                                                                          strip);
  };
  constexpr std::true_type nothing;
  constexpr std::false_type something;
  if (stage == kFirst || (stage == kOnly && plain)) return run(Stage_<kFirst>{}, nothing);
  if (stage == kMiddle || plain) return run(Stage_<kMiddle>{}, nothing);
  if (stage == kLast) return run(Stage_<kLast>{}, something);
  run(Stage_<kOnly>{}, something);
}

template <int kGroup, bool kHalves>
void multiply_tile(const Packed& packed, const Block& block, const Epilogue& epilogue, Strip strip,
                   int stage) {
  const float* input = strip.input;
  float* output = strip.output;
  // Four rows half a tile after the other, where all sums find no room in registers.
  constexpr int kVectors = kGroup == 4 && kTile < kWidest ? kWide / 2 : kWide;
  const bool full = strip.width == kTile;
  for (; strip.lane < strip.width; strip.lane += (full ? kVectors : 1) * kLanes) {
    strip.input = input + strip.lane;
    strip.output = output + strip.lane;
    if (full)
      multiply_stage<kGroup, kHalves, kVectors, true>(packed, block, epilogue, strip, stage);
    else
      multiply_stage<kGroup, kHalves, 1, false>(packed, block, epilogue, strip, stage);
  }
}

// One panel of rows for some tiles, block by block.
template <int kGroup, bool kHalves>
void multiply_panel(const Packed& packed, int64_t panel, const Geometry& geometry, Range tiles,
                    const Slice& input, const Slice& output, const Epilogue& epilogue) {
  int64_t depths = packed.depths();
  for (int64_t q = 0; q < depths; ++q) {
    const Block& block = packed.blocks[panel * depths + q];
    int stage = (q == 0 ? kFirst : 0) | (q == depths - 1 ? kLast : 0);
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      int width = geometry.width(tile);
      Strip strip{input.at(tile, q * packed.depth, width), output.at(tile, 0, width), tile, width, 0};
      multiply_tile<kGroup, kHalves>(packed, block, epilogue, strip, stage);
    }
  }
}

// Pairs of neighbouring features of one tile as bfloat16, as `halves` of a weight meet them.
void pair_features(int64_t features, int width, const float* input, float* pairs) {
  constexpr int kVectors = kChunk / kLanes;
  for (int64_t f = 0; f < features; f += 2, pairs += width) {
    const float* low = input + f * width;
    for (int lane = 0; lane < width; lane += kChunk)
      for (int t = 0; t < kVectors; ++t) {
        int at = lane + t * kLanes;
        Vector high = f + 1 < features ? load(low + width + at) : Vector{};
        store(pairs + at, join_halves(load(low + at), high));
      }
  }
}

}  // namespace KERNEL_ISA
