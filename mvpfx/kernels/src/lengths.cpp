#include "lengths.h"

#include <cstdio>

namespace {

thread_local char message[160];

const char* const kNames[] = {"enter",     "leave",  "multiply", "normalize",
                              "combine",   "attend", "rotate"};

// One call: each member returns whether it is long enough, and says so where not.
class Lengths {
 public:
  Lengths(const Geometry& geometry, int64_t scratch)
      : geometry_(geometry), scratch_(scratch), tiles_(geometry.tiles()) {}

  bool step(int number, const Step& step) {
    number_ = number, kind_ = step.kind;
    switch (step.kind) {
      case kEnter: return outside(step) && slice("output", step.output, step.features);
      case kLeave: return outside(step) && slice("input", step.input, step.features);
      case kMultiply: return product(step);
      case kNormalize: return norm(step);
      case kCombine:
        return slice("input", step.input, step.features) &&
               slice("output", step.output, step.features) && beside(step, step.features);
      case kRotate: return heads(step) && rotation(step);
      case kAttend: return heads(step) && attention(step);
      default: return needs("kind", step.kind, kRotate);
    }
  }

 private:
  bool needs(const char* what, int64_t found, int64_t needed) {
    const char* kind = kind_ >= kEnter && kind_ <= kRotate ? kNames[kind_] : "unknown";
    std::snprintf(message, sizeof(message), "step %d (%s): %s is %lld, and %lld is needed", number_,
                  kind, what, static_cast<long long>(found), static_cast<long long>(needed));
    return false;
  }
  bool exactly(const char* what, int64_t found, int64_t needed) {
    return found == needed || needs(what, found, needed);
  }
  bool at_least(const char* what, int64_t found, int64_t needed) {
    return found >= needed || needs(what, found, needed);
  }

  // Features of tiled activations; `inside` where a tile's own memory will do.
  bool slice(const char* what, const Slice& slice, int64_t features, bool inside = true) {
    if (features < 0 || slice.first < 0) return needs(what, features, 0);
    const int64_t last = slice.first + features;
    if (slice.stride == 0)
      return inside ? at_least(what, scratch_, last * geometry_.tile) : needs(what, 0, last);
    if (slice.stride < 0) return needs(what, 0, features);
    if (!at_least(what, slice.stride / geometry_.tile, last) || !tiles_) return tiles_ == 0;
    const int64_t before = (tiles_ - 1) * slice.stride;
    return at_least(what, slice.size, before + last * geometry_.width(tiles_ - 1));
  }

  bool beside(const Step& step, int64_t features) {
    const Slice &factor = step.epilogue.factor, &addend = step.epilogue.addend;
    return (factor.stride < 0 || slice("factor", factor, features)) &&
           (addend.stride < 0 || slice("addend", addend, features));
  }

  // A tensor outside of tiles.
  bool outside(const Step& step) {
    if (!at_least("stride", step.sequence_stride, 0) || !at_least("stride", step.token_stride, 0))
      return false;
    if (!geometry_.sequences || !geometry_.tokens) return true;
    const int64_t last = (geometry_.sequences - 1) * step.sequence_stride +
                         (geometry_.tokens - 1) * step.token_stride;
    return at_least("tensor", step.tensor_count, last + step.features);
  }

  bool product(const Step& step) {
    const Packed* packed = step.packed;
    if (!packed) return needs("weight", 0, 1);
    return exactly("tile of the weight", packed->tile, geometry_.tile) &&
           exactly("columns of the weight", packed->inputs, step.features) &&
           (!step.epilogue.bias || exactly("bias", step.bias_count, packed->rows)) &&
           slice("input", step.input, step.features) &&
           slice("output", step.output, packed->rows) && beside(step, packed->rows);
  }

