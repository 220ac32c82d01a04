// What Python (native/__init__.py, through ctypes) and the instruction sets share. Change kInterface with it.
#pragma once

#include <stdint.h>

extern "C" {

enum { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };
enum { kEuclidean = 0, kCosine = 1, kGaussian = 2 };
enum { kSquared = 0, kAbsolute = 1, kHuber = 2 };
enum {
  kDistanceSums = 0,  // sums: omega D_real, omega D_fake, omega
  kSlopeSums = 1,     // sums: Q_real u_real, Q_fake u_fake, omega
  kLoss = 2,          // sums: omega rho, -, omega; and gradients where asked for
};

// One pass over the pairs of rows [first, first + rows) and all columns [0, columns), the pair of a row with itself
// excepted. Features are contiguous [columns, width]; "acc" is float, double for float64 features.
struct StructurePass {
  const void* features[2];      // real, fake
  const void* weight;           // acc [columns], or null
  const void* labels;           // int32 (int64 for float64 features) [columns], or null
  void* gradients[2];           // acc [rows, width], not divided by the sum of omega; null where not needed
  double* sums;                 // [3]
  int64_t columns, width, first, rows;
  double tau, delta;
  double inverse_mean[2];       // 1 without normalize="mean"
  double units[2];              // distances of the rows are counted in these; 1 where `unit`
  double mean_slope[2];         // kappa: sum(Q u) / sum(omega), 0 without normalize="mean"
  int32_t dtype, relation, penalty, unit, stage, threads;
  int32_t in_range;             // promised: squares of features stay in range; else this is checked, see kOutOfRange
};

// One AdamW step of `count` elements (kernels/adamw.py). Nothing is written if *norm is not finite.
struct AdamWStep {
  float* master;                // [count], as all below
  const void* gradient;
  float* first;                 // moments
  float* second;
  void* weight;                 // or null
  float* average[4];
  const float* norm;            // of all gradients, before clipping
  int64_t count;
  float share[4];               // of the new master in an average
  float max_norm;               // 0: no clipping
  float rest1, beta2, rest2;    // rest: 1 - beta
  float eps;
  float kept;                   // 1 - lr * weight decay
  float step_size;              // lr / (1 - beta1^n)
  float root_of_correction;     // sqrt(1 - beta2^n)
  int32_t averages, gradient_dtype, weight_dtype, threads;
};

// What a pass returns. kOutOfRange: nothing was computed, features have to be scaled by a power of two first.
// kClustered does not leave the library: the same pass once more, with other instructions.
enum { kDone = 0, kNoMemory = 1, kOutOfRange = 2, kClustered = 3 };
constexpr int32_t kInterface = 5;

}
