// Weighted sums of keys and queries: the gradients, and the softmax mean of a queue.
#pragma once
#include "prepare.h"

namespace fastcl::cpu {

// out_i = sum_j p_ij k_j and rows_i = log sum_j exp2(x_ij), p the softmax; x without the problem's
// offset, and with row_shift (log2 units) added when given.
void mean_keys(const Prepared&, Arena&, const float* row_shift, float* out, double* rows);

// Sums over all pairs.
struct Totals {
  double phi = 0, weights = 0, moments = 0;  // softplus(x), W and W <q, k>
  void operator+=(const Totals& t) { phi += t.phi, weights += t.weights, moments += t.moments; }
};

// Gradients of one sweep. Outputs are null where not wanted; `factor` multiplies all of them, the
// scale further multiplies those of queries and keys.
struct Gradient {
  WeightKind kind;
  const float *u = nullptr, *v = nullptr;                      // padded
  const float *row_shift = nullptr, *col_shift2 = nullptr;     // padded
  const float* exponentials = nullptr;
  double factor = 1;
  float *queries = nullptr, *keys = nullptr;
  double* scale = nullptr;
  float *row_bias = nullptr, *key_bias = nullptr;
  Totals* totals = nullptr;  // of kWeightSigmoid, without `factor`
};
void gradient(const Prepared&, Arena&, const Gradient&);

}  // namespace fastcl::cpu
