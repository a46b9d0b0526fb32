// Sparse weight times tiled activations, some rows by 16 pairs of columns at a time: with AMX, or in the
// same order without.
#pragma once

#include "matrix_unit.h"
#include "multiply.h"

namespace KERNEL_ISA {

#if defined(KERNEL_AMX)
// Activations of a group's columns, for each 16 tokens 16 lines.
struct Gathered {
  const float* data;
  int64_t chunk, line;  // floats from 16 tokens to the next, and from pair to pair
};

// Those of columns that follow each other as they lie; else a copy.
template <int kChunks>
inline Gathered gather(const int32_t* columns, const float* x, int64_t width, float* copy) {
  const int32_t last = columns[kMatrixPairs - 1];
  if (last - columns[0] == kMatrixPairs - 1 && last != columns[kMatrixPairs - 2])
    return {x + columns[0] * width, kChunk, width};
#pragma GCC unroll 4
  for (int p = 0; p < kMatrixPairs; ++p)
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c)
      store(copy + (c * kMatrixPairs + p) * kChunk, load(x + columns[p] * width + c * kChunk));
  return {copy, kMatrixPairs * kChunk, kChunk};
}

// packed.matrix rows for kChunks times 16 tokens; rows of `sums` are a tile wide.
template <int kChunks>
void sum_rows(const Packed& packed, int64_t first, int64_t last, const float* x, int64_t width,
              float* sums) {
  constexpr int64_t kGathered = int64_t{kMatrixPairs} * kTile;
  alignas(64) float copies[2 * kGathered];
  const int32_t* columns = packed.pairs.data();
  zero_sums();
  Gathered next{};
  if (first < last) next = gather<kChunks>(columns + first * kMatrixPairs, x, width, copies);
  for (int64_t g = first; g < last; ++g) {
    Gathered now = next;
    // Copied before it is needed: the matrix unit waits for what has not arrived in the cache.
    if (g + 1 < last)
      next = gather<kChunks>(columns + (g + 1) * kMatrixPairs, x, width,
                             copies + (g + 1 - first) % 2 * kGathered);
    settle();
    add_matrices<kChunks>(packed.lines[g * packed.matrix].values, sizeof(Line), now.data, now.chunk,
                          now.line * int64_t{sizeof(float)});
  }
  store_sums<kChunks>(sums);
  settle();
}
#else
template <int kChunks>
void sum_rows(const Packed& packed, int64_t first, int64_t last, const float* x, int64_t width,
              float* sums) {
  std::fill(sums, sums + kMatrixRows * kTile, 0.0f);
  for (int64_t g = first; g < last; ++g)
    for (int r = 0; r < packed.matrix; ++r)
      for (int p = 0; p < kMatrixPairs; ++p) {
        Vector w = spread<true>(packed.lines[g * packed.matrix + r].values[p]);
        const float* from = x + packed.pairs[g * kMatrixPairs + p] * width;
        for (int lane = 0; lane < kChunks * kChunk; lane += kLanes) {
          float* sum = sums + r * kTile + lane;
          store(sum, add_halves(load(sum), w, load(from + lane)));
        }
      }
}
#endif

// From the sums of some rows to what is stored.
template <int kVectors>
void finish_rows(const float* sums, int64_t first, int64_t last, const Epilogue& epilogue,
                 Strip strip) {
  for (int64_t row = first; row < last; ++row)
    for (strip.lane = 0; strip.lane < strip.width; strip.lane += kVectors * kLanes) {
      const float* from = sums + (row - first) * kTile + strip.lane;
      Vector bias = broadcast(epilogue.bias ? epilogue.bias[row] : 0.0f), x[kVectors];
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t) x[t] = load(from + t * kLanes) + bias;
      finish<kVectors>(x, epilogue, row, strip);
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t)
        store(strip.output + row * strip.width + strip.lane + t * kLanes, x[t]);
    }
}

// Rows [first, last) for all tiles before the next rows: their weights are read once.
void multiply_matrix(const Packed& packed, int64_t first, int64_t last, const Geometry& geometry,
                     Range tiles, const Slice& input, const Slice& output,
                     const Epilogue& epilogue) {
  constexpr decltype(&sum_rows<4>) kSum[] = {sum_rows<1>, sum_rows<2>, sum_rows<3>, sum_rows<4>};
  alignas(64) float sums[kMatrixRows * kTile];
  const int64_t together = packed.matrix;
  MatrixUnit unit(packed.matrix);
  for (int64_t row = first; row < last; row += together)
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      int width = geometry.width(tile);
      const int64_t* groups = packed.starts.data() + row / together;
      kSum[width / kChunk - 1](packed, groups[0], groups[1], input.at(tile, 0, width), width, sums);
      Strip strip{nullptr, output.at(tile, 0, width), tile, width, 0};
      int64_t end = std::min(row + together, last);
      if (width == kTile) finish_rows<kWide>(sums, row, end, epilogue, strip);
      else finish_rows<1>(sums, row, end, epilogue, strip);
    }
}

// Some panels for some tiles; each panel for all tiles before the next, whose weights are read once then.
void multiply(const Packed& packed, Range panels, const Geometry& geometry, Range tiles,
              const Slice& input, const Slice& output, const Epilogue& epilogue) {
  if (packed.matrix)
    return multiply_matrix(packed, panels.first * packed.panel,
                           std::min(panels.last * packed.panel, packed.rows), geometry, tiles, input,
                           output, epilogue);
  constexpr int64_t kBeside = kWidest / kTile;  // tiles for which a block of weights stays near
  auto one = packed.halves ? (packed.group == 2 ? multiply_panel<2, true> : multiply_panel<4, true>)
                           : (packed.group == 2 ? multiply_panel<2, false> : multiply_panel<4, false>);
  for (int64_t panel = panels.first; panel < panels.last; ++panel)
    for (int64_t tile = tiles.first; tile < tiles.last; tile += kBeside)
      one(packed, panel, geometry, {tile, std::min(tile + kBeside, tiles.last)}, input, output,
          epilogue);
}

}  // namespace KERNEL_ISA
