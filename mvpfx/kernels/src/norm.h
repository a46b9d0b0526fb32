// Norms over the features of tiled activations, and what goes feature by feature.
#pragma once

#include "vector.h"

namespace KERNEL_ISA {

// (x - mean) / sqrt(variance + epsilon) * weight + bias, or x / sqrt(mean of squares + epsilon)
// * weight where `centred` is false. Weight and bias [features] may be nullptr.
template <int kVectors>
void normalize_strip(const float* x, float* y, int width, int64_t features, const float* weight,
                     const float* bias, float epsilon, bool centred) {
  const float share = 1.0f / static_cast<float>(features);
  Vector mean[kVectors] = {}, scale[kVectors] = {};
  if (centred) {
    for (int64_t f = 0; f < features; ++f)
      for (int t = 0; t < kVectors; ++t) mean[t] += load(x + f * width + t * kLanes);
    for (int t = 0; t < kVectors; ++t) mean[t] *= share;
  }
  for (int64_t f = 0; f < features; ++f)
    for (int t = 0; t < kVectors; ++t) {
      Vector difference = load(x + f * width + t * kLanes) - mean[t];
      scale[t] += difference * difference;
    }
  for (int t = 0; t < kVectors; ++t)
    for (int i = 0; i < kLanes; ++i)
      scale[t][i] = 1.0f / __builtin_sqrtf(scale[t][i] * share + epsilon);
  for (int64_t f = 0; f < features; ++f) {
    Vector factor = broadcast(weight ? weight[f] : 1.0f);
    Vector addend = broadcast(bias ? bias[f] : 0.0f);
    for (int t = 0; t < kVectors; ++t) {
      Vector value = (load(x + f * width + t * kLanes) - mean[t]) * scale[t];
      store(y + f * width + t * kLanes, value * factor + addend);
    }
  }
}

// Of each head its `features`, all with the same weight and bias.
void normalize(const Geometry& geometry, int64_t tile, const Slice& input, const Slice& output,
               int64_t heads, int64_t features, const float* weight, const float* bias,
               float epsilon, bool centred) {
  const int width = geometry.width(tile);
  for (int64_t head = 0; head < heads; ++head) {
    const float* x = input.at(tile, head * features, width);
    float* y = output.at(tile, head * features, width);
    int lane = 0;
    for (; lane + kWide * kLanes <= width; lane += kWide * kLanes)
      normalize_strip<kWide>(x + lane, y + lane, width, features, weight, bias, epsilon, centred);
    for (; lane < width; lane += kLanes)
      normalize_strip<1>(x + lane, y + lane, width, features, weight, bias, epsilon, centred);
  }
}

// activation(x) * factor + addend, where each may be missing.
void combine(const Geometry& geometry, int64_t tile, const Slice& input, const Slice& output,
             int64_t features, const Epilogue& epilogue) {
  int width = geometry.width(tile);
  for (int64_t f = 0; f < features; ++f) {
    const float* x = input.at(tile, f, width);
    float* y = output.at(tile, f, width);
    constexpr int kVectors = kChunk / kLanes;
    for (int lane = 0; lane < width; lane += kChunk) {
      Vector values[kVectors];
      for (int t = 0; t < kVectors; ++t) values[t] = load(x + lane + t * kLanes);
      activate<kVectors>(values, epilogue.activation);
      for (int t = 0; t < kVectors; ++t) {
        int at = lane + t * kLanes;
        if (epilogue.factor.data) values[t] *= load(epilogue.factor.at(tile, f, width) + at);
        if (epilogue.addend.data) values[t] += load(epilogue.addend.at(tile, f, width) + at);
        store(y + at, values[t]);
      }
    }
  }
}

// Of each head `width` features: x * cosines + (-second half, first half) * sines. The tables have the
// features of one head.
void rotate(const Geometry& geometry, int64_t tile, const Slice& input, const Slice& output,
            int64_t heads, int64_t width, const Slice& cosines, const Slice& sines) {
  int tokens = geometry.width(tile);
  int64_t half = width / 2, step = half * tokens;
  for (int64_t f = 0; f < half; ++f) {
    const float* cosine = cosines.at(tile, f, tokens);
    const float* sine = sines.at(tile, f, tokens);
    for (int64_t head = 0; head < heads; ++head) {
      const float* x = input.at(tile, head * width + f, tokens);
      float* y = output.at(tile, head * width + f, tokens);
      for (int lane = 0; lane < tokens; lane += kLanes) {
        Vector first = load(x + lane), second = load(x + step + lane);
        store(y + lane, first * load(cosine + lane) - second * load(sine + lane));
        store(y + step + lane,
              second * load(cosine + step + lane) + first * load(sine + step + lane));
      }
    }
  }
}

}  // namespace KERNEL_ISA
