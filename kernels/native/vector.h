// Vectors of one instruction set, as compiler vector extensions; the few operations these lack come from intrinsics.
//
// Included once by each isa_*.cpp, inside that file's own namespace and compiled with that file's flags. No inline
// function of the standard library may be used here: the linker would keep one copy for all instruction sets.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VFloat __attribute__((vector_size(kVectorBytes)));
typedef double VDouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t VInt32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VInt64 __attribute__((vector_size(kVectorBytes)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef VFloat type;
  typedef VInt32 mask;
  typedef int32_t integer;
};
template <>
struct VectorOf<double> {
  typedef VDouble type;
  typedef VInt64 mask;
  typedef int64_t integer;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Mask = typename VectorOf<T>::mask;
template <class T>
using Integer = typename VectorOf<T>::integer;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <class T>
ALWAYS_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ALWAYS_INLINE Mask<T> load_integers(const Integer<T>* p) {
  Mask<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ALWAYS_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
ALWAYS_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// 0, 1, 2, ... of a vector of integers as wide as T
template <class T>
ALWAYS_INLINE Mask<T> iota() {
  Mask<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

template <class T>
ALWAYS_INLINE double sum_lanes(Vector<T> v) {
  double s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += double(v[i]);
  return s;
}

#if defined(__AVX512BF16__)
typedef uint16_t VHalf __attribute__((vector_size(kVectorBytes / 2)));
// To bfloat16, to nearest even.
ALWAYS_INLINE VHalf narrow(VFloat x) { return (VHalf)_mm512_cvtneps_pbh((__m512)x); }
ALWAYS_INLINE VHalf load_half(const uint16_t* p) {
  VHalf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
ALWAYS_INLINE void store_half(uint16_t* p, VHalf v) { __builtin_memcpy(p, &v, sizeof v); }
#endif

// x, after its rounding: keeps the compiler from fusing the product that made x with what follows.
template <class V>
ALWAYS_INLINE V rounded(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// 1 / sqrt(x) for x > 0, to about one rounding; anything finite or not elsewhere, but NaN for NaN.
ALWAYS_INLINE VFloat inverse_sqrt(VFloat x) {
#if defined(__AVX512F__)
  VFloat y = (VFloat)_mm512_rsqrt14_ps((__m512)x);
  VFloat residual = 1.0f - x * y * y;  // one Newton step takes 14 bits to full precision
  return y + y * 0.5f * residual;
#elif defined(__AVX2__)
  return 1.0f / (VFloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__aarch64__)
  return 1.0f / (VFloat)vsqrtq_f32((float32x4_t)x);
#else
  VFloat y;
  for (int i = 0; i < kLanes<float>; ++i) y[i] = 1.0f / __builtin_sqrtf(x[i]);
  return y;
#endif
}
ALWAYS_INLINE VDouble inverse_sqrt(VDouble x) {
#if defined(__AVX512F__)
  return 1.0 / (VDouble)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return 1.0 / (VDouble)_mm256_sqrt_pd((__m256d)x);
#elif defined(__aarch64__)
  return 1.0 / (VDouble)vsqrtq_f64((float64x2_t)x);
#else
  VDouble y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = 1.0 / __builtin_sqrt(x[i]);
  return y;
#endif
}

// exp(x) for x <= 0 to about one rounding: x = n ln 2 + r, a Taylor polynomial in |r| <= ln 2 / 2, times 2^n.
// Below the smallest normal number it stays there instead of going on to 0.
ALWAYS_INLINE VFloat exp_nonpositive(VFloat x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
  x = x < -87.0f ? splat(-87.0f) : x;
  VFloat t = x * 1.442695040888963f + shift;
  VFloat n = t - shift;
  VFloat r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 9 bits
  VFloat p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  VInt32 bits = ((VInt32)t - 0x4B400000 + 127) << 23;
  return p * (VFloat)bits;
}
ALWAYS_INLINE VDouble exp_nonpositive(VDouble x) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -708.0 ? splat(-708.0) : x;
  VDouble t = x * 1.4426950408889634 + shift;
  VDouble n = t - shift;
  VDouble r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  VDouble p = splat(1.0 / 6227020800.0);
  const double inverse_factorial[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                      0.5};
#pragma GCC unroll 11
  for (int i = 0; i < 11; ++i) p = p * r + inverse_factorial[i];
  p = p * r * r + r + 1.0;
  VInt64 bits = ((VInt64)t - 0x4338000000000000 + 1023) << 52;
  return p * (VDouble)bits;
}

// bfloat16 is the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};
ALWAYS_INLINE float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
ALWAYS_INLINE float widen(float x) { return x; }
ALWAYS_INLINE double widen(double x) { return x; }

}  // namespace ISA
