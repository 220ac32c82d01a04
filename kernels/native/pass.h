// One pass over all pairs: Gram tiles, their epilogue, and at once the products that make gradients of them.
//
// Only tiles on and above the diagonal are computed where rows and columns are the same. The pair weights W live for
// one strip of row tiles; every row tile then takes W x from the strip, each output by one thread in a fixed order of
// terms. So nothing of size columns x columns is ever stored, and the result does not depend on the thread count.
#pragma once

#include <omp.h>

#include "pack.h"

namespace ISA {

template <class In, class Acc, class Mul>
class Pass {
  typedef typename Mul::Word Word;
  typedef Features<In, Acc, Mul> Packed;
  static constexpr long P = kPanel<Acc>, kDepth = Mul::kDepth;
  static constexpr long kDepthBlock = 256;  // words of depth for which a panel stays near
  static constexpr long kSegments = kDepth;  // tiles of W in one product: as deep for bf16 words as for floats
  static constexpr long kOutputs = 8;       // panels of features that one task of a product covers
  static constexpr long kStripRows = 512;   // higher strips write sum_j W_ij x_j fewer times, but W outgrows the caches
  static constexpr bool kCopies = kDepth > 1;

  const StructurePass& task;
  Packed features[2];
  Pairs<Acc> pairs;
  Epilogue<Acc> epilogue_of_tile;
  bool gradient, epilogue_narrows;
  long tile, column_tiles, first_tile, last_tile, strip_tiles;
  Arena arena;
  Acc* strip[2];        // [strip_tiles][column_tiles][tile][tile]
  uint16_t* stored[2];  // the same as bf16, where products are of bf16
  Acc* accumulated[2];  // [padded_width / P][rows of the row tiles][P]: sum_j W_ij x_j
  Acc* row_sum[2];      // sum_j W_ij
  double* tile_sums;    // [strip_tiles][column_tiles][3]
  Acc* gram;            // [threads][2][tile][tile]
  Word* panel_rows;     // [threads][P][row_stride]
  Acc* padded_weight;   // weights and labels of padded columns are read with the others, so they must exist
  Integer<Acc>* padded_labels;

  long tile_rows(long t) const {
    const long rest = features[0].padded_rows - t * tile;
    return rest < tile ? rest : tile;
  }
  long strip_index(long row_tile, long column_tile) const {
    return row_tile % strip_tiles * column_tiles + column_tile;
  }

 public:
  explicit Pass(const StructurePass& t) : task(t) {}

  bool prepare() {
    gradient = task.stage == kLoss && (task.gradients[0] || task.gradients[1]);
    const long n = task.columns;
    const bool unit = task.unit || task.relation == kCosine;
    const bool masked = task.weight || task.labels;
    epilogue_of_tile = kCopies && unit ? choose_epilogue<Acc, kCopies>(task.relation, task.penalty, task.stage, masked)
                                       : choose_epilogue<Acc, false>(task.relation, task.penalty, task.stage, masked);
    epilogue_narrows = kCopies && unit && gradient;
    const long target = n >= 512 ? 128 : n >= 128 ? 64 : 32;
    tile = target / P * P > P ? target / P * P : P;
    for (int x = 0; x < 2; ++x) {
      features[x].prepare(task.features[x], n, task.width, task.gradients[x] && gradient, arena);
      pairs.need[x] = gradient && task.gradients[x];
      pairs.inverse_mean[x] = Acc(task.inverse_mean[x] * task.units[x]);
      pairs.pull[x] = Acc(task.inverse_mean[x]);
      pairs.mean_slope[x] = Acc(task.mean_slope[x]);
    }
    pairs.columns = n;
    pairs.first = task.first;
    pairs.end = task.first + task.rows;
    pairs.triangle = task.rows == n;
    pairs.tau = Acc(task.tau);
    pairs.delta = Acc(task.delta);
    column_tiles = (features[0].padded_rows + tile - 1) / tile;
    first_tile = pairs.first / tile;
    last_tile = (pairs.end + tile - 1) / tile;
    strip_tiles = kStripRows / tile;
    if (strip_tiles > last_tile - first_tile) strip_tiles = last_tile - first_tile;
    arena.want(tile_sums, strip_tiles * column_tiles * 3);
    arena.want(gram, size_t(task.threads) * 2 * tile * tile);
    arena.want(panel_rows, size_t(task.threads) * P * features[0].row_stride());
    if (task.weight) arena.want(padded_weight, features[0].padded_rows);
    if (task.labels) arena.want(padded_labels, features[0].padded_rows);
    for (int x = 0; x < 2; ++x)
      if (pairs.need[x]) {
        const size_t tiles = size_t(strip_tiles) * column_tiles * tile * tile;
        if constexpr (kCopies)
          arena.want(stored[x], tiles);
        else
          arena.want(strip[x], tiles);
        arena.want(accumulated[x], size_t(last_tile - first_tile) * tile * features[x].padded_width);
        arena.want(row_sum[x], (last_tile - first_tile) * tile);
      }
    if (!arena.allocate()) return false;
    for (int x = 0; x < 2; ++x)
      pairs.rows[x] = {features[x].squared, features[x].noise, features[x].norm, features[x].scale};
    pairs.weight = copy_padded(padded_weight, (const Acc*)task.weight);
    pairs.labels = copy_padded(padded_labels, (const Integer<Acc>*)task.labels);
    return true;
  }

