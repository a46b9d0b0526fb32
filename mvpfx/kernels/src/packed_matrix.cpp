#include "packed_matrix.h"

#include <algorithm>

namespace {

// How a matrix unit goes about a weight: how many rows at once, and what a group of columns costs for
// 64 tokens, whose activations lie side by side or have to be copied. In cycles, as measured within a
// model, where weights have to arrive from beyond the second cache.
struct Manner {
  int rows;
  double in_place, copied;
};
constexpr Manner kFew{4, 100, 245}, kMany{kMatrixRows, 280, 450};

// The same of an entry that vectors of floats multiply: by itself or with those of three more rows.
constexpr double kEntry = 4.0, kSharedEntry = 3.8;

// Columns of some rows in groups. First come groups whose columns follow each other: all that any of
// the rows has, with those between them.
struct Groups {
  std::vector<int32_t> columns;
  int64_t in_place;
  int64_t count() const {
    return (static_cast<int64_t>(columns.size()) + kMatrixPairs - 1) / kMatrixPairs;
  }
};

Groups group(const std::vector<int32_t>& columns, int64_t all, const Manner& manner) {
  Groups found{};
  std::vector<int32_t> rest;
  for (size_t at = 0, end; at < columns.size(); at = end) {
    int32_t first = columns[at] / kMatrixPairs * kMatrixPairs;
    for (end = at; end < columns.size() && columns[end] < first + kMatrixPairs;) ++end;
    bool whole = first + kMatrixPairs <= all;
    if (!whole || (end - at) * manner.copied <= kMatrixPairs * manner.in_place) {
      rest.insert(rest.end(), columns.begin() + at, columns.begin() + end);
      continue;
    }
    for (int p = 0; p < kMatrixPairs; ++p) found.columns.push_back(first + p);
    ++found.in_place;
  }
  found.columns.insert(found.columns.end(), rest.begin(), rest.end());
  return found;
}

std::vector<Groups> group_rows(const Rows& rows, int64_t all, const Manner& manner) {
  std::vector<Groups> found;
  for (size_t first = 0; first < rows.size(); first += manner.rows) {
    std::vector<int32_t> columns;
    for (size_t row = first; row < std::min(first + manner.rows, rows.size()); ++row)
      for (const Entry& entry : rows[row]) columns.push_back(entry.column);
    tidy(columns);
    found.push_back(group(columns, all, manner));
  }
  return found;
}

double cycles(const std::vector<Groups>& found, const Manner& manner) {
  double sum = 0;
  for (const Groups& groups : found)
    sum += groups.in_place * manner.in_place +
           (groups.count() - groups.in_place) * manner.copied;
  return sum;
}

// The lines of rows [first, last).
void add_lines(Packed* packed, const Rows& rows, size_t first, size_t last, const Groups& groups,
               std::vector<int64_t>& place) {
  int64_t start = packed->group_count();
  packed->starts.push_back(start);
  packed->lines.resize(packed->lines.size() + groups.count() * packed->matrix);
  for (size_t i = 0; i < groups.columns.size(); ++i) place[groups.columns[i]] = i;
  for (size_t row = first; row < last; ++row)
    for (const Entry& entry : rows[row]) {
      int64_t at = place[entry.column];
      int64_t line = (start + at / kMatrixPairs) * packed->matrix + row - first;
      packed->lines[line].values[at % kMatrixPairs] = entry.value;
    }
  packed->pairs.insert(packed->pairs.end(), groups.columns.begin(), groups.columns.end());
  // What is missing in the last group is the last column again, with zeros.
  while (packed->pairs.size() % kMatrixPairs) packed->pairs.push_back(packed->pairs.back());
}

}  // namespace

bool pack_matrix(Packed* packed, const Rows& rows, int64_t entries) {
  std::vector<Groups> few = group_rows(rows, packed->columns, kFew);
  std::vector<Groups> many = group_rows(rows, packed->columns, kMany);
  double by_few = cycles(few, kFew), by_many = cycles(many, kMany);
  double by_vectors = entries * (packed->group == 4 ? kSharedEntry : kEntry);
  if (std::min(by_few, by_many) >= by_vectors) return false;
  size_t together = by_few < by_many ? kFew.rows : kMany.rows;
  packed->matrix = static_cast<int>(together);
  std::vector<int64_t> place(packed->columns);
  const std::vector<Groups>& chosen = by_few < by_many ? few : many;
  for (size_t i = 0; i < chosen.size(); ++i)
    add_lines(packed, rows, i * together, std::min((i + 1) * together, rows.size()), chosen[i],
              place);
  packed->starts.push_back(packed->group_count());
  return true;
}
