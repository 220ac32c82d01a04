// One step of AdamW over flat memory, everything that changes with it in one pass. kernels/adamw.py is the definition.
//
// Blocks of all buffers stay in the first cache while the step, the averages and the rounded weights are made of them,
// so that each byte comes from memory once. Sums are fused with the product before them exactly where torch's own
// kernels do it on a processor that can; `rounded` keeps the compiler from doing so elsewhere.
#pragma once

#include <omp.h>

#include "structure.h"
#include "vector.h"

namespace ISA {

ALWAYS_INLINE VFloat square_root(VFloat x) {
#if defined(__AVX512F__)
  return (VFloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (VFloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (VFloat)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (VFloat)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
ALWAYS_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

// Vectors of memory as floats, and back to nearest even; V is VFloat or, for what is left of a block, float.
typedef uint32_t VBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VHalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <class V, class Bits, class Half>
struct As {
  static ALWAYS_INLINE V read(const float* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static ALWAYS_INLINE void write(float* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
  static ALWAYS_INLINE V read(const BFloat16* p) {
    Half half;
    __builtin_memcpy(&half, p, sizeof half);
    const Bits bits = convert<Bits>(half) << 16;
    V x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
  static ALWAYS_INLINE void write(BFloat16* p, V x) {
    Bits bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const Bits nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Half half = convert<Half>((bits & 0x7FFFFFFF) > 0x7F800000 ? (nearest & 0) + 0x7FC0 : nearest);
    __builtin_memcpy(p, &half, sizeof half);
  }

 private:
  template <class To>
  static ALWAYS_INLINE To convert(VBits x) { return __builtin_convertvector(x, To); }
  template <class To>
  static ALWAYS_INLINE To convert(VHalfBits x) { return __builtin_convertvector(x, To); }
  template <class To>
  static ALWAYS_INLINE To convert(uint32_t x) { return To(x); }
  template <class To>
  static ALWAYS_INLINE To convert(uint16_t x) { return To(x); }
};
typedef As<VFloat, VBits, VHalfBits> Wide;
typedef As<float, uint32_t, uint16_t> Narrow;

template <class V>
ALWAYS_INLINE V lerp(V start, V end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end + (weight - 1.0f) * (end - start);
}

template <class V, class M, class Grad>
ALWAYS_INLINE void step_at(const AdamWStep& s, float factor, const Grad* grad, int64_t i) {
  const V g = rounded(M::read(grad + i) * factor);
  const V first = lerp(M::read(s.first + i), g, s.rest1);
  const V second = rounded(M::read(s.second + i) * s.beta2) + s.rest2 * g * g;
  const V denominator = square_root(second) / s.root_of_correction + s.eps;
  const V master = rounded(M::read(s.master + i) * s.kept) - s.step_size * first / denominator;
  M::write(s.first + i, first);
  M::write(s.second + i, second);
  M::write(s.master + i, master);
}

template <class V, class M>
ALWAYS_INLINE void average_at(const float* master, float* average, float weight, int64_t i) {
  M::write(average + i, lerp<V>(M::read(average + i), M::read(master + i), weight));
}

template <class Grad>
inline void step_of_block(const AdamWStep& s, float factor, int64_t i, int64_t end) {
  const Grad* grad = static_cast<const Grad*>(s.gradient);
  for (; i + kLanes<float> <= end; i += kLanes<float>) step_at<VFloat, Wide>(s, factor, grad, i);
  for (; i < end; ++i) step_at<float, Narrow>(s, factor, grad, i);
}

inline void average_of_block(const AdamWStep& s, int k, int64_t i, int64_t end) {
  for (; i + kLanes<float> <= end; i += kLanes<float>)
    average_at<VFloat, Wide>(s.master, s.average[k], s.share[k], i);
  for (; i < end; ++i) average_at<float, Narrow>(s.master, s.average[k], s.share[k], i);
}

template <class Weight>
inline void weight_of_block(const AdamWStep& s, int64_t i, int64_t end) {
  Weight* weight = static_cast<Weight*>(s.weight);
  for (; i + kLanes<float> <= end; i += kLanes<float>) Wide::write(weight + i, Wide::read(s.master + i));
  for (; i < end; ++i) Narrow::write(weight + i, Narrow::read(s.master + i));
}

inline void adamw_step(const AdamWStep& s) {
  constexpr int64_t kBlock = 1024, kAlone = 32;  // elements; blocks that are not worth a second thread
  const float norm = *s.norm;
  if (!(norm - norm == 0.0f)) return;
  const float clipped = 1.0f / (norm + 1e-6f) * s.max_norm;
  const float factor = s.max_norm > 0.0f && clipped < 1.0f ? clipped : 1.0f;
  const int64_t blocks = (s.count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(s.threads) if (blocks > kAlone) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * kBlock, end = start + kBlock < s.count ? start + kBlock : s.count;
    if (s.gradient_dtype == kBFloat16) step_of_block<BFloat16>(s, factor, start, end);
    else step_of_block<float>(s, factor, start, end);
    for (int k = 0; k < s.averages; ++k) average_of_block(s, k, start, end);
    if (s.weight && s.weight_dtype == kBFloat16) weight_of_block<BFloat16>(s, start, end);
    else if (s.weight) weight_of_block<float>(s, start, end);
  }
}

}  // namespace ISA