  // kDone, kOutOfRange, or kClustered where bf16 instructions would lose the distances.
  int run() {
    const bool unit = task.unit || task.relation == kCosine;
    const long row_panels = features[0].padded_rows / P, feature_panels = features[0].padded_width / P;
    double sums[3] = {0, 0, 0};
    int result = kDone;
#pragma omp parallel num_threads(task.threads)
    {
      const long thread = omp_get_thread_num();
#pragma omp for schedule(static)
      for (long i = 0; i < 2 * row_panels; ++i) features[i % 2].measure(i / 2, unit);
#pragma omp for schedule(static)
      for (long i = 0; i < 2 * feature_panels; ++i) features[i % 2].average(i / 2);
#pragma omp single
      {
        for (const Packed& f : features) {
          if (kCopies && f.clustered(unit)) result = kClustered;
          if (!task.in_range && !f.in_range(unit)) result = kOutOfRange;
        }
      }
      if (result == kDone) work(thread, unit, row_panels, feature_panels, sums);
    }
    for (int k = 0; k < 3; ++k) task.sums[k] = pairs.triangle ? 2 * sums[k] : sums[k];
    if (!pairs.weight && !pairs.labels) task.sums[2] = double(task.rows) * double(task.columns - 1);
    return result;
  }

 private:
  // One thread's part, after the features have been measured.
  void work(long thread, bool unit, long row_panels, long feature_panels, double sums[3]) {
    Word* rows_of_panel = panel_rows + thread * P * features[0].row_stride();
    Acc* tiles[2] = {gram + thread * 2 * tile * tile, gram + (thread * 2 + 1) * tile * tile};
#pragma omp for schedule(static)
    for (long i = 0; i < 2 * row_panels; ++i) features[i % 2].pack(i / 2, unit, pairs.need[i % 2], rows_of_panel);
    for (long begin = first_tile; begin < last_tile; begin += strip_tiles) {
      const long end = begin + strip_tiles < last_tile ? begin + strip_tiles : last_tile;
      const long first_column = pairs.triangle ? begin : 0;
      const long columns = column_tiles - first_column;
#pragma omp for schedule(dynamic)
      for (long t = 0; t < (end - begin) * columns; ++t)
        relate_tile(begin + t / columns, first_column + t % columns, tiles);
#pragma omp single nowait
      add_sums(begin, end, sums);
      if (gradient) {
        const long outputs = pairs.triangle ? column_tiles - begin : end - begin;
        const long groups = (feature_panels + kOutputs - 1) / kOutputs;
#pragma omp for schedule(dynamic)
        for (long t = 0; t < 2 * outputs * groups; ++t)
          if (pairs.need[t % 2]) accumulate(t % 2, begin + t / 2 / groups, t / 2 % groups, begin, end);
      } else {
#pragma omp barrier
      }
    }
    if (gradient) {
#pragma omp for schedule(static)
      for (long i = 0; i < 2 * task.rows; ++i)
        if (pairs.need[i % 2]) finish(i % 2, i / 2, unit);
    }
  }

