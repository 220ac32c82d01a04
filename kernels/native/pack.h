// Features in the layouts that the products read, and what the epilogue needs to know of each row.
//
// Subtracting one vector from all rows changes no distance, but the rounding noise of |a|^2 + |b|^2 - 2ab grows with the
// rows' lengths. So float rows are packed at length 1 where asked for, then less their mean. Bfloat16 rows for the bf16
// instructions stay as they came (their products are exact in float32), and the epilogue scales the products; rows that
// nearly point one way, whose distances would drown in that noise, are refused here and packed as float rows instead.
#pragma once

#include "gemm.h"
#include "relation.h"
#include "workspace.h"

namespace ISA {

// All memory of a pass in one block: what is wanted is named first, then taken at once.
class Arena {
  static constexpr int kMost = 64;
  void* slots_[kMost];  // addresses of pointers
  size_t offsets_[kMost], bytes_ = 0;
  int count_ = 0;
  Workspace workspace_;

 public:
  // `pointer` will point to `count` elements, 64-byte aligned, after allocate().
  template <class T>
  void want(T*& pointer, size_t count) {
    slots_[count_] = &pointer;
    offsets_[count_++] = bytes_;
    bytes_ += (count * sizeof(T) + 63) / 64 * 64;
  }

  bool allocate() {
    char* block = workspace_.take(bytes_);
    if (!block) return false;
    for (int i = 0; i < count_; ++i) {
      char* p = block + offsets_[i];
      __builtin_memcpy(slots_[i], &p, sizeof p);
    }
    return true;
  }
};

// Lane numbers for swapping the off-diagonal blocks of size kHalf in two rows of a block.
template <class T, int kHalf>
struct Swap {
  Integer<T> low[kLanes<T>], high[kLanes<T>];
  constexpr Swap() : low(), high() {
    constexpr int N = kLanes<T>;
    for (int i = 0; i < N; ++i) {
      low[i] = (i & kHalf) ? N + i - kHalf : i;
      high[i] = (i & kHalf) ? N + i : i + kHalf;
    }
  }
};

template <class T, int kHalf>
ALWAYS_INLINE void swap_blocks(Vector<T>* v) {
  static constexpr Swap<T, kHalf> swap;
  Mask<T> low = load_integers<T>(swap.low), high = load_integers<T>(swap.high);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes<T>; ++r)
    if (!(r & kHalf)) {
      Vector<T> a = v[r], b = v[r + kHalf];
      v[r] = __builtin_shuffle(a, b, low);
      v[r + kHalf] = __builtin_shuffle(a, b, high);
    }
  if constexpr (kHalf > 1) swap_blocks<T, kHalf / 2>(v);
}

// out[c * out_stride + r] = in[r * in_stride + c] for a block of as many rows and columns as there are lanes.
template <class T>
ALWAYS_INLINE void transpose_block(const T* in, long in_stride, T* out, long out_stride) {
  constexpr int N = kLanes<T>;
  Vector<T> v[N];
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) v[r] = load<T>(in + r * in_stride);
  swap_blocks<T, N / 2>(v);
#pragma GCC unroll 16
  for (int c = 0; c < N; ++c) store<T>(out + c * out_stride, v[c]);
}

inline long round_up(long x, long to) { return (x + to - 1) / to * to; }

template <class In, class Acc, class Mul>
struct Features {
  typedef typename Mul::Word Word;
  static constexpr long P = kPanel<Acc>, N = kLanes<Acc>, kDepth = Mul::kDepth;
  static constexpr bool kRaw = kDepth > 1;  // packed as they came

  const In* x;                                           // [rows, width]
  long rows, width, padded_rows, words, padded_words, padded_width;
  Acc *sum, *squared, *noise, *norm, *scale, *centre;  // of a row, `sum` before it is scaled; `centre` of a feature
  Acc* length;   // of the rows as packed: those that come first in a word, then those that come second
  Word* across;  // [padded_rows / P][padded_words][P]: depth along the features, for <x_i, x_j>
  Word* along;   // [padded_width / P][padded_rows / kDepth][P]: depth along the rows, for sum_j W_ij x_j

  void prepare(const void* features, long n, long d, bool gradient, Arena& arena) {
    x = (const In*)features;
    rows = n;
    width = d;
    padded_rows = round_up(n, P);
    words = (d + kDepth - 1) / kDepth;
    padded_words = round_up(words, N);
    padded_width = round_up(d, P);
    arena.want(sum, padded_rows);
    arena.want(squared, padded_rows);
    arena.want(noise, padded_rows);
    arena.want(norm, padded_rows);
    arena.want(scale, padded_rows);
    arena.want(length, padded_rows);
    arena.want(centre, padded_width);
    arena.want(across, padded_rows * padded_words);
    if (gradient) arena.want(along, padded_width * (padded_rows / kDepth));
  }

  static constexpr Acc kEps = sizeof(Acc) == 4 ? Acc(1.1920928955078125e-07) : Acc(2.220446049250313e-16);
  // Sums of squares within these can be multiplied, added up and turned over.
  static constexpr Acc kLeast = sizeof(Acc) == 4 ? Acc(0x1p-80) : Acc(0x1p-800);
  static constexpr Acc kMost = sizeof(Acc) == 4 ? Acc(0x1p80) : Acc(0x1p800);