  bool norm(const Step& step) {
    if (!heads(step)) return false;
    const int64_t features = step.features / step.heads;
    return (!step.weight || exactly("weight", step.weight_count, features)) &&
           (!step.bias || exactly("bias", step.bias_count, features)) &&
           slice("input", step.input, step.features) &&
           slice("output", step.output, step.features);
  }

  bool heads(const Step& step) {
    if (!at_least("number of heads", step.heads, 1)) return false;
    return exactly("rest of features by heads", step.features % step.heads, 0);
  }

  bool rotation(const Step& step) {
    const int64_t features = step.features / step.heads;
    return exactly("rest of features by halves", features % 2, 0) &&
           slice("input", step.input, step.features) &&
           slice("output", step.output, step.features) &&
           slice("cosines", step.epilogue.factor, features) &&
           slice("sines", step.epilogue.addend, features);
  }

  bool attention(const Step& step) {
    const int64_t heads = step.heads, groups = step.groups;
    if (!at_least("number of keys and values", groups, 1)) return false;
    if (!exactly("rest of heads by keys and values", heads % groups, 0)) return false;
    if (!exactly("rest of output features by heads", step.out_features % heads, 0)) return false;
    return slice("query", step.input, step.features, false) &&
           slice("key", step.epilogue.factor, step.features / heads * groups, false) &&
           slice("value", step.epilogue.addend, step.out_features / heads * groups, false) &&
           slice("output", step.output, step.out_features, false) && mask(step);
  }

  bool mask(const Step& step) {
    if (!step.tensor || !geometry_.sequences || !geometry_.tokens) return true;
    const int64_t sizes[] = {geometry_.sequences, step.heads, geometry_.tokens, geometry_.tokens};
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) {
      if (!at_least("stride of the mask", step.mask_strides[i], 0)) return false;
      last += (sizes[i] - 1) * step.mask_strides[i];
    }
    return at_least("mask", step.tensor_count, last + 1);
  }

  const Geometry& geometry_;
  int64_t scratch_, tiles_;
  int number_ = 0, kind_ = 0;
};

const char* unfit(const char* what, int64_t found, int64_t needed) {
  std::snprintf(message, sizeof(message), "the weight's %s is %lld, and %lld is needed", what,
                static_cast<long long>(found), static_cast<long long>(needed));
  return message;
}

}  // namespace

const char* find_shortage(const Geometry& geometry, const Step* steps, int count, int64_t scratch) {
  if (geometry.sequences < 0 || geometry.tokens < 0) return "sequences or tokens are fewer than 0";
  Lengths lengths(geometry, scratch);
  for (int i = 0; i < count; ++i)
    if (!lengths.step(i, steps[i])) return message;
  return nullptr;
}

const char* find_shortage(int64_t rows, int64_t columns, int64_t block, const int32_t* row_starts,
                          int64_t starts, const int32_t* column_indices, int64_t indices,
                          int64_t values) {
  constexpr int64_t kMost = INT32_MAX;
  if (rows < 0 || rows > kMost) return unfit("number of rows", rows, kMost);
  if (columns < 0 || columns > kMost) return unfit("number of columns", columns, kMost);
  if (block < 1 || rows % block || columns % block) return unfit("block size", block, 1);
  const int64_t lines = rows / block, wide = columns / block;
  if (starts != lines + 1) return unfit("number of row starts", starts, lines + 1);
  if (values != indices * block * block)
    return unfit("number of values", values, indices * block * block);
  if (row_starts[0] != 0) return unfit("first row start", row_starts[0], 0);
  if (row_starts[lines] != indices) return unfit("last row start", row_starts[lines], indices);
  for (int64_t line = 0; line < lines; ++line)
    if (row_starts[line + 1] < row_starts[line])
      return unfit("row start", row_starts[line + 1], row_starts[line]);
  for (int64_t i = 0; i < indices; ++i)
    if (column_indices[i] < 0 || column_indices[i] >= wide)
      return unfit("column index", column_indices[i], wide - 1);
  return nullptr;
}