  template <class T>
  const T* copy_padded(T* padded, const T* values) const {
    if (!values) return nullptr;
    __builtin_memcpy(padded, values, task.columns * sizeof(T));
    __builtin_memset(padded + task.columns, 0, (features[0].padded_rows - task.columns) * sizeof(T));
    return padded;
  }

  // Gram tiles of both inputs, their sums, and the pair weights into the strip.
  void relate_tile(long row_tile, long column_tile, Acc* const tiles[2]) {
    if (pairs.triangle && column_tile < row_tile) return;
    const bool mirrored = pairs.triangle && column_tile == row_tile;
    const long rows = tile_rows(row_tile), columns = tile_rows(column_tile);
    const long row0 = row_tile * tile, column0 = column_tile * tile;
    // Rows of this tile that are asked for, and the register tiles that hold them
    const long begin = pairs.first > row0 ? pairs.first - row0 : 0;
    const long end = pairs.end < row0 + rows ? pairs.end - row0 : rows;
    const long index = strip_index(row_tile, column_tile);
    const bool direct = epilogue_narrows && !mirrored;  // W goes where it stays, without a stop as float
    uint16_t* half[2] = {nullptr, nullptr};
    Acc* out[2];
    for (int x = 0; x < 2; ++x) {
      out[x] = pairs.need[x] && !kCopies ? strip[x] + index * tile * tile : tiles[x];
      const Packed& f = features[x];
      for (long k = 0; k < f.words; k += kDepthBlock) {
        const long depth = f.words - k < kDepthBlock ? f.words - k : kDepthBlock;
        for (long j = 0; j < columns; j += P) {
          const Word* b = f.across + (column0 + j) * f.padded_words + k * P;
          const long stop = mirrored && j + P < end ? j + P : end;  // no register tile below the diagonal
          for (long i = begin / kRows * kRows; i < stop; i += kRows) {
            const Word* a = f.across + (row0 + i) / P * P * f.padded_words + k * P + (row0 + i) % P;
            register_tile<Mul, Acc, true>(a, P, 1, 0, b, depth, out[x] + i * tile + j, tile, k > 0);
          }
        }
      }
    }
    double* sums = tile_sums + index * 3;
    sums[0] = sums[1] = sums[2] = 0;
    Acc* first_row[2] = {out[0] + begin * tile, out[1] + begin * tile};
    if (direct)
      for (int x = 0; x < 2; ++x)
        if (pairs.need[x]) half[x] = stored[x] + index * tile * tile + begin * tile;
    epilogue_of_tile(pairs, row0 + begin, row0 + end, column0, column0 + columns, first_row, half, tile, sums);
    for (int x = 0; x < 2; ++x) {
      if (!pairs.need[x]) continue;
      if (direct) {
        clear_rows(stored[x] + index * tile * tile, begin, end, rows);
        continue;
      }
      clear_rows(out[x], begin, end, rows);
      if (mirrored) mirror(out[x], rows);
      if constexpr (kCopies) Mul::narrow_rows(out[x], rows, tile, stored[x] + index * tile * tile);
    }
  }

  // Rows of a tile of W that are not among those asked for weigh nothing.
  template <class T>
  void clear_rows(T* w, long begin, long end, long rows) const {
    __builtin_memset(w, 0, begin * tile * sizeof(T));
    __builtin_memset(w + end * tile, 0, (rows - end) * tile * sizeof(T));
  }

  // Fills what is below the diagonal of a tile from what is above it; the diagonal is no pair.
  void mirror(Acc* w, long rows) {
    constexpr int N = kLanes<Acc>;
    for (long i = 0; i < rows; i += N) {
      for (long j = i + N; j < rows; j += N) transpose_block<Acc>(w + i * tile + j, tile, w + j * tile + i, tile);
      for (long r = i; r < i + N; ++r) {
        w[r * tile + r] = 0;
        for (long c = r + 1; c < i + N; ++c) w[c * tile + r] = w[r * tile + c];
      }
    }
  }

