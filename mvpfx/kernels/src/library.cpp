// The library's C interface. All sizes and strides are in elements; pointers are those of tensors.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "chain.h"
#include "export.h"
#include "lengths.h"
#include "packed.h"
#include "parallel.h"
#include "processor.h"
#include "table.h"

namespace {

const Kernels* kernels = available().front();

// Memory that a thread keeps for itself, in whole cache lines.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (static_cast<int64_t>(held_.size()) < count + kChunk) held_.resize(count + kChunk);
    uintptr_t address = reinterpret_cast<uintptr_t>(held_.data());
    return held_.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  std::vector<float> held_;
};

// Tiles, and the memory of their own: `scratch` floats each.
struct Span {
  Range tiles;
  float* own;
  int64_t scratch;

  Slice place(Slice slice) const {
    if (slice.stride == 0) return {own - tiles.first * scratch, scratch, slice.first, 0};
    return slice;
  }
  Slice place_if_any(Slice slice) const {
    return slice.stride < 0 ? Slice{} : place(slice);
  }
};

constexpr Range kAllPanels{0, INT64_MAX};

// Tokens that a step is done for before the next step: weights that two tiles meet are read once, and
// what a step leaves is still in cache.
constexpr int64_t kTogether = 2 * kWidest;

// Enter or leave, for one tile.
void cross_edge(const Kernels& table, const Geometry& geometry, const Step& step, int64_t tile,
                const Slice& input, const Slice& output) {
  int64_t chunk = tile * (geometry.tile / kChunk), end = chunk + geometry.width(tile) / kChunk;
  int64_t sequence = step.sequence_stride, token = step.token_stride;
  for (; chunk < end; ++chunk) {
    if (step.kind == kEnter && step.flag)
      table.enter_bf16(geometry, chunk, static_cast<const uint16_t*>(step.tensor), sequence, token,
                       step.features, output);
    else if (step.kind == kEnter)
      table.enter_float(geometry, chunk, static_cast<const float*>(step.tensor), sequence, token,
                        step.features, output);
    else if (step.flag)
      table.leave_bf16(geometry, chunk, input, step.features, static_cast<uint16_t*>(step.tensor),
                       sequence, token);
    else
      table.leave_float(geometry, chunk, input, step.features, static_cast<float*>(step.tensor),
                        sequence, token);
  }
}

// A product, of it some panels.
void run_product(const Kernels& table, const Geometry& geometry, const Step& step, Range tiles,
                 Range panels, Slice input, const Slice& output, const Epilogue& epilogue) {
  const Packed& packed = *step.packed;
  if (packed.halves) {
    static thread_local Scratch room;
    int64_t stride = packed.columns * geometry.tile;
    Slice pairs{room.floats((tiles.last - tiles.first) * stride) - tiles.first * stride, stride, 0, 0};
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
      int width = geometry.width(tile);
      table.pair_features(step.features, width, input.at(tile, 0, width), pairs.at(tile, 0, width));
    }
    input = pairs;
  }
  panels.last = std::min(panels.last, packed.panels());
  table.multiply(packed, panels, geometry, tiles, input, output, epilogue);
}

// One step for some tiles; of a product some panels.
void run_step(const Kernels& table, const Geometry& geometry, const Step& step, const Span& span,
              Range panels) {
  Slice input = span.place(step.input), output = span.place(step.output);
  Epilogue epilogue{step.epilogue.bias, step.epilogue.activation,
                    span.place_if_any(step.epilogue.factor),
                    span.place_if_any(step.epilogue.addend)};
  if (step.kind == kMultiply)
    return run_product(table, geometry, step, span.tiles, panels, input, output, epilogue);
  for (int64_t tile = span.tiles.first; tile < span.tiles.last; ++tile) {
    if (step.kind == kNormalize)
      table.normalize(geometry, tile, input, output, step.heads, step.features / step.heads,
                      step.weight, step.bias, step.epsilon, step.flag != 0);
    else if (step.kind == kCombine)
      table.combine(geometry, tile, input, output, step.features, epilogue);
    else if (step.kind == kRotate)
      table.rotate(geometry, tile, input, output, step.heads, step.features / step.heads,
                   epilogue.factor, epilogue.addend);
    else
      cross_edge(table, geometry, step, tile, input, output);
  }
}

}  // namespace

// The number of this interface: one more whenever a function or a struct changes.
EXPORT int mvpfx_interface() { return 5; }

// The name of the instruction set in use.
EXPORT const char* mvpfx_isa() { return kernels->name; }

// Use another instruction set that this processor has; returns whether it does.
EXPORT int mvpfx_use_isa(const char* name) {
  for (const Kernels* one : available())
    if (std::strcmp(one->name, name) == 0) {
      kernels = one;
      return 1;
    }
  return 0;
}

// Tokens of a tile, with the instruction set in use: weights are packed for it.
EXPORT int64_t mvpfx_tile() { return kernels->tile; }

// Whether weights and activations in bfloat16 are worth being multiplied as such.
EXPORT int mvpfx_halves() { return kernels->halves; }

