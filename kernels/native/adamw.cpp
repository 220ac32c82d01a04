// What decides about a step of the optimizer (adamw.h), the gradient's norm, and what takes one back.
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "clones.h"
#include "structure.h"

namespace {

constexpr int64_t kBlock = 1 << 12;  // elements that one thread takes at once; all their arrays fit into its cache

inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

CLONES void widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
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