  void add_sums(long begin, long end, double sums[3]) {
    for (long i = begin; i < end; ++i)
      for (long j = pairs.triangle ? i : 0; j < column_tiles; ++j)
        for (int k = 0; k < 3; ++k) sums[k] += tile_sums[strip_index(i, j) * 3 + k];
  }

  const Word* weights(int x, long row_tile, long column_tile) const {
    const long index = strip_index(row_tile, column_tile) * tile * tile;
    if constexpr (kCopies)
      return (const Word*)(stored[x] + index);
    else
      return strip[x] + index;
  }

  // What the strip [begin, end) of row tiles adds to sum_j W_ij x_j of one row tile, for one group of features.
  void accumulate(int x, long row_tile, long group, long begin, long end) {
    const bool in_strip = row_tile < end;
    bool fresh = begin == first_tile;  // the first strip adds to nothing
    if (pairs.triangle)
      for (long other = begin, last = in_strip ? row_tile : end, count; other < last; other += count, fresh = false) {
        count = last - other < kSegments ? last - other : kSegments;
        const Word* w = weights(x, other, row_tile);
        long step = column_tiles * tile * tile;
        if constexpr (kCopies) {
          Word* paired = (Word*)(gram + omp_get_thread_num() * 2 * tile * tile);
          step = tile * tile / kDepth;
          for (long s = 0; s < count; ++s)
            Mul::pair_rows(stored[x] + strip_index(other + s, row_tile) * tile * tile, tile_rows(other + s), tile,
                           paired + s * step);
          w = paired;
        }
        multiply<true>(x, row_tile, group, w, tile, other, count, step, fresh);
      }
    if (in_strip)
      for (long other = pairs.triangle ? row_tile : 0, count; other < column_tiles; other += count, fresh = false) {
        const long whole = tile_rows(column_tiles - 1) == tile ? column_tiles : column_tiles - 1;
        count = other < whole ? (whole - other < kSegments ? whole - other : kSegments) : 1;
        const Word* w = weights(x, row_tile, other);
        multiply<false>(x, row_tile, group, w, tile / kDepth, other, count, tile * tile / kDepth, fresh);
      }
  }

  // `count` tiles of W, `step` words apart, times the rows from the tile `other` on. All have the same number of rows.
  template <bool kTransposed>
  void multiply(int x, long row_tile, long group, const Word* w, long stride, long other, long count, long step,
                bool fresh) {
    const Packed& f = features[x];
    const long rows = tile_rows(row_tile), depth = tile_rows(other) / kDepth;
    const long all_rows = (last_tile - first_tile) * tile;
    Acc* out = accumulated[x] + (row_tile - first_tile) * tile * P;
    const long begin = group * kOutputs * P;
    const long end = begin + kOutputs * P < f.padded_width ? begin + kOutputs * P : f.padded_width;
    const long panel_words = f.padded_rows / kDepth * P, depth_words = count * depth * P;
    const Word* from = f.along + other * tile / kDepth * P;
    Ahead weights_ahead(w + count * step, rows * depth * long(sizeof(Word)), (end - begin) / P * (rows / kRows));
    for (long c = begin; c < end; c += P) {
      const Word* b = from + c / P * panel_words;
      const Word* next = c + P < end ? b + panel_words : from + begin / P * panel_words + depth_words;
      Ahead features_ahead(next, depth_words * long(sizeof(Word)), rows / kRows);
      for (long i = 0; i < rows; i += kRows) {
        features_ahead.fetch();
        weights_ahead.fetch();
        register_tile<Mul, Acc, kTransposed>(w + (kTransposed ? i : i * stride), stride, count, step, b, depth,
                                             out + c * all_rows + i * P, P, !fresh);
      }
    }
    if (group == 0)
      for (long s = 0; s < count; ++s)
        add_row_sums<kTransposed>(x, row_tile, w + s * step, stride, other + s, fresh && s == 0, rows);
  }

