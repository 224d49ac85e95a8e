// Losses from features to gradients in one call, composed of the operators there are.
#include <algorithm>
#include <numeric>

#include "prepare.h"

namespace fastcl::cpu {
namespace {

constexpr double kUnitSquare = 1.01;  // no unit row is longer, squared: bf16 adds up to 2^-7
constexpr i64 kPairGrain = 64;        // pairs per task of the closing arithmetic: 3 microseconds

// softplus(gap) of one row; its derivative times `share` is what the row's negatives gain.
double row_loss(double gap, double share, float& gain) {
  double sigmoid;
  const double value = softplus(gap, sigmoid);
  gain = (float)(share * sigmoid);
  return value;
}

}  // namespace

void pair_softmax(const PairSoftmax& p) {
  const i64 n = p.a.rows, dim = p.a.dim;
  const bool views = p.form == PairSoftmax::views, both = p.form == PairSoftmax::both;
  Arena arena;
  float* unit = arena.get<float>(2 * n * dim);
  float *cosines = arena.get<float>(n), *inverse = arena.get<float>(2 * n);
  normalize_pair(p.kernels, p.pool, p.a, p.b, p.eps, unit, cosines, inverse);

  Problem s{};
  s.queries = {unit, views ? 2 * n : n, dim, dim, Storage::f32};
  s.keys = views ? s.queries : Matrix{unit + n * dim, n, dim, dim, Storage::f32};
  s.symmetric = views;
  s.scale = p.scale;
  s.skips = views ? 3 : 1;  // a row itself and its partner
  s.skip[0] = 0, s.skip[1] = n, s.skip[2] = -n;
  s.kernels = p.kernels, s.pool = p.pool;

  const bool for_a = p.grad_a.data, for_b = p.grad_b.data;
  const bool gradients = for_a || for_b || p.grad_scale;
  LogSumExp sums{};
  float offset;
  sums.offset = &offset;
  sums.rows = arena.get<double>(s.queries.rows);
  sums.columns = both ? arena.get<double>(n) : nullptr;
  sums.exponentials =
      gradients && p.keep ? arena.get<float>(s.queries.rows * s.keys.rows) : nullptr;
  logsumexp(s, sums, kUnitSquare * std::fabs((double)p.scale));

  const double share = 1.0 / (p.mean ? s.queries.rows : 1) / (both ? 2 : 1);
  float* gain = arena.get<float>(s.queries.rows);
  float* gain_columns = both ? arena.get<float>(n) : nullptr;
  double *losses = arena.get<double>(n), *lost = arena.get<double>(n);  // of each pair
  parallel_ranges(p.pool, n, kPairGrain, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const double positive = (double)p.scale * cosines[i];
      losses[i] = row_loss(sums.rows[i] - positive, share, gain[i]);
      lost[i] = -gain[i];
      if (p.form == PairSoftmax::rows) continue;
      float& other = views ? gain[n + i] : gain_columns[i];
      losses[i] += row_loss((views ? sums.rows[n + i] : sums.columns[i]) - positive, share, other);
      lost[i] -= other;
    }
  });
  *p.loss = (float)(share * std::accumulate(losses, losses + n, 0.0));
  if (!gradients) return;

  float* grad = arena.get<float>(2 * n * dim);
  LogSumExpGradient g{};
  g.grad_rows = gain, g.grad_columns = gain_columns;
  g.rows = sums.rows, g.columns = sums.columns;
  g.offset = offset, g.exponentials = sums.exponentials;
  g.queries = for_a || (views && for_b) ? grad : nullptr;
  g.keys = for_b && !views ? grad + n * dim : nullptr;
  double grad_scale = 0;
  g.scale = p.grad_scale ? &grad_scale : nullptr;
  logsumexp_backward(s, g);

  float* pull = arena.get<float>(n);
  for (i64 i = 0; i < n; ++i) {
    grad_scale += lost[i] * cosines[i];
    pull[i] = (float)(lost[i] * p.scale);
  }
  if (p.grad_scale) *p.grad_scale = (float)grad_scale;
  const Matrix grad_a{grad, n, dim, dim, Storage::f32};
  const Matrix grad_b{grad + n * dim, n, dim, dim, Storage::f32};
  normalize_pair_backward(p.kernels, p.pool, grad_a, grad_b, pull, unit, inverse, p.eps, p.grad_a,
                          p.grad_b);
}

}  // namespace fastcl::cpu
