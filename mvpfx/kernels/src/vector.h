// Vectors of floats as the compiler's extensions have them, at the width of the instruction set that
// the including file is compiled for. Everything here is in a namespace of that set.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tiles.h"

namespace KERNEL_ISA {

constexpr int kLanes = KERNEL_VECTOR_BYTES / 4;
// Vectors of tokens that are summed at once, and rows of a dense product that share them.
constexpr int kWide = KERNEL_WIDE;
constexpr int kTile = kWide * kLanes;  // tokens of a tile: as many as are summed at once
constexpr int kRows = KERNEL_ROWS;
// Whether an instruction multiplies pairs of bfloat16.
#if defined(KERNEL_AVX512_BF16)
constexpr bool kHasHalves = true;
#else
constexpr bool kHasHalves = false;
#endif

typedef float Vector __attribute__((vector_size(KERNEL_VECTOR_BYTES), aligned(KERNEL_VECTOR_BYTES)));
typedef float Unaligned __attribute__((vector_size(KERNEL_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(KERNEL_VECTOR_BYTES), aligned(KERNEL_VECTOR_BYTES)));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
// Not `0 + x`: the compiler has to keep that addition, for the sake of -0.
inline Vector broadcast(float x) { return x - Vector{}; }
// Four values that are read at once, each of which becomes a vector of its own. Faster where it was
// measured: on AMD's processors, and on Intel's with a matrix unit.
#if defined(KERNEL_AVX512_BF16) || defined(KERNEL_AVX2)
constexpr bool kSpreadsFours = true;
struct Fours {
  Vector values;
#if defined(KERNEL_AVX512_BF16)
  explicit Fours(const float* four) : values(_mm512_maskz_broadcast_f32x4(-1, _mm_loadu_ps(four))) {}
  template <int kWhich>
  Vector permuted() const { return _mm512_maskz_permute_ps(-1, values, kWhich); }
#else
  explicit Fours(const float* four)
      : values(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four))) {}
  template <int kWhich>
  Vector permuted() const { return _mm256_permute_ps(values, kWhich); }
#endif
  Vector spread(int i) const {
    switch (i) {
      case 0: return permuted<0x00>();
      case 1: return permuted<0x55>();
      case 2: return permuted<0xaa>();
      default: return permuted<0xff>();
    }
  }
};
#else
constexpr bool kSpreadsFours = false;
struct Fours {
  explicit Fours(const float*) {}
  Vector spread(int) const { return Vector{}; }
};
#endif
// Keeps x in a register. Compilers read it again for each row that it meets where an instruction can
// do so, and there loads are what a product waits for.
inline void keep(Vector& x) {
#if defined(KERNEL_AVX2)
  asm("" : "+x"(x));
#else
  static_cast<void>(x);
#endif
}

// A NaN in x stays: these instructions return their second operand where one is none.
#if defined(KERNEL_AVX512)
inline Vector at_least(Vector x, Vector least) { return _mm512_maskz_max_ps(-1, least, x); }
inline Vector at_most(Vector x, Vector most) { return _mm512_maskz_min_ps(-1, most, x); }
#elif defined(KERNEL_AVX2)
inline Vector at_least(Vector x, Vector least) { return _mm256_max_ps(least, x); }
inline Vector at_most(Vector x, Vector most) { return _mm256_min_ps(most, x); }
#else
inline Vector at_least(Vector x, Vector least) { return x < least ? least : x; }
inline Vector at_most(Vector x, Vector most) { return x > most ? most : x; }
#endif

// sums + low * low + high * high, where w and x have two bfloat16 in the place of each float.
inline Vector add_halves(Vector sums, Vector w, Vector x) {
#if defined(KERNEL_AVX512_BF16)
  return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
#else
  const Ints upper = Ints{} - 65536;
  sums += (Vector)((Ints)w << 16) * (Vector)((Ints)x << 16);
  return sums + (Vector)((Ints)w & upper) * (Vector)((Ints)x & upper);
#endif
}

// The upper halves of floats, rounded to the nearest, ties to even, as torch rounds to bfloat16.
inline Ints rounded_halves(Vector x) {
  const Ints bits = (Ints)x;
  const Ints none = x != x;
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~none) | ((Ints{} + 0x7fc00000) & none);
}

