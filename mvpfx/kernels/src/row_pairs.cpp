#include "row_pairs.h"

#include <algorithm>
#include <utility>

RowColumns::RowColumns(int64_t row, const std::vector<Entry>& entries, Span span, int64_t first_column)
    : row(row), span(span), bits{} {
  for (size_t e = span.first; e < span.last; ++e) {
    int64_t column = entries[e].column - first_column;
    bits[column / 64] |= uint64_t{1} << column % 64;
  }
}

int32_t RowColumns::shared(const RowColumns& other) const {
  int32_t sum = 0;
  for (int64_t w = 0; w < kDeepest / 64; ++w) sum += __builtin_popcountll(bits[w] & other.bits[w]);
  return sum;
}

std::vector<RowPair> pair_rows(std::vector<RowColumns> rows) {
  std::stable_sort(rows.begin(), rows.end(),
                   [](const RowColumns& a, const RowColumns& b) { return a.count() > b.count(); });
  std::vector<RowPair> pairs;
  std::vector<char> taken(rows.size(), 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (taken[i]) continue;
    const RowColumns& a = rows[i];
    size_t best = i;
    int32_t most = 0, best_score = INT32_MIN;
    for (size_t j = i + 1; j < rows.size(); ++j) {
      if (taken[j]) continue;
      // An entry that the shorter row lacks is a zero to multiply, which undoes one that both share.
      int32_t missing = a.count() - rows[j].count();
      if (rows[j].count() - missing <= best_score) break;
      int32_t shared = a.shared(rows[j]);
      if (shared - missing > best_score) best = j, best_score = shared - missing, most = shared;
    }
    const RowColumns& b = rows[best];
    Span rest = best == i ? Span{b.span.last, b.span.last} : b.span;
    taken[i] = taken[best] = 1;
    pairs.push_back({{a.row, b.row}, {a.span, rest}, most, a.count() - most});
  }
  std::stable_sort(pairs.begin(), pairs.end(), [](const RowPair& a, const RowPair& b) {
    return std::pair(a.own, a.shared) > std::pair(b.own, b.shared);
  });
  return pairs;
}
