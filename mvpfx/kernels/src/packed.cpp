#include "packed.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "packed_matrix.h"
#include "row_pairs.h"
#include "tiles.h"

namespace {

constexpr double kSharedAtLeast = 0.7;  // of what four rows hold in common columns

// Rows of a block: their sums, of 64 tokens, take 192 KiB.
constexpr int64_t kPanel = 768;

// One entry a column, which the packed form relies on: values at the same place add up, as in torch.
void add_up(std::vector<Entry>& row) {
  size_t count = 0;
  for (const Entry& entry : row)
    if (count && row[count - 1].column == entry.column) row[count - 1].value += entry.value;
    else row[count++] = entry;
  row.resize(count);
}

// The nonzeros of each row, columns ascending. A block's zeros are left out.
Rows read_rows(int64_t rows, int64_t block, const int32_t* starts, const int32_t* columns,
               const float* values) {
  Rows found(rows);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = row / block, inside = row % block;
    for (int32_t i = starts[at]; i < starts[at + 1]; ++i)
      for (int64_t c = 0; c < block; ++c) {
        float value = values[(int64_t{i} * block + inside) * block + c];
        if (value != 0.0f) found[row].push_back({static_cast<int32_t>(columns[i] * block + c), value});
      }
    std::sort(found[row].begin(), found[row].end(),
              [](const Entry& a, const Entry& b) { return a.column < b.column; });
    add_up(found[row]);
  }
  return found;
}

// Two neighbouring columns as one, whose value has the upper halves of both: the even one's below.
void pair_columns(std::vector<Entry>& row) {
  size_t count = 0;
  for (size_t i = 0; i < row.size();) {
    int32_t pair = row[i].column / 2;
    uint32_t both = 0;
    for (; i < row.size() && row[i].column / 2 == pair; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &row[i].value, sizeof(bits));
      both |= row[i].column % 2 ? bits & 0xffff0000u : bits >> 16;
    }
    row[count].column = pair;
    std::memcpy(&row[count++].value, &both, sizeof(both));
  }
  row.resize(count);
}

// Whether four neighbouring rows mostly have the same columns.
bool rows_share(const Rows& rows) {
  int64_t held = 0, room = 0;
  int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t row = 0; row < count; row += 4) {
    int64_t last = std::min(row + 4, count);
    std::vector<int32_t> columns;
    for (int64_t r = row; r < last; ++r)
      for (const Entry& entry : rows[r]) columns.push_back(entry.column);
    held += columns.size();
    tidy(columns);
    room += 4 * columns.size();
  }
  return room > 0 && held >= kSharedAtLeast * room;
}

// Columns of a block. What a tile has of them, of 64 tokens 128 or of less 192, stays in the first
// cache; where few weights meet each of them it is worth more to begin and end sums less often.
int64_t depth_for(const Rows& rows, int64_t columns, int tile) {
  double held = 0;
  for (const std::vector<Entry>& row : rows) held += row.size();
  double density = rows.empty() || !columns ? 0 : held / (double(rows.size()) * columns);
  if (tile < kWidest) return density >= 0.09 ? 192 : density >= 0.04 ? 256 : kDeepest;
  return density >= 0.12 ? 128 : density >= 0.09 ? 160 : density >= 0.04 ? 192 : 256;
}

class Packer {
 public:
  Packer(Packed* packed, const Rows& rows) : packed_(packed), rows_(rows), next_(rows.size(), 0) {}

  void run() {
    for (int64_t first = 0; first < packed_->rows; first += packed_->panel) {
      int64_t last = std::min(first + packed_->panel, packed_->rows);
      int64_t depths = packed_->depths();
      for (int64_t q = 0; q < depths; ++q) {
        Block block{unit_count(), 0, static_cast<int64_t>(packed_->offsets.size()),
                    static_cast<int64_t>(packed_->values.size())};
        // Every row is seen in the first block, where its sum starts, and in the last, where it ends.
        bool all = q == 0 || q == depths - 1;
        if (packed_->group == 2) pairs(first, last, q, all);
        else fours(first, last, q, all);
        block.units = unit_count() - block.unit;
        packed_->blocks.push_back(block);
      }
    }
  }

 private:
  int64_t unit_count() const {
    return static_cast<int64_t>(packed_->units.size()) / (packed_->group + 2);
  }

  // The end of a row's entries that lie in the column block.
  size_t end_of(int64_t row, int64_t q) const {
    int64_t limit = (q + 1) * packed_->depth;
    size_t end = next_[row];
    while (end < rows_[row].size() && rows_[row][end].column < limit) ++end;
    return end;
  }

  uint16_t offset(int32_t column, int64_t q) const {
    return static_cast<uint16_t>((column - q * packed_->depth) * packed_->tile);
  }

