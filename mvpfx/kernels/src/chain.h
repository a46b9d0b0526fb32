// Steps that are done tile by tile, for they need nothing but their own token, and attentions
// between them.
#pragma once

#include "packed.h"
#include "tiles.h"

enum Kind { kEnter = 0, kLeave, kMultiply, kNormalize, kCombine, kAttend, kRotate };

// One step. Which members count depends on its kind.
struct Step {
  int32_t kind;
  int32_t flag;  // enter, leave: the tensor is bfloat16; normalize: the mean is taken away; attend:
                 // 1 for a token sees itself and those before it, 2 for activations are bfloat16
  const Packed* packed;
  Slice input, output;
  int64_t features;      // of what is read; of attend those of all queries
  int64_t out_features;  // of attend, of all heads together
  Epilogue epilogue;  // of multiply and combine; of attend the factor is the key, the addend the value;
                      // of rotate they are cosines and sines
  const float* weight;  // of normalize, or nullptr
  const float* bias;    // likewise
  float epsilon;        // of normalize; of attend the scale
  void* tensor;         // of enter and leave; of attend the mask, or nullptr
  int64_t sequence_stride, token_stride;
  int64_t heads, groups;  // of attend; rotate and normalize have heads alone
  int64_t mask_strides[4];
  // How many numbers there are: of the norm's weight, of its bias or the epilogue's, and of the tensor
  // or the mask up to its last one in memory.
  int64_t weight_count, bias_count, tensor_count;
};
