// The register tile of every matrix product: C[M x N] += A[M x K] B[K x N], B in panels of N contiguous words.
#pragma once

#include "vector.h"

namespace ISA {

// How a product of features of type Acc is carried out. A word is what one multiply-add consumes along K.
template <class Acc>
struct Multiply {
  typedef Acc Word;
  static constexpr int kDepth = 1;  // elements along K in a word
  // weigh(): the elements of each word times a factor for its first and one for its second element, summed.
  static ALWAYS_INLINE Vector<Acc> load_words(const Word* p) { return load<Acc>(p); }
  static ALWAYS_INLINE Vector<Acc> splat_word(Word w) { return splat<Acc>(w); }
  static ALWAYS_INLINE Vector<Acc> multiply_add(Vector<Acc> a, Vector<Acc> b, Vector<Acc> c) { return a * b + c; }
  static ALWAYS_INLINE Vector<Acc> weigh(Vector<Acc> words, Vector<Acc> first, Vector<Acc>) { return words * first; }
};

#if defined(__AVX512BF16__)
struct MultiplyBF16 {
  typedef uint32_t Word;  // two bfloat16, the lower half first
  static constexpr int kDepth = 2;
  static ALWAYS_INLINE VInt32 load_words(const Word* p) { return load_integers<float>((const int32_t*)p); }
  static ALWAYS_INLINE VInt32 splat_word(Word w) { return int32_t(w) - VInt32{}; }
  static ALWAYS_INLINE VFloat multiply_add(VInt32 a, VInt32 b, VFloat c) {
    return (VFloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static ALWAYS_INLINE VFloat weigh(VInt32 words, VFloat first, VFloat second) {
    return (VFloat)(words << 16) * first + (VFloat)(words & (int32_t)0xFFFF0000) * second;
  }

  // [rows][size] as bfloat16: words whose depth goes along the columns.
  static void narrow_rows(const float* in, long rows, long size, uint16_t* out) {
    for (long i = 0; i < rows * size; i += kLanes<float>) store_half(out + i, narrow(load<float>(in + i)));
  }
  // Those as [rows / 2][size] words, whose depth goes along the rows.
  static void pair_rows(const uint16_t* in, long rows, long size, Word* out) {
    for (long i = 0; i < rows; i += 2)
      for (long j = 0; j < size; j += kLanes<float>, out += kLanes<float>) {
        VInt32 low = (VInt32)_mm512_cvtepu16_epi32((__m256i)load_half(in + i * size + j));
        VInt32 high = (VInt32)_mm512_cvtepu16_epi32((__m256i)load_half(in + (i + 1) * size + j));
        store<float>((float*)out, (VFloat)(low | high << 16));
      }
  }
};
#endif

// Rows and vectors of the register tile: enough independent sums to hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kRows = 4, kVectors = 3;  // 12 sums, 3 of B and 1 of A fill the 16 registers
#else
constexpr int kRows = 4, kVectors = 4;
#endif
template <class Acc>
constexpr int kPanel = kVectors * kLanes<Acc>;  // columns of a panel; a multiple of kRows, so A can be read from one

// a(m, k) = a[m * stride + k], or a[k * stride + m] where kRowsTouch. The depth may come in `segments` of which each
// begins `a_segment` words after the last one in A; in B they follow each other. A function of its own: inlined, the
// compiler keeps strides of its callers' loops in vector registers and moves them back at every k.
template <class Mul, class Acc, bool kRowsTouch>
__attribute__((noinline)) void register_tile(const typename Mul::Word* __restrict a, long stride, long segments, long a_segment,
                                 const typename Mul::Word* __restrict b, long depth, Acc* __restrict c, long c_stride,
                                 bool add) {
  typedef Vector<Acc> V;
  constexpr int N = kLanes<Acc>;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[m][v] = V{};
  for (long s = 0; s < segments; ++s, a += a_segment, b += depth * kPanel<Acc>)
    for (long k = 0; k < depth; ++k) {
      decltype(Mul::load_words(b)) columns[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) columns[v] = Mul::load_words(b + k * kPanel<Acc> + v * N);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        auto row = Mul::splat_word(kRowsTouch ? a[k * stride + m] : a[m * stride + k]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[m][v] = Mul::multiply_add(row, columns[v], sum[m][v]);
      }
    }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Acc* p = c + m * c_stride + v * N;
      store<Acc>(p, add ? load<Acc>(p) + sum[m][v] : sum[m][v]);
    }
}

// Memory that the next products will read: a part of it comes near with each call, while this one is computed.
class Ahead {
  const char* at_;
  long part_;

 public:
  Ahead(const void* begin, long bytes, long calls) : at_((const char*)begin), part_(bytes / calls) {}
  ALWAYS_INLINE void fetch() {
    for (long line = 0; line < part_; line += 64) __builtin_prefetch(at_ + line, 0, 2);
    at_ += part_;
  }
};

}  // namespace ISA