// A sparse matrix in the order in which kernels read it, into `packed`; `starts`, `indices` and `numbers`
// are how many row starts, column indices and values there are. Returns nullptr, or what is wrong.
EXPORT const char* mvpfx_pack(int64_t rows, int64_t columns, int64_t block, int halves,
                              const int32_t* row_starts, int64_t starts,
                              const int32_t* column_indices, int64_t indices, const float* values,
                              int64_t numbers, Packed** packed) {
  const char* wrong = find_shortage(rows, columns, block, row_starts, starts, column_indices, indices,
                                    numbers);
  if (wrong) return wrong;
  try {
    *packed = pack(rows, columns, block, halves != 0, kernels->matrix, kernels->tile, row_starts,
                   column_indices, values);
  } catch (const std::bad_alloc&) {
    return "there is not enough memory to pack a weight";
  }
  return nullptr;
}

EXPORT void mvpfx_free(Packed* packed) { delete packed; }

namespace {

void run_all(const Kernels& table, const Geometry& geometry, const Step* steps, int count,
             const Span& span) {
  for (int i = 0; i < count; ++i) run_step(table, geometry, steps[i], span, kAllPanels);
}

// Steps that are done tile by tile.
void run_tiles(const Geometry& geometry, const Step* steps, int count, int64_t scratch,
               int threads) {
  const Kernels* table = kernels;
  int64_t tiles = geometry.tiles();
  if (tiles >= threads) {
    int64_t together = std::min(kTogether / geometry.tile, tiles / threads);
    parallel((tiles + together - 1) / together, threads, [&](int64_t job) {
      static thread_local Scratch own;
      Range some{job * together, std::min((job + 1) * together, tiles)};
      run_all(*table, geometry, steps, count, {some, own.floats(scratch * together), scratch});
    });
    return;
  }
  // Too few tiles for all threads: step by step, rows of weights shared out.
  static thread_local Scratch shared;
  float* own = shared.floats(scratch * tiles);
  for (int i = 0; i < count; ++i) {
    int64_t panels = steps[i].kind == kMultiply ? steps[i].packed->panels() : 1;
    parallel(tiles * panels, threads, [&](int64_t job) {
      int64_t tile = job / panels, panel = job % panels;
      Span span{{tile, tile + 1}, own + tile * scratch, scratch};
      run_step(*table, geometry, steps[i], span, {panel, panel + 1});
    });
  }
}

Attention attention_of(const Geometry& geometry, const Step& step) {
  Attention attention{geometry,
                      step.input,
                      step.epilogue.factor,
                      step.epilogue.addend,
                      step.output,
                      step.heads,
                      step.groups,
                      step.features / step.heads,
                      step.out_features / step.heads,
                      step.epsilon,
                      (step.flag & 1) != 0,
                      (step.flag & 2) != 0,
                      static_cast<const float*>(step.tensor),
                      {}};
  std::memcpy(attention.mask_strides, step.mask_strides, sizeof(step.mask_strides));
  return attention;
}

void attend(const Attention& attention, int64_t sequence, int64_t head) {
  static thread_local Scratch scratch;
  kernels->attend(attention, sequence, head, scratch.floats(scratch_floats(attention)));
}

// All steps for one sequence before the next: what a step reads is still in cache. For sequences of
// whole tiles, even the widest: shorter ones share what is read of weights with others.
void run_sequences(const Geometry& geometry, const Step* steps, int count, int64_t scratch,
                   int threads) {
  int64_t tiles = geometry.padded() / geometry.tile, together = kTogether / geometry.tile;
  parallel(geometry.sequences, threads, [&](int64_t sequence) {
    static thread_local Scratch memory;
    float* own = memory.floats(scratch * together);
    for (int i = 0; i < count; ++i) {
      int end = i;
      while (end < count && steps[end].kind != kAttend) ++end;
      int64_t last = (sequence + 1) * tiles;
      for (int64_t tile = sequence * tiles; tile < last; tile += together) {
        Range some{tile, std::min(tile + together, last)};
        run_all(*kernels, geometry, steps + i, end - i, {some, own, scratch});
      }
      i = end;
      if (end == count) return;
      Attention attention = attention_of(geometry, steps[end]);
      for (int64_t head = 0; head < attention.heads; ++head) attend(attention, sequence, head);
    }
  });
}

// All steps between two attentions for all tokens, then the attention.
void run_parts(const Geometry& geometry, const Step* steps, int count, int64_t scratch, int threads) {
  for (int i = 0; i < count; ++i) {
    int end = i;
    while (end < count && steps[end].kind != kAttend) ++end;
    run_tiles(geometry, steps + i, end - i, scratch, threads);
    i = end;
    if (end == count) return;
    Attention attention = attention_of(geometry, steps[end]);
    parallel(geometry.sequences * attention.heads, threads, [&](int64_t head) {
      attend(attention, head / attention.heads, head % attention.heads);
    });
  }
}

}  // namespace

// Runs steps for all tokens. Slices whose stride is 0 lie in memory of the tile's own, which lasts
// from one attention to the next, and take `scratch` floats in all. Returns nullptr; or, having done
// nothing, what is wrong: memory is too short, or tiles and weights are not those of the instruction
// set in use.
EXPORT const char* mvpfx_run(const Geometry* geometry, const Step* steps, int count, int64_t scratch,
                             int threads) {
  if (geometry->tile != kernels->tile) return "tiles are of another instruction set";
  if (const char* wrong = find_shortage(*geometry, steps, count, scratch)) return wrong;
  scratch = (scratch + kChunk - 1) / kChunk * kChunk;
  if (geometry->padded() % kWidest == 0 && geometry->sequences >= threads)
    run_sequences(*geometry, steps, count, scratch, threads);
  else
    run_parts(*geometry, steps, count, scratch, threads);
  return nullptr;
}
