// A sparse matrix in the order in which the kernels read it.
#pragma once

#include <cstdint>
#include <vector>

// Rows and columns whose activations stay in cache while they are multiplied.
struct Block {
  int64_t unit, units;    // the first, and how many
  int64_t offset, value;  // the first of its first unit
};

// The most rows that a matrix unit multiplies at once, and pairs of columns.
constexpr int kMatrixRows = 16, kMatrixPairs = 16;

// What a row has in a group of columns.
struct alignas(64) Line {
  float values[kMatrixPairs];
};

struct Packed {
  int64_t rows;
  int64_t inputs;     // columns of the matrix
  int64_t columns;    // the same, or of pairs, where `halves`
  bool halves;        // a value is two bfloat16, of neighbouring columns, in the place of a float
  int group;          // rows of a unit: 2 or 4
  int64_t panel;      // rows of a block
  int64_t depth;      // columns of a block
  int tile;           // tokens of the tiles that it is for
  std::vector<Block> blocks;  // panel by panel, within it by columns
  // Rows that are computed together, two or four: their numbers, then how many entries they share, then
  // how many each of two has besides. Where rows are missing the first stands in, with zeros.
  std::vector<int32_t> units;
  // An entry that rows share is one offset and a value for each, another an offset and a value for each.
  // An offset is that of a column within its block, in tokens of a full tile.
  std::vector<uint16_t> offsets;
  std::vector<float> values;
  // Where it lies instead as a matrix unit reads it, the rows that are multiplied at once, else 0. Of so
  // many rows there are groups of 16 columns that any of them has, with a line for each row.
  int matrix;
  std::vector<int64_t> starts;  // first group of each so many rows, then how many there are
  std::vector<int32_t> pairs;   // columns, 16 a group; those that follow each other are read in place
  std::vector<Line> lines;
  int64_t group_count() const { return static_cast<int64_t>(pairs.size()) / kMatrixPairs; }
  int64_t panels() const { return (rows + panel - 1) / panel; }
  // At least one, for the bias.
  int64_t depths() const { return columns ? (columns + depth - 1) / depth : 1; }
};

// The most columns of a block.
constexpr int64_t kDeepest = 384;

// With `halves` the values have to be numbers that bfloat16 has; with `matrix` they may be packed for a
// matrix unit. `tile`: tokens of the tiles that it is for.
Packed* pack(int64_t rows, int64_t columns, int64_t block, bool halves, bool matrix, int tile,
             const int32_t* row_starts, const int32_t* column_indices, const float* values);