  // Length and scale of the rows of a panel; rows behind the last one count as zeros.
  void measure(long panel, bool unit) {
    for (long i = panel * P; i < panel * P + P; ++i) {
      Acc total = 0;
      if (i < rows) {
        Acc part[N] = {};
        const In* row = x + i * width;
        long c = 0;
        for (; c + N <= width; c += N)
          for (int l = 0; l < N; ++l) part[l] += Acc(widen(row[c + l])) * Acc(widen(row[c + l]));
        for (int l = 0; c < width; ++c, ++l) part[l] += Acc(widen(row[c])) * Acc(widen(row[c]));
        for (int l = 0; l < N; ++l) total += part[l];
      }
      const Acc row_length = unit ? Acc(__builtin_sqrt(total)) : Acc(1);
      length[i % kDepth * (padded_rows / kDepth) + i / kDepth] = kRaw ? row_length : Acc(1);
      sum[i] = total;
      scale[i] = unit ? (total == 0 ? Acc(0) : 1 / row_length) : Acc(1);
      squared[i] = norm[i] = unit ? (total == 0 ? Acc(0) : total / total) : total;
      noise[i] = 8 * kEps * squared[i];
    }
  }

  bool zeros(long i) const {
    for (long c = 0; c < width; ++c)
      if (widen(x[i * width + c]) != 0) return false;
    return true;
  }

  // Whether squares of features neither over- nor underflow; with `unit` those of every row, else of the largest.
  bool in_range(bool unit) const {
    bool all_small = true, all_zeros = true;
    for (long i = 0; i < rows; ++i) {
      if (sum[i] > kMost) return false;
      if (sum[i] < kLeast) {
        const bool nothing = zeros(i);
        if (unit && !nothing) return false;
        all_zeros &= nothing;
      } else {
        all_small = false;  // NaN, too: it goes on to the loss
      }
    }
    return !all_small || all_zeros;
  }

  // Whether 31/32 of the squares of the rows are what all rows share: a distance would lose six bits of its digits.
  bool clustered(bool unit) const {
    Acc shared[P] = {}, all[P] = {};
    for (long c = 0; c < padded_width; c += P)
      for (long l = 0; l < P; ++l) shared[l] += centre[c + l] * centre[c + l];
    const Acc* squares = unit ? norm : sum;
    for (long i = 0; i < padded_rows; i += P)
      for (long l = 0; l < P; ++l) all[l] += squares[i + l];
    double whole = 0, part = 0;
    for (long l = 0; l < P; ++l) {
      part += shared[l];
      whole += all[l];
    }
    return part * rows > whole * (31.0 / 32.0);
  }

  // The mean of the scaled rows in one panel of features.
  void average(long panel) {
    typedef Vector<Acc> V;
    V total[kVectors];
    for (V& v : total) v = V{};
    const long count = width - panel * P < P ? width - panel * P : P;
    for (long i = 0; i < rows; ++i) {
      const In* row = x + i * width + panel * P;
      Acc values[P] = {};
      if (count == P)  // a trip count that the compiler knows
        for (long c = 0; c < P; ++c) values[c] = Acc(widen(row[c]));
      else
        for (long c = 0; c < count; ++c) values[c] = Acc(widen(row[c]));
      for (int v = 0; v < kVectors; ++v) total[v] += load<Acc>(values + v * N) * scale[i];
    }
    for (int v = 0; v < kVectors; ++v) store<Acc>(centre + panel * P + v * N, total[v] / Acc(rows));
  }

  // Rows of a panel of their own, in words, into both layouts. `rows_of_panel` is [P][row_stride] of scratch.
  long row_stride() const { return (padded_words > padded_width ? padded_words : padded_width) + N; }
  void pack(long panel, bool unit, bool gradient, Word* rows_of_panel) {
    const long stride = row_stride();
    for (long r = 0; r < P; ++r) {
      Word* out = rows_of_panel + r * stride;
      long i = panel * P + r;
      if (i >= rows) {
        __builtin_memset(out, 0, stride * sizeof(Word));
        continue;
      }
      const In* row = x + i * width;
      if constexpr (kRaw) {
        __builtin_memcpy(out, row, width * sizeof(In));
        __builtin_memset((In*)out + width, 0, stride * sizeof(Word) - width * sizeof(In));
      } else {
        Acc s = scale[i];
        Acc part[N] = {};
        long c = 0;
        for (; c + N <= width; c += N)
          for (int l = 0; l < N; ++l) {
            Acc value = Acc(widen(row[c + l])) * s - centre[c + l];
            out[c + l] = value;
            part[l] += value * value;
          }
        for (int l = 0; c < width; ++c, ++l) {
          Acc value = Acc(widen(row[c])) * s - centre[c];
          out[c] = value;
          part[l] += value * value;
        }
        for (; c < stride; ++c) out[c] = 0;
        Acc total = 0;
        for (int l = 0; l < N; ++l) total += part[l];
        squared[i] = total;
        noise[i] = 8 * kEps * (total + (unit ? kEps * norm[i] : Acc(0)));
      }
    }
    Word* across_panel = across + panel * P * padded_words;
    for (long r = 0; r < P; r += N)
      for (long k = 0; k < padded_words; k += N)
        transpose_block<Acc>((const Acc*)(rows_of_panel + r * stride + k), stride, (Acc*)(across_panel + k * P + r), P);
    if (!gradient) return;
    for (long c = 0; c < padded_width; c += P)
      for (long r = 0; r < P; r += kDepth) {
        Word* out = along + c * (padded_rows / kDepth) + (panel * P + r) / kDepth * P;
        if constexpr (kRaw) {
          const uint16_t* low = (const uint16_t*)(rows_of_panel + r * stride) + c;
          const uint16_t* high = (const uint16_t*)(rows_of_panel + (r + 1) * stride) + c;
          for (long l = 0; l < P; ++l) out[l] = uint32_t(low[l]) | uint32_t(high[l]) << 16;
        } else {
          __builtin_memcpy(out, rows_of_panel + r * stride + c, P * sizeof(Word));
        }
      }
  }
};

}  // namespace ISA
