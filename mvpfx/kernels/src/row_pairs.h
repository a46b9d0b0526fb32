// Which two rows of a block of columns are computed together.
#pragma once

#include <cstddef>

#include "packed.h"
#include "rows.h"

// Entries [first, last) of a row.
struct Span {
  size_t first, last;
  size_t size() const { return last - first; }
};

// The columns of a block in which a row has entries.
struct RowColumns {
  int64_t row;
  Span span;
  uint64_t bits[kDeepest / 64];
  RowColumns(int64_t row, const std::vector<Entry>& entries, Span span, int64_t first_column);
  int32_t count() const { return static_cast<int32_t>(span.size()); }
  int32_t shared(const RowColumns& other) const;
};

struct RowPair {
  int64_t rows[2];
  Span spans[2];
  int32_t shared;  // columns of both
  int32_t own;     // further entries of the row that has more
};

// Each row, those with the most entries first, with the one that has the most columns in common with it and
// hardly fewer entries. A last row alone is with itself, without entries. Pairs with as many entries follow
// each other: loops of one length after the other are foreseen by the processor.
std::vector<RowPair> pair_rows(std::vector<RowColumns> rows);
