// What every instruction set has, as pointers: the processor's best is chosen when the library loads.
#pragma once

#include "attention_call.h"
#include "packed.h"
#include "tiles.h"

struct Kernels {
  const char* name;
  bool halves;  // whether products of bfloat16 are faster than those of floats
  bool matrix;  // whether there is a matrix unit for them
  int tile;     // tokens of a tile
  void (*multiply)(const Packed&, Range panels, const Geometry&, Range tiles, const Slice& input,
                   const Slice& output, const Epilogue&);
  void (*pair_features)(int64_t features, int width, const float* input, float* pairs);
  void (*normalize)(const Geometry&, int64_t tile, const Slice& input, const Slice& output,
                    int64_t heads, int64_t features, const float* weight, const float* bias,
                    float epsilon, bool centred);
  void (*combine)(const Geometry&, int64_t tile, const Slice& input, const Slice& output,
                  int64_t features, const Epilogue&);
  void (*rotate)(const Geometry&, int64_t tile, const Slice& input, const Slice& output,
                 int64_t heads, int64_t width, const Slice& cosines, const Slice& sines);
  void (*attend)(const Attention&, int64_t sequence, int64_t head, float* scratch);
  void (*enter_float)(const Geometry&, int64_t chunk, const float*, int64_t, int64_t, int64_t,
                      const Slice&);
  void (*enter_bf16)(const Geometry&, int64_t chunk, const uint16_t*, int64_t, int64_t, int64_t,
                     const Slice&);
  void (*leave_float)(const Geometry&, int64_t chunk, const Slice&, int64_t, float*, int64_t,
                      int64_t);
  void (*leave_bf16)(const Geometry&, int64_t chunk, const Slice&, int64_t, uint16_t*, int64_t,
                     int64_t);
};

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define HAS_AMX_KERNELS
extern const Kernels kAmx;
#endif
#endif
