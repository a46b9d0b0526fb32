// The library's C interface. All sizes and strides are in elements; pointers are those of tensors.
#include <cstring>
#include <vector>

#include "chain.h"
#include "export.h"
#include "packed.h"
#include "parallel.h"
#include "table.h"

namespace {

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? &kAvx512Bf16 : &kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
#endif
  return &kPlain;
}

const Kernels* kernels = best();

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

// A tile, and the memory of its own: `scratch` floats.
struct Span {
  int64_t tile;
  float* own;
  int64_t scratch;

  Slice place(Slice slice) const {
    if (slice.stride == 0) return {own - tile * scratch, scratch, slice.first};
    return slice;
  }
  Slice place_if_any(Slice slice) const {
    return slice.stride < 0 ? Slice{nullptr, 0, 0} : place(slice);
  }
};

constexpr int64_t kAllPanels = INT64_MAX;

// Enter or leave, for one tile.
void cross_edge(const Kernels& table, const Geometry& geometry, const Step& step, int64_t tile,
                const Slice& input, const Slice& output) {
  int64_t chunk = tile * (kTile / kChunk), end = chunk + geometry.width(tile) / kChunk;
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

// One step for one tile; of a product the panels [first, last).
void run_step(const Kernels& table, const Geometry& geometry, const Step& step, const Span& span,
              int64_t first, int64_t last) {
  Slice input = span.place(step.input), output = span.place(step.output);
  Epilogue epilogue{step.epilogue.bias, step.epilogue.activation,
                    span.place_if_any(step.epilogue.factor),
                    span.place_if_any(step.epilogue.addend)};
  if (step.kind == kMultiply) {
    const Packed& packed = *step.packed;
    int width = geometry.width(span.tile);
    const float* x = input.at(span.tile, 0, width);
    if (packed.halves) {
      static thread_local Scratch room;
      float* pairs = room.floats(packed.columns * width);
      table.pair_features(step.features, width, x, pairs);
      x = pairs;
    }
    last = last < packed.panels() ? last : packed.panels();
    table.multiply(packed, first, last, geometry, span.tile, x, output, epilogue);
  } else if (step.kind == kNormalize) {
    table.normalize(geometry, span.tile, input, output, step.features, step.weight, step.bias,
                    step.epsilon, step.flag != 0);
  } else if (step.kind == kCombine) {
    table.combine(geometry, span.tile, input, output, step.features, epilogue);
  } else if (step.kind == kRotate) {
    table.rotate(geometry, span.tile, input, output, step.heads, step.features / step.heads,
                 epilogue.factor, epilogue.addend);
  } else {
    cross_edge(table, geometry, step, span.tile, input, output);
  }
}

}  // namespace

// The number of this interface: one more whenever a function or a struct changes.
EXPORT int mvpfx_interface() { return 2; }

// The name of the instruction set in use.
EXPORT const char* mvpfx_isa() { return kernels->name; }

// Use another instruction set that this processor has; returns whether it does.
EXPORT int mvpfx_use_isa(const char* name) {
  std::vector<const Kernels*> known{&kPlain};
#if defined(__x86_64__)
  if (best() != &kPlain) known.push_back(&kAvx2);
  if (best() == &kAvx512 || best() == &kAvx512Bf16) known.push_back(&kAvx512);
  if (best() == &kAvx512Bf16) known.push_back(&kAvx512Bf16);
#endif
  for (const Kernels* one : known)
    if (std::strcmp(one->name, name) == 0) {
      kernels = one;
      return 1;
    }
  return 0;
}

// Whether weights and activations in bfloat16 are worth being multiplied as such.
EXPORT int mvpfx_halves() { return kernels->halves; }

EXPORT Packed* mvpfx_pack(int64_t rows, int64_t columns, int64_t block, int halves,
                          const int32_t* row_starts, const int32_t* column_indices,
                          const float* values) {
  return pack(rows, columns, block, halves != 0, kernels->strip, row_starts, column_indices,
              values);
}

EXPORT void mvpfx_free(Packed* packed) { delete packed; }

namespace {

// Steps that are done tile by tile.
void run_tiles(const Geometry& geometry, const Step* steps, int count, int64_t scratch,
               int threads) {
  const Kernels* table = kernels;
  int64_t tiles = geometry.tiles();
  if (tiles >= threads) {
    parallel(tiles, threads, [&](int64_t tile) {
      static thread_local Scratch own;
      Span span{tile, own.floats(scratch), scratch};
      for (int i = 0; i < count; ++i) run_step(*table, geometry, steps[i], span, 0, kAllPanels);
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
      Span span{tile, own + tile * scratch, scratch};
      run_step(*table, geometry, steps[i], span, panel, panel + 1);
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
// whole tiles.
void run_sequences(const Geometry& geometry, const Step* steps, int count, int64_t scratch,
                   int threads) {
  int64_t tiles = geometry.padded() / kTile;
  parallel(geometry.sequences, threads, [&](int64_t sequence) {
    static thread_local Scratch memory;
    float* own = memory.floats(scratch);
    for (int i = 0; i < count; ++i) {
      int end = i;
      while (end < count && steps[end].kind != kAttend) ++end;
      for (int64_t tile = sequence * tiles; tile < (sequence + 1) * tiles; ++tile)
        for (int j = i; j < end; ++j)
          run_step(*kernels, geometry, steps[j], {tile, own, scratch}, 0, kAllPanels);
      i = end;
      if (end == count) return;
      Attention attention = attention_of(geometry, steps[end]);
      for (int64_t head = 0; head < attention.heads; ++head) attend(attention, sequence, head);
    }
  });
}

}  // namespace

// Runs steps for all tokens. Slices whose stride is 0 lie in memory of the tile's own, which lasts
// from one attention to the next, and take `scratch` floats in all.
EXPORT void mvpfx_run(const Geometry* geometry, const Step* steps, int count, int64_t scratch,
                      int threads) {
  scratch = (scratch + kChunk - 1) / kChunk * kChunk;
  if (geometry->padded() % kTile == 0 && geometry->sequences >= threads)
    return run_sequences(*geometry, steps, count, scratch, threads);
  for (int i = 0; i < count; ++i) {
    int end = i;
    while (end < count && steps[end].kind != kAttend) ++end;
    run_tiles(*geometry, steps + i, end - i, scratch, threads);
    i = end;
    if (end == count) return;
    Attention attention = attention_of(*geometry, steps[end]);
    parallel(geometry->sequences * attention.heads, threads, [&](int64_t head) {
      attend(attention, head / attention.heads, head % attention.heads);
    });
  }
}
