// Whether memory that a call names is as long as its steps need.
#pragma once

#include "chain.h"

// What is too short, as text that lives until the thread's next call; nullptr where nothing is.
// `scratch`: floats of a tile's own memory.
const char* find_shortage(const Geometry& geometry, const Step* steps, int count, int64_t scratch);

// The same of a sparse matrix: `starts`, `indices` and `values` are how many there are of each. Its
// row starts have to rise, and its columns to lie within it.
const char* find_shortage(int64_t rows, int64_t columns, int64_t block, const int32_t* row_starts,
                          int64_t starts, const int32_t* column_indices, int64_t indices,
                          int64_t values);
