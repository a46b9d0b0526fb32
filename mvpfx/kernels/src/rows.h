// The nonzeros of a matrix, row by row.
#pragma once

#include <cstdint>
#include <vector>

struct Entry {
  int32_t column;
  float value;
};

using Rows = std::vector<std::vector<Entry>>;

// Ascending, each once.
void tidy(std::vector<int32_t>& columns);