// Two bfloat16 in the place of each float.
inline Vector join_halves(Vector low, Vector high) {
#if defined(KERNEL_AVX512_BF16)
  static const Ints order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005,
                             0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b,
                             0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  const __m512i side_by_side = _mm512_maskz_permutexvar_epi16(-1, 
      (__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  return (Vector)side_by_side;
#else
  const Ints upper = Ints{} - 65536;
  return (Vector)(((rounded_halves(low) >> 16) & ~upper) | (rounded_halves(high) & upper));
#endif
}

#if defined(KERNEL_AVX512_BF16)
// The values of two vectors as bfloat16, one after the other.
inline Vector cut_halves(Vector first, Vector second) {
  return (Vector)_mm512_cvtne2ps_pbh(second, first);
}
#endif

// The functions below take several vectors at a time, step by step: each step of one vector waits
// for the step before, and the other vectors fill the time.
template <int kCount>
using Vectors = Vector[kCount];

#define KERNEL_EACH(t) _Pragma("GCC unroll 8") for (int t = 0; t < kCount; ++t)

template <int kCount>
inline void reciprocals(Vectors<kCount>& x) {
#ifdef KERNEL_AVX512
  // One step of Newton takes the 14 bits of the instruction to 23 or more.
  Vector guess[kCount];
  KERNEL_EACH(t) guess[t] = _mm512_maskz_rcp14_ps(-1, x[t]);
  KERNEL_EACH(t) x[t] = broadcast(2.0f) - x[t] * guess[t];
  KERNEL_EACH(t) x[t] *= guess[t];
#else
  KERNEL_EACH(t) x[t] = 1.0f / x[t];
#endif
}

// sums = sums * x + c, for the next coefficient of a polynomial.
template <int kCount>
inline void horner(Vectors<kCount>& sums, const Vectors<kCount>& x, float c) {
  KERNEL_EACH(t) sums[t] = sums[t] * x[t] + c;
}

// exp with a relative error of 2e-7; 0 below -87.3, and for -infinity; that of 88, which is finite,
// above.
template <int kCount>
inline void exponentials(Vectors<kCount>& x) {
  Ints under[kCount];
  Vector shifted[kCount], r[kCount], p[kCount];
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
  const Vector magic = broadcast(12582912.0f);
  KERNEL_EACH(t) under[t] = x[t] < broadcast(-87.3f);
  KERNEL_EACH(t) x[t] = at_most(at_least(x[t], broadcast(-87.3f)), broadcast(88.0f));
  KERNEL_EACH(t) shifted[t] = x[t] * 1.44269504088896341f + magic;
  KERNEL_EACH(t) r[t] = x[t] - (shifted[t] - magic) * 0.693359375f;
  KERNEL_EACH(t) r[t] = r[t] - (shifted[t] - magic) * -2.12194440e-4f;
  KERNEL_EACH(t) p[t] = broadcast(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f, 1.0f, 1.0f})
    horner<kCount>(p, r, c);
  KERNEL_EACH(t) {
    Ints power = ((Ints)shifted[t] - (Ints)magic + 127) << 23;
    x[t] = (Vector)((Ints)(p[t] * (Vector)power) & ~under[t]);
  }
}

// x times the normal distribution's integral up to x, within 2e-7 of max(1, |x|). What the integral is
// above one half is a ratio of polynomials, fitted on [-5.66, 5.66] and constant outside.
template <int kCount>
inline void gelus(Vectors<kCount>& x) {
  Vector y[kCount], s[kCount], p[kCount], q[kCount];
  KERNEL_EACH(t) y[t] = at_most(at_least(x[t], broadcast(-5.66f)), broadcast(5.66f));
  KERNEL_EACH(t) s[t] = y[t] * y[t];
  KERNEL_EACH(t) q[t] = broadcast(6.8762476793e-05f);
  for (float c : {1.9462825579e-03f, 3.0223249392e-02f, 2.6156558281e-01f, 1.0f})
    horner<kCount>(q, s, c);
  reciprocals<kCount>(q);
  KERNEL_EACH(t) p[t] = broadcast(1.0606338433e-10f);
  for (float c : {-2.1990677277e-08f, 3.4412320698e-06f, 1.9013851787e-04f, 4.6371609168e-03f,
                  3.7860329212e-02f, 3.9894210611e-01f})
    horner<kCount>(p, s, c);
  // A touch too large, then cut off: far from zero the result is x or zero exactly.
  KERNEL_EACH(t) p[t] *= y[t] * 1.0000002f;
  KERNEL_EACH(t) p[t] *= q[t];
  KERNEL_EACH(t) p[t] = at_most(at_least(p[t], broadcast(-0.5f)), broadcast(0.5f));
  KERNEL_EACH(t) x[t] *= p[t] + 0.5f;
}

template <int kCount>
inline void sigmoids(Vectors<kCount>& x) {
  KERNEL_EACH(t) x[t] = -x[t];
  exponentials<kCount>(x);
  KERNEL_EACH(t) x[t] += 1.0f;
  reciprocals<kCount>(x);
}

template <int kCount>
inline void activate(Vectors<kCount>& x, int activation) {
  Vector y[kCount];
  switch (activation) {
    case kGelu:
      return gelus<kCount>(x);
    case kRelu:
      KERNEL_EACH(t) x[t] = at_least(x[t], Vector{});
      return;
    case kGeluTanh:
      // 0.5 (1 + tanh u) is sigmoid(2 u).
      KERNEL_EACH(t) y[t] = 1.5957691216057308f * (x[t] + 0.044715f * x[t] * x[t] * x[t]);
      break;
    case kGeluQuick:
      KERNEL_EACH(t) y[t] = 1.702f * x[t];
      break;
    case kSilu:
      KERNEL_EACH(t) y[t] = x[t];
      break;
    case kTanh:
      KERNEL_EACH(t) x[t] *= 2.0f;
      sigmoids<kCount>(x);
      KERNEL_EACH(t) x[t] = 2.0f * x[t] - 1.0f;
      return;
    case kSigmoid:
      return sigmoids<kCount>(x);
    default:
      return;
  }
  sigmoids<kCount>(y);
  KERNEL_EACH(t) x[t] *= y[t];
}

}  // namespace KERNEL_ISA