  // Sums of the weights as they are multiplied, so that what all rows share cancels to the last bit of W.
  template <bool kTransposed>
  void add_row_sums(int x, long row_tile, const Word* w, long stride, long other, bool fresh, long rows) {
    typedef Vector<Acc> V;
    constexpr int N = kLanes<Acc>;
    Acc* out = row_sum[x] + (row_tile - first_tile) * tile;
    const Acc* first = features[x].length + other * tile / kDepth;
    const Acc* second = first + (kDepth - 1) * (features[x].padded_rows / kDepth);
    const long depth = tile_rows(other) / kDepth;
    if (kTransposed) {
      for (long i = 0; i < rows; i += N) {
        V sum = fresh ? V{} : load<Acc>(out + i);
        for (long k = 0; k < depth; ++k)
          sum += Mul::weigh(Mul::load_words(w + k * stride + i), splat(first[k]), splat(second[k]));
        store<Acc>(out + i, sum);
      }
    } else {
      for (long i = 0; i < rows; ++i) {
        V sum = V{};
        for (long k = 0; k < depth; k += N)
          sum += Mul::weigh(Mul::load_words(w + i * stride + k), load<Acc>(first + k), load<Acc>(second + k));
        Acc total = fresh ? Acc(0) : out[i];
        for (int l = 0; l < N; ++l) total += sum[l];
        out[i] = total;
      }
    }
  }

  // 2 ((sum_j W_ij) x_i - sum_j W_ij x_j), then back through the scaling to length 1: what changes the length is taken
  // out.
  void finish(int x, long row, bool unit) {
    const Packed& f = features[x];
    const long i = row + pairs.first, d = f.width;
    const In* in = f.x + i * d;
    const Acc* products = accumulated[x] + (i - first_tile * tile) * P;
    const long panel_stride = (last_tile - first_tile) * tile * P;
    Acc* out = (Acc*)task.gradients[x] + row * d;
    const Acc own = row_sum[x][i - first_tile * tile];
    const Acc s = f.scale[i];
    for (long panel = 0; panel < d; panel += P, products += panel_stride) {
      const Acc* centre = f.centre + panel;
      const In* x_panel = in + panel;
      const auto one = [&](long c) {
        const Acc packed = kCopies ? Acc(widen(x_panel[c])) * s : Acc(widen(x_panel[c])) * s - centre[c];
        out[panel + c] = own * packed - products[c];
      };
      if (d - panel >= P)  // a trip count that the compiler knows
        for (long c = 0; c < P; ++c) one(c);
      else
        for (long c = 0; c < d - panel; ++c) one(c);
    }
    if (!unit) {
      for (long c = 0; c < d; ++c) out[c] *= 2;
      return;
    }
    constexpr int N = kLanes<Acc>;
    Acc part[N] = {};
    long c = 0;
    for (; c + N <= d; c += N)
      for (int l = 0; l < N; ++l) part[l] += Acc(widen(in[c + l])) * s * out[c + l];
    for (; c < d; ++c) part[0] += Acc(widen(in[c])) * s * out[c];
    Acc along = 0;
    for (int l = 0; l < N; ++l) along += part[l];
    const Acc back = kCopies ? (s == 0 ? Acc(0) : Acc(-1)) : 2 * s;  // the others' W has the factor -2
    for (c = 0; c < d; ++c) out[c] = back * (out[c] - Acc(widen(in[c])) * s * along);
  }
};

template <class In, class Acc, class Mul>
int run_pass(const StructurePass& task) {
  Pass<In, Acc, Mul> pass(task);
  return pass.prepare() ? pass.run() : kNoMemory;
}

inline int run(const StructurePass& task) {
  if (task.dtype == kFloat64) return run_pass<double, double, Multiply<double>>(task);
  if (task.dtype == kFloat32) return run_pass<float, float, Multiply<float>>(task);
#if defined(__AVX512BF16__)
  const int result = run_pass<BFloat16, float, MultiplyBF16>(task);
  if (result != kClustered) return result;
#endif
  return run_pass<BFloat16, float, Multiply<float>>(task);
}

}  // namespace ISA
