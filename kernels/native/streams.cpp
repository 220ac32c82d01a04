// Random numbers and rows of memory for feeding a trainer: what a loop of tensor operations does too slowly on a CPU.
#include <omp.h>

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace {

inline void rounds(uint32_t (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, c2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0, c[1] = static_cast<uint32_t>(p1), c[2] = c2, c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

constexpr int kLanes = 32;  // counter blocks of four words that go through the rounds together

// Philox4x32-10 (Salmon et al., SC 2011) of counters (block, stream, id low, id high), block = first .. first + kLanes - 1,
// as floats in (0, 1): (word + 1/2) 2^-32 rounded once, exactly what sadm_fast/counters.py computes with tensors.
CLONES void uniforms_of_blocks(uint32_t first, uint32_t stream, uint64_t id, uint64_t key, float* out) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = first + i;
    c1[i] = stream;
    c2[i] = static_cast<uint32_t>(id);
    c3[i] = static_cast<uint32_t>(id >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kLanes; ++i) {
    out[4 * i + 0] = (static_cast<float>(c0[i]) + 0.5f) * 0x1p-32f;
    out[4 * i + 1] = (static_cast<float>(c1[i]) + 0.5f) * 0x1p-32f;
    out[4 * i + 2] = (static_cast<float>(c2[i]) + 0.5f) * 0x1p-32f;
    out[4 * i + 3] = (static_cast<float>(c3[i]) + 0.5f) * 0x1p-32f;
  }
}

}  // namespace

// out[samples][count]: `count` numbers of each sample id.
EXPORT void philox_uniform(const int64_t* ids, int64_t samples, int64_t count, uint32_t stream, uint64_t key, float* out,
                           int32_t threads) {
  constexpr int64_t kStep = 4 * kLanes;
#pragma omp parallel for num_threads(threads) if (samples * count > (1 << 15)) schedule(static)
  for (int64_t s = 0; s < samples; ++s) {
    float* row = out + s * count;
    int64_t done = 0;
    for (; done + kStep <= count; done += kStep)
      uniforms_of_blocks(static_cast<uint32_t>(done / 4), stream, static_cast<uint64_t>(ids[s]), key, row + done);
    if (done < count) {
      float rest[kStep];
      uniforms_of_blocks(static_cast<uint32_t>(done / 4), stream, static_cast<uint64_t>(ids[s]), key, rest);
      std::memcpy(row + done, rest, static_cast<size_t>(count - done) * sizeof(float));
    }
  }
}

// out[streams][samples]: the first word of each stream and sample id, as (word + 1/2) 2^-32 in double, which is exact.
EXPORT void philox_first(const int64_t* ids, int64_t samples, const int64_t* streams, int64_t number, uint64_t key,
                         double* out) {
  for (int64_t s = 0; s < number; ++s)
    for (int64_t i = 0; i < samples; ++i) {
      const uint64_t id = static_cast<uint64_t>(ids[i]);
      uint32_t c[4] = {0, static_cast<uint32_t>(streams[s]), static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
      rounds(c, key);
      out[s * samples + i] = (c[0] + 0.5) * 0x1p-32;
    }
}

// out[rows][bytes] from rows that lie anywhere. The processor fetches ahead within a page; where the next page is, it has
// to be told.
EXPORT void copy_rows(const int64_t* addresses, int64_t rows, int64_t bytes, char* out) {
  constexpr int64_t kPage = 4096, kLine = 64, kAhead = 1024;
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = reinterpret_cast<const char*>(static_cast<intptr_t>(addresses[r]));
    const char* after = r + 1 < rows ? reinterpret_cast<const char*>(static_cast<intptr_t>(addresses[r + 1])) : row;
    for (int64_t done = 0; done < bytes; done += kPage) {
      const int64_t size = bytes - done < kPage ? bytes - done : kPage;
      const char* next = done + size < bytes ? row + done + size : after;
      const int64_t there = done + size < bytes ? bytes - done - size : bytes;
      for (int64_t line = 0; line < (there < kAhead ? there : kAhead); line += kLine) __builtin_prefetch(next + line);
      std::memcpy(out + r * bytes + done, row + done, static_cast<size_t>(size));
    }
  }
}
