// Masks, their gradients, and counting for the exact top-v selection: one pass over memory each.
//
// Plain loops that the compiler vectorises, cloned for each instruction set where it can do so.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "../../kernels/src/export.h"
#include "../../kernels/src/parallel.h"
#include "chunks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONED
#endif

namespace {

// Asks for large pages under gradients about to be written: their memory went back to the system
// after the last step, and a fault for each small page took as long as the pass that writes them.
// Values there stay what they are; where the system has no large pages, nothing happens.
void in_large_pages(float* values, int64_t count) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(values) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(values + count) & ~(kPage - 1);
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  static_cast<void>(values), static_cast<void>(count);
#endif
}

CLONED void multiply(const float* __restrict a, const uint8_t* __restrict mask,
                     float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] * static_cast<float>(mask[i]);
}

CLONED void multiply_both(const float* __restrict gradient, const float* __restrict weight,
                          const uint8_t* __restrict mask, float* __restrict masked,
                          float* __restrict movement, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    masked[i] = gradient[i] * static_cast<float>(mask[i]);
    movement[i] = gradient[i] * weight[i];
  }
}

// The same for one row, its movement added to `sums`.
CLONED void multiply_and_add(const float* __restrict gradient, const float* __restrict weight,
                             const uint8_t* __restrict mask, float* __restrict masked,
                             float* __restrict sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    masked[i] = gradient[i] * static_cast<float>(mask[i]);
    sums[i] += gradient[i] * weight[i];
  }
}

CLONED void take_movement(float* __restrict gradient, const float* __restrict weight,
                          const uint8_t* __restrict mask, float* __restrict scores, float rate,
                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    scores[i] -= rate * (gradient[i] * weight[i]);
    gradient[i] *= static_cast<float>(mask[i]);
  }
}

CLONED double sum(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  double total = 0;
  for (float lane : lanes) total += lane;
  for (; i < count; ++i) total += values[i];
  return total;
}

CLONED void at_least(const float* __restrict values, float cut, uint8_t* __restrict out,
                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = values[i] >= cut;
}

// What a thread finds in its chunk: values above the bracket, and those in it.
struct Found {
  int64_t above = 0;
  int64_t count = 0;
  float* inside;  // room for kChunk + 16 values
};

// Sorts values into those above `high`, between, and below `low`; false where one is NaN.
bool split_plain(const float* values, int64_t count, float low, float high, Found& found) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i];
    numbers += value == value;
    found.above += value > high;
    found.inside[found.count] = value;
    found.count += (value >= low) & (value <= high);
  }
  return numbers == count;
}

#if defined(HAVE_X86)
__attribute__((target("avx512f"))) bool split_avx512(const float* values, int64_t count, float low,
                                                     float high, Found& found) {
  const __m512 lower = _mm512_set1_ps(low), upper = _mm512_set1_ps(high);
  __mmask16 nan = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 value = _mm512_loadu_ps(values + i);
    const __mmask16 above = _mm512_cmp_ps_mask(value, upper, _CMP_GT_OQ);
    const __mmask16 between = _mm512_cmp_ps_mask(value, lower, _CMP_GE_OQ) & ~above;
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    found.above += __builtin_popcount(above);
    if (between) {
      _mm512_storeu_ps(found.inside + found.count, _mm512_maskz_compress_ps(between, value));
      found.count += __builtin_popcount(between);
    }
  }
  return split_plain(values + i, count - i, low, high, found) && !nan;
}

// Nothing moves the chosen lanes together here, but few of them are chosen.
__attribute__((target("avx2"))) bool split_avx2(const float* values, int64_t count, float low,
                                                float high, Found& found) {
  const __m256 lower = _mm256_set1_ps(low), upper = _mm256_set1_ps(high);
  __m256 nan = _mm256_setzero_ps();
  __m256i greater = _mm256_setzero_si256();  // a chunk's count fits into 32 bits
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(values + i);
    const __m256 above = _mm256_cmp_ps(value, upper, _CMP_GT_OQ);
    const __m256 least = _mm256_cmp_ps(value, lower, _CMP_GE_OQ);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    greater = _mm256_sub_epi32(greater, _mm256_castps_si256(above));
    unsigned between = _mm256_movemask_ps(_mm256_andnot_ps(above, least));
    for (; between; between &= between - 1)
      found.inside[found.count++] = values[i + __builtin_ctz(between)];
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), greater);
  for (int32_t lane : lanes) found.above += lane;
  const bool numbers = !_mm256_movemask_ps(nan);
  return split_plain(values + i, count - i, low, high, found) && numbers;
}
#endif

bool split(const float* values, int64_t count, float low, float high, Found& found) {
#if defined(HAVE_X86)
  static const bool widest = __builtin_cpu_supports("avx512f");
  static const bool wide = __builtin_cpu_supports("avx2");
  if (widest) return split_avx512(values, count, low, high, found);
  if (wide) return split_avx2(values, count, low, high, found);
#endif
  return split_plain(values, count, low, high, found);
}

}  // namespace

