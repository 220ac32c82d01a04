// From two Gram tiles to the terms of the structure loss: the vectorised epilogue of the matrix products.
//
// With g = <x_i, x_j> of features (see pack.h for their scale and centre) and q_i = |x_i|^2:
//   D = sqrt(q_i + q_j - 2 g), u = D / mean, R = u | 1 - D^2 / 2 | exp(-u^2 / (2 tau^2)), Delta = R_fake - R_real,
//   loss = omega rho(Delta), and the pair's weight W in the gradient 2 sum_j W_ij (x_i - x_j).
// The second relation is the cosine of rows of length 1, by their distance: what rows share cancels beforehand.
#pragma once

#include "structure.h"
#include "vector.h"

namespace ISA {

// What the rows of one input bring to a pair; arrays over all (padded) columns.
template <class Acc>
struct Rows {
  Acc* squared;  // q
  Acc* noise;    // a pair with D^2 <= noise_i + noise_j is one point: _MERGE_EPS and _MERGE_UNIT of reference.py
  Acc* norm;     // |x|^2 before the centre was taken off
  Acc* scale;    // 1 / |x| where the products are of rows that are not yet of length 1
};

template <class Acc>
struct Pairs {
  Rows<Acc> rows[2];
  const Acc* weight;
  const Integer<Acc>* labels;
  long columns, first, end;  // rows are [first, end)
  bool triangle;             // only columns behind the row; else all but the row itself
  bool need[2];
  Acc tau, delta, mean_slope[2];
  Acc inverse_mean[2];  // u = D inverse_mean, D of the rows as packed
  Acc pull[2];          // 1 / mean: how u changes with the rows as given
};

template <class Acc>
struct Side {
  Vector<Acc> relation, constant;  // R, but for the cosine's (|x_i|^2 + |x_j|^2) / 2, which would cost it digits
  Vector<Acc> distance, inverse, factor;  // u, 1 / D (0 for merged pairs), -2 s_i s_j
};

// kScaled: the products are of rows that are not yet of length 1. Those have no mean distance to be divided by.

template <class Acc, int kRelation, bool kScaled>
ALWAYS_INLINE Side<Acc> relate(const Pairs<Acc>& p, int x, Vector<Acc> g, long row, long column) {
  typedef Vector<Acc> V;
  const Rows<Acc>& r = p.rows[x];
  Side<Acc> side{};
  side.factor = kScaled ? Acc(-2) * r.scale[row] * load<Acc>(r.scale + column) : splat(Acc(-2));
  V squared = r.squared[row] + load<Acc>(r.squared + column) + side.factor * g;
  if (kRelation == kCosine) {
    side.relation = rounded(Acc(-0.5) * squared);  // equal batches must differ by 0
    side.constant = Acc(0.5) * (r.norm[row] + load<Acc>(r.norm + column));
    return side;
  }
  V noise = r.noise[row] + load<Acc>(r.noise + column);
  side.inverse = inverse_sqrt(squared);
  side.inverse = squared <= noise ? V{} : side.inverse;  // false for NaN, which goes on to the loss
  side.distance = squared * side.inverse;
  if (!kScaled) side.distance *= p.inverse_mean[x];
  side.distance = rounded(side.distance);  // equal batches must differ by 0
  if (kRelation == kEuclidean)
    side.relation = side.distance;
  else
    side.relation = rounded(exp_nonpositive(side.distance * side.distance * (Acc(-0.5) / (p.tau * p.tau))));
  return side;
}

// The pair's weight in the gradient of input x, times -2 s_i s_j where kScaled; `slope` is omega rho'(Delta) with the
// sign of that input.
template <class Acc, int kRelation, bool kScaled>
ALWAYS_INLINE Vector<Acc> pair_weight(const Pairs<Acc>& p, int x, const Side<Acc>& side, Vector<Acc> slope,
                                      Vector<Acc> omega) {
  typedef Vector<Acc> V;
  const Acc pull = kScaled ? Acc(1) : p.pull[x];
  const Acc mean_slope = p.mean_slope[x] * pull;
  V w;
  if (kRelation == kCosine) {
    w = -slope;
  } else if (kRelation == kEuclidean) {
    w = kScaled ? slope * side.inverse : (slope * pull - omega * mean_slope) * side.inverse;
  } else {
    w = -slope * side.relation * (kScaled ? Acc(1) : p.inverse_mean[x]) * (pull / (p.tau * p.tau));
    if (!kScaled) w -= omega * mean_slope * side.inverse;
    w = side.inverse == Acc(0) ? V{} : w;
  }
  return kScaled ? w * side.factor : w;
}

// Turns the Gram tiles (leading dimension `stride`) of rows row0.. and columns column0.. into the pair weights of
// the gradients, in place or, where kScaled and `half` is given, there as bfloat16, and adds up the stage's sums. Rows and columns count from 0 over the whole batch; lanes that
// are no pair get weight 0. In a triangle the vectors before the diagonal are left as they are.
template <class Acc, int kRelation, int kPenalty, bool kMasked, bool kScaled, int kStage>
void epilogue(const Pairs<Acc>& p, long row0, long row1, long column0, long column1, Acc* const tile[2],
              uint16_t* const half[2], long stride, double sums[3]) {
  typedef Vector<Acc> V;
  constexpr int N = kLanes<Acc>;
  const bool edge = column0 < row1 || column1 > p.columns;  // holds pairs that do not count
  V total[3] = {V{}, V{}, V{}};
  for (long i = row0; i < row1; ++i) {
    long start = column0;
    if (p.triangle && i + 1 > column0) start = column0 + (i + 1 - column0) / N * N;
    V row_weight = splat(kMasked && p.weight ? p.weight[i] : Acc(1));
    Acc* fake = tile[1] + (i - row0) * stride - column0;
    Acc* real = tile[0] + (i - row0) * stride - column0;
    for (long j = start; j < column1; j += N) {
      Side<Acc> f = relate<Acc, kRelation, kScaled>(p, 0, load<Acc>(real + j), i, j);
      Side<Acc> g = relate<Acc, kRelation, kScaled>(p, 1, load<Acc>(fake + j), i, j);
      V omega = row_weight;
      if (kMasked) {
        if (p.weight) omega *= load<Acc>(p.weight + j);
        if (p.labels) omega = load_integers<Acc>(p.labels + j) == p.labels[i] ? omega : V{};
      }
      V difference = g.relation - f.relation;
      if (kRelation == kCosine) difference += g.constant - f.constant;  // other than 0 for rows of zeros only
      if (edge) {
        Mask<Acc> column = iota<Acc>() + Integer<Acc>(j);
        Mask<Acc> pair = (p.triangle ? column > Integer<Acc>(i) : column != Integer<Acc>(i)) &
                         (column < Integer<Acc>(p.columns));
        omega = pair ? omega : V{};
        difference = pair ? difference : V{};
        f.inverse = pair ? f.inverse : V{};
        g.inverse = pair ? g.inverse : V{};
        f.distance = pair ? f.distance : V{};
        g.distance = pair ? g.distance : V{};
      }
      if (kMasked) total[2] += omega;
      if (kStage == kDistanceSums) {
        total[0] += omega * f.distance;
        total[1] += omega * g.distance;
        continue;
      }
      V size = difference < Acc(0) ? -difference : difference;
      V slope, rho;
      if (kPenalty == kSquared) {
        rho = difference * difference;
        slope = difference + difference;
      } else if (kPenalty == kAbsolute) {
        rho = size;
        slope = difference > Acc(0) ? splat(Acc(1)) : (difference < Acc(0) ? splat(Acc(-1)) : difference);
      } else {
        V inside = size < p.delta ? size : splat(p.delta);
        inside = size != size ? size : inside;
        rho = inside * (size - Acc(0.5) * inside);
        slope = difference < Acc(0) ? -inside : inside;
      }
      if (kMasked) slope *= omega;
      if (kStage == kSlopeSums) {
        if (kRelation == kEuclidean) {
          total[0] -= slope * f.distance;
          total[1] += slope * g.distance;
        } else {
          Acc per_squared = 1 / (p.tau * p.tau);
          total[0] += slope * f.relation * f.distance * f.distance * per_squared;
          total[1] -= slope * g.relation * g.distance * g.distance * per_squared;
        }
        continue;
      }
      total[0] += kMasked ? omega * rho : rho;
      const long at = (i - row0) * stride - column0 + j;
      for (int x = 0; x < 2; ++x) {
        if (!p.need[x]) continue;
        V w = pair_weight<Acc, kRelation, kScaled>(p, x, x == 0 ? f : g, x == 0 ? -slope : slope, omega);
        if constexpr (kScaled)
          if (half[x]) {
            store_half(half[x] + at, narrow(w));
            continue;
          }
        store<Acc>(tile[x] + at, w);
      }
    }
    if ((i - row0) % 8 == 7 || i + 1 == row1)  // few enough terms in a lane for float32
      for (int k = 0; k < 3; ++k) {
        sums[k] += sum_lanes<Acc>(total[k]);
        total[k] = V{};
      }
  }
}

template <class Acc>
using Epilogue = void (*)(const Pairs<Acc>&, long, long, long, long, Acc* const[2], uint16_t* const[2], long,
                          double[3]);

template <class Acc, int kRelation, int kPenalty, bool kMasked, bool kScaled>
Epilogue<Acc> choose_stage(int stage) {
  if (stage == kDistanceSums) return epilogue<Acc, kRelation, kSquared, kMasked, kScaled, kDistanceSums>;
  if (stage == kSlopeSums) return epilogue<Acc, kRelation, kPenalty, kMasked, kScaled, kSlopeSums>;
  return epilogue<Acc, kRelation, kPenalty, kMasked, kScaled, kLoss>;
}
template <class Acc, int kRelation, int kPenalty, bool kScaled>
Epilogue<Acc> choose_masked(int stage, bool masked) {
  return masked ? choose_stage<Acc, kRelation, kPenalty, true, kScaled>(stage)
                : choose_stage<Acc, kRelation, kPenalty, false, kScaled>(stage);
}
template <class Acc, int kRelation, bool kScaled>
Epilogue<Acc> choose_penalty(int penalty, int stage, bool masked) {
  if (penalty == kSquared) return choose_masked<Acc, kRelation, kSquared, kScaled>(stage, masked);
  if (penalty == kAbsolute) return choose_masked<Acc, kRelation, kAbsolute, kScaled>(stage, masked);
  return choose_masked<Acc, kRelation, kHuber, kScaled>(stage, masked);
}
template <class Acc, bool kScaled>
Epilogue<Acc> choose_epilogue(int relation, int penalty, int stage, bool masked) {
  if (relation == kEuclidean) return choose_penalty<Acc, kEuclidean, kScaled>(penalty, stage, masked);
  if (relation == kCosine) return choose_penalty<Acc, kCosine, kScaled>(penalty, stage, masked);
  return choose_penalty<Acc, kGaussian, kScaled>(penalty, stage, masked);
}

}  // namespace ISA
