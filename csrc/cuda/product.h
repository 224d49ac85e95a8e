// Weights of similarities times the other rows: plain C++ between the kernels and their binding.
#pragma once
#include "pairing.h"

namespace fastcl::cuda {

// From gradients g of log-sum-exps L to what weights are made of. `unit` is near the largest |g|,
// so that weights of 16 bits use their range.
//
//     gain = g / unit     shift = L / ln 2     ratio = gain 2^(offset / ln 2 - shift)
//
// Each [padded(count)]. Past the end, where the log-sum-exp is -inf, and on a side without gradient
// (null), gain and ratio are 0, and so is any 2^-shift.
struct Side {
  const float* gradient;
  const float* logsum;
  int64_t count;
  float *gain, *shift, *ratio;
};
struct Gains {
  Side sides[2];
  const float* scale;
  const float* offset;  // of logsumexp(), NaN where it may not be relied on
  float* unit;          // [2]: unit, and unit times the scale
};
inline int64_t padded(int64_t count) { return (count + 127) / 128 * 128; }
const char* gains(const Gains& call, void* stream);

// out_i = factor sum_j w_ij other_j, with w_ij = 2^(t_ij - offset) (ratio_i + ratio_j), or, where
// the offset is NaN, gain_i 2^(t_ij - shift_i) + gain_j 2^(t_ij - shift_j); t is the score / ln 2.
struct Product {
  Pairing pairing;
  Side own, other;      // gains() has been there
  const float* offset;
  const float* factor;  // []
  float* workspace;     // [product_workspace(pairing)]
  float* out;           // [N, d]
};
int64_t product_workspace(const Pairing& pairing);
const char* product(const Product& call, void* stream);

// Log-sum-exp of every own row over the other rows, and their softmax-weighted mean, from one
// sweep. bf16 only: fp16 cannot hold an exponential that is not normalised yet.
struct Mean {
  Pairing pairing;
  float* workspace;  // [mean_workspace(pairing)]
  float* logsum;     // [N]
  float* mean;       // [N, d]
  float* offset;     // []
};
int64_t mean_workspace(const Pairing& pairing);
const char* mean(const Mean& call, void* stream);

}  // namespace fastcl::cuda