// The version of this interface.
EXPORT int mvpfx_training_version() { return 5; }

// out = a * mask.
EXPORT void mvpfx_mask(const float* a, const uint8_t* mask, float* out, int64_t count,
                       int threads) {
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    multiply(a + at, mask + at, out + at, length(chunk, count));
  });
}

// masked = gradient * mask and movement = gradient * weight.
EXPORT void mvpfx_mask_gradients(const float* gradient, const float* weight, const uint8_t* mask,
                                 float* masked, float* movement, int64_t count, int threads) {
  in_large_pages(masked, count);
  in_large_pages(movement, count);
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    multiply_both(gradient + at, weight + at, mask + at, masked + at, movement + at,
                  length(chunk, count));
  });
}

// scores -= rate * gradient * weight, then gradient *= mask.
EXPORT void mvpfx_take_movement(float* gradient, const float* weight, const uint8_t* mask,
                                float* scores, float rate, int64_t count, int threads) {
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    take_movement(gradient + at, weight + at, mask + at, scores + at, rate, length(chunk, count));
  });
}

// A weight of `units` x `height` rows and `across` x `width` columns, in blocks of height x width:
// masked = gradient * mask, and sums[unit, block] = the sum of gradient * weight over the block.
EXPORT void mvpfx_block_gradients(const float* gradient, const float* weight, const uint8_t* mask,
                                  float* masked, float* sums, int64_t units, int64_t height,
                                  int64_t across, int64_t width, int threads) {
  constexpr int64_t kRows = 64;  // added up in float, then in double
  const int64_t columns = across * width;
  in_large_pages(masked, units * height * columns);
  parallel(units, threads, [&](int64_t unit) {
    std::vector<float> movement(columns);
    std::vector<double> totals(across);
    for (int64_t start = 0; start < height; start += kRows) {
      std::fill(movement.begin(), movement.end(), 0.0f);
      for (int64_t row = start; row < std::min(start + kRows, height); ++row) {
        const int64_t at = (unit * height + row) * columns;
        multiply_and_add(gradient + at, weight + at, mask + at, masked + at, movement.data(),
                         columns);
      }
      for (int64_t block = 0; block < across; ++block)
        totals[block] += sum(movement.data() + block * width, width);
    }
    std::copy(totals.begin(), totals.end(), sums + unit * across);
  });
}

// out = values >= cut.
EXPORT void mvpfx_at_least(const float* values, float cut, uint8_t* out, int64_t count,
                           int threads) {
  parallel(chunks(count), threads, [&](int64_t chunk) {
    const int64_t at = chunk * kChunk;
    at_least(values + at, cut, out + at, length(chunk, count));
  });
}

// Marks the `count` greatest of few values, from 1 to `size`; among equal ones those of lower index.
// Returns 0 where a value is NaN, and 1 otherwise.
EXPORT int mvpfx_top(const float* values, int64_t size, int64_t count, uint8_t* out) {
  std::vector<float> ordered(values, values + size);
  int64_t numbers = 0;
  for (float value : ordered) numbers += value == value;
  if (numbers != size) return 0;
  const auto last = ordered.begin() + (count - 1);
  std::nth_element(ordered.begin(), last, ordered.end(), std::greater<float>());
  const float cut = *last;
  int64_t room = count;
  for (int64_t i = 0; i < size; ++i) room -= values[i] > cut;
  for (int64_t i = 0; i < size; ++i) {
    const bool first_tied = values[i] == cut && room > 0;
    room -= first_tied;
    out[i] = values[i] > cut || first_tied;
  }
  return 1;
}

// Counts the values above `high` into `above`; writes those from `low` to `high`, in any order, to
// `inside`, as far as its capacity goes. Returns how many these are, or -1 where a value is NaN.
EXPORT int64_t mvpfx_split(const float* values, int64_t count, float low, float high,
                           int64_t* above, float* inside, int64_t capacity, int threads) {
  std::atomic<int64_t> greater{0}, found{0};
  std::atomic<bool> valid{true};
  parallel(chunks(count), threads, [&](int64_t chunk) {
    thread_local float own[kChunk + 16];
    Found mine;
    mine.inside = own;
    if (!split(values + chunk * kChunk, length(chunk, count), low, high, mine)) {
      valid = false;
      return;
    }
    greater += mine.above;
    const int64_t place = found.fetch_add(mine.count);
    const int64_t room = std::min(mine.count, std::max<int64_t>(capacity - place, 0));
    if (room > 0) std::memcpy(inside + place, own, room * sizeof(float));
  });
  *above = greater;
  return valid ? found.load() : -1;
}
