// One pass over the optimizer's memory, and what decides about it: what a loop of tensor operations reads and writes
// once for each operation. Each value depends on its own element only, so nothing depends on the number of threads.
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "structure.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kBlock = 1 << 12;  // elements that one thread takes at once; all their arrays fit into its cache

inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even.
inline uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : static_cast<uint16_t>(rounded);
}

// a + share (b - a), from the nearer end, as torch.lerp does.
inline float between(float a, float b, float share) {
  return share < 0.5f ? a + share * (b - a) : b - (b - a) * (1.0f - share);
}

CLONES void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

CLONES void narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrowed(from[i]);
}

CLONES void step(float* master, const float* gradient, float* first, float* second, int64_t count,
                 const AdamWStep& task, float clip) {
  const float beta2 = task.beta2, rest1 = 1.0f - task.beta1, rest2 = 1.0f - task.beta2, kept = task.kept;
  const float size = task.step_size, eps = task.eps, root = task.root_of_correction;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i] * clip;
    const float m = between(first[i], g, rest1);
    const float v = second[i] * beta2 + rest2 * g * g;
    first[i] = m;
    second[i] = v;
    master[i] = master[i] * kept - size * m / (std::sqrt(v) / root + eps);
  }
}

CLONES void average(float* mean, const float* master, float share, int64_t count) {
  for (int64_t i = 0; i < count; ++i) mean[i] = between(mean[i], master[i], share);
}

CLONES double squares(const float* values, int64_t count) {
  double sums[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int k = 0; k < 16; ++k) sums[k] += static_cast<double>(values[i + k]) * values[i + k];
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  for (double part : sums) sum += part;
  return sum;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

EXPORT void adamw_step(const AdamWStep* given) {
  const AdamWStep& task = *given;
  const float norm = *task.norm;
  if (!std::isfinite(norm)) return;
  const float ratio = task.max_norm / (norm + 1e-6f), clip = task.max_norm > 0 && ratio < 1 ? ratio : 1;
#pragma omp parallel for num_threads(task.threads) if (task.count > 4 * kBlock) schedule(static)
  for (int64_t at = 0; at < task.count; at += kBlock) {
    const int64_t count = smaller(kBlock, task.count - at);
    float wide[kBlock];
    const float* gradient = wide;
    if (task.gradient_dtype == kBFloat16)
      widen(static_cast<const uint16_t*>(task.gradient) + at, wide, count);
    else
      gradient = static_cast<const float*>(task.gradient) + at;
    step(task.master + at, gradient, task.first + at, task.second + at, count, task, clip);
    for (int32_t k = 0; k < task.averages; ++k) average(task.average[k] + at, task.master + at, task.share[k], count);
    if (task.weight && task.weight_dtype == kBFloat16)
      narrow(task.master + at, static_cast<uint16_t*>(task.weight) + at, count);
    else if (task.weight)
      std::memcpy(static_cast<float*>(task.weight) + at, task.master + at, static_cast<size_t>(count) * sizeof(float));
  }
}

// The sum of squares, of blocks in double and of the blocks in their order: for every number of threads the same.
EXPORT double sum_of_squares(const void* values, int64_t count, int32_t dtype, double* parts, int32_t threads) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) if (blocks > 16) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * kBlock, size = smaller(kBlock, count - at);
    float wide[kBlock];
    const float* own = wide;
    if (dtype == kBFloat16)
      widen(static_cast<const uint16_t*>(values) + at, wide, size);
    else
      own = static_cast<const float*>(values) + at;
    parts[block] = squares(own, size);
  }
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += parts[block];
  return sum;
}

EXPORT void restore_if_not_finite(const float* norm, void* const* tensors, const void* const* saved,
                                  const int64_t* bytes, int32_t number) {
  if (std::isfinite(*norm)) return;
  for (int32_t i = 0; i < number; ++i) std::memcpy(tensors[i], saved[i], static_cast<size_t>(bytes[i]));
}
