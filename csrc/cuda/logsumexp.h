// Log-sum-exp of similarities: plain C++ between the kernels and their binding.
#pragma once
#include "pairing.h"

namespace fastcl::cuda {

// rows_i = log sum_j exp(s_ij) over the pairs kept, -inf where there are none; columns_j likewise
// over i.
struct LogSumExp {
  Pairing pairing;   // own rows are queries, other rows keys
  bool symmetric;    // the keys are the queries, and with an offset its negative is skipped too
  float* workspace;  // [logsumexp_workspace(call)]
  float* rows;       // [N]
  float* columns;    // [M], or null; null where symmetric
  float* offset;     // [], the exponents' offset; NaN where a sum left its range
};

// How many numbers it takes, on the current device; 0 where the problem is refused.
int64_t logsumexp_workspace(const LogSumExp& call);
// Null, or why it was refused or could not be launched.
const char* logsumexp(const LogSumExp& call, void* stream);

}  // namespace fastcl::cuda