  void pairs(int64_t first, int64_t last, int64_t q, bool all) {
    std::vector<RowColumns> rows;
    for (int64_t row = first; row < last; ++row) {
      size_t end = end_of(row, q);
      if (end > next_[row] || all)
        rows.push_back(RowColumns(row, rows_[row], {next_[row], end}, q * packed_->depth));
      next_[row] = end;
    }
    for (const RowPair& pair : pair_rows(std::move(rows))) append(pair, q);
  }

  void append(const RowPair& pair, int64_t q) {
    for (int64_t row : pair.rows) packed_->units.push_back(static_cast<int32_t>(row));
    packed_->units.push_back(pair.shared);
    packed_->units.push_back(pair.own);
    const std::vector<Entry>* rows[2] = {&rows_[pair.rows[0]], &rows_[pair.rows[1]]};
    std::vector<Entry> own[2];
    for (Span a = pair.spans[0], b = pair.spans[1]; a.size() || b.size();) {
      int64_t column = a.size() ? (*rows[0])[a.first].column : INT64_MAX;
      int64_t other = b.size() ? (*rows[1])[b.first].column : INT64_MAX;
      if (column == other) {
        packed_->offsets.push_back(offset(static_cast<int32_t>(column), q));
        packed_->values.push_back((*rows[0])[a.first++].value);
        packed_->values.push_back((*rows[1])[b.first++].value);
      } else if (column < other) {
        own[0].push_back((*rows[0])[a.first++]);
      } else {
        own[1].push_back((*rows[1])[b.first++]);
      }
    }
    for (int32_t e = 0; e < pair.own; ++e)
      for (const std::vector<Entry>& entries : own) {
        bool there = e < static_cast<int32_t>(entries.size());
        packed_->offsets.push_back(there ? offset(entries[e].column, q) : 0);
        packed_->values.push_back(there ? entries[e].value : 0.0f);
      }
  }

  void fours(int64_t first, int64_t last, int64_t q, bool all) {
    for (int64_t row = first; row < last; row += 4) {
      int64_t end = std::min(row + 4, last);
      std::vector<int32_t> columns;
      for (int64_t r = row; r < end; ++r)
        for (size_t e = next_[r], stop = end_of(r, q); e < stop; ++e)
          columns.push_back(rows_[r][e].column);
      tidy(columns);
      if (columns.empty() && !all) continue;
      for (int64_t r = row; r < row + 4; ++r)
        packed_->units.push_back(static_cast<int32_t>(r < end ? r : row));
      packed_->units.push_back(static_cast<int32_t>(columns.size()));
      packed_->units.push_back(0);
      for (int32_t column : columns) {
        packed_->offsets.push_back(offset(column, q));
        for (int64_t r = row; r < row + 4; ++r) {
          bool there = r < end && next_[r] < rows_[r].size() && rows_[r][next_[r]].column == column;
          packed_->values.push_back(there ? rows_[r][next_[r]++].value : 0.0f);
        }
      }
    }
  }

  Packed* packed_;
  const Rows& rows_;
  std::vector<size_t> next_;  // first entry of each row that is not packed yet
};

// All rows, in whose place there are pairs of columns then.
void pair_all(Packed* packed, Rows& rows) {
  for (std::vector<Entry>& row : rows) pair_columns(row);
  packed->columns = (packed->columns + 1) / 2;
  packed->halves = true;
}

// For a matrix unit, if it is faster.
bool pack_pairs(Packed* packed, const Rows& rows) {
  int64_t entries = 0;
  for (const std::vector<Entry>& row : rows) entries += row.size();
  Rows pairs = rows;
  Packed wanted = *packed;
  pair_all(&wanted, pairs);
  if (!pack_matrix(&wanted, pairs, entries)) return false;
  *packed = std::move(wanted);
  return true;
}

}  // namespace

void tidy(std::vector<int32_t>& columns) {
  std::sort(columns.begin(), columns.end());
  columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
}

Packed* pack(int64_t rows, int64_t columns, int64_t block, bool halves, bool matrix, int tile,
             const int32_t* row_starts, const int32_t* column_indices, const float* values) {
  Rows found = read_rows(rows, block, row_starts, column_indices, values);
  auto owned = std::make_unique<Packed>();
  Packed* packed = owned.get();
  packed->rows = rows;
  packed->inputs = packed->columns = columns;
  packed->tile = tile;
  packed->group = rows_share(found) ? 4 : 2;
  packed->panel = kPanel;
  if (halves && matrix && pack_pairs(packed, found)) return owned.release();
  // Where there is a matrix unit, vectors multiply floats faster than they do pairs.
  if (halves && !matrix) {
    pair_all(packed, found);
    packed->group = rows_share(found) ? 4 : 2;
  }
  packed->depth = depth_for(found, packed->columns, tile);
  Packer(packed, found).run();
  return owned.release();
}
