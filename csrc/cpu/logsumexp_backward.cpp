// Gradient of rows and columns: W_ij = g_i exp(s_ij - row_i) + h_j exp(s_ij - column_j).
//
// With the forward's offset c both terms share one exponential, exp(s_ij - c) (u_i + v_j), where
// u_i = g_i exp(c - row_i). Upstream gradients may be tiny (1e-19) where the loss is small, and
// exp(c - row) as small as 2^-124, so g is first brought near 2^kHeadroom by a power of two.
#include <algorithm>

#include "accumulate.h"

namespace fastcl::cpu {
namespace {

constexpr int kHeadroom = 20;

float largest(const float* g, i64 n, float so_far) {
  for (i64 i = 0; i < n; ++i) so_far = std::max(so_far, std::fabs(g[i]));
  return so_far;
}

// u_i = 2^exponent g_i exp(offset - sum_i), or without the exponential when maxima were used.
float* side_weights(const Prepared& p, Arena& arena, const float* g, const double* sums, i64 n,
                    int exponent, float offset) {
  float* u = padded_floats(p.k, arena, n);
  if (!g) {
    std::fill(u, u + n, 0.0f);
    return u;
  }
  const bool exact = std::isnan(offset);
  for (i64 i = 0; i < n; ++i) {
    const bool empty = sums[i] == -INFINITY;
    const double exponential = exact ? 1.0 : std::exp(offset - sums[i]);
    u[i] = empty ? 0.0f : (float)(std::ldexp((double)g[i], exponent) * exponential);
  }
  return u;
}

float* negated_sums(const Prepared& p, Arena& arena, const double* sums, i64 n) {
  float* shift = padded_floats(p.k, arena, n);
  for (i64 i = 0; i < n; ++i)
    shift[i] = sums[i] == -INFINITY ? 0.0f : (float)(-sums[i] * kLog2e);
  return shift;
}

}  // namespace

void logsumexp_backward(const Problem& problem, const LogSumExpGradient& out) {
  Arena arena;
  const bool exact = std::isnan(out.offset);
  const float* saved = exact ? nullptr : out.exponentials;
  const Prepared p(problem, arena, Units::log2, exact ? 0.0f : out.offset,
                   out.keys != nullptr, saved == nullptr);
  float size = largest(out.grad_rows, p.n, 0.0f);
  if (out.grad_columns) size = largest(out.grad_columns, p.m, size);
  const int exponent = size > 0 && std::isfinite(size) ? kHeadroom - std::ilogb(size) : 0;
  const double* rows = out.rows;
  const double* columns = problem.symmetric ? out.rows : out.columns;
  const float* grad_columns = problem.symmetric ? out.grad_rows : out.grad_columns;
  Gradient g{};
  g.kind = exact ? kWeightExact : saved ? kWeightSaved : kWeightExp;
  g.u = side_weights(p, arena, out.grad_rows, rows, p.n, exponent, out.offset);
  g.v = problem.symmetric
            ? g.u
            : side_weights(p, arena, grad_columns, columns, p.m, exponent, out.offset);
  if (exact) g.row_shift = negated_sums(p, arena, rows, p.n);
  if (exact && grad_columns)
    g.col_shift2 = problem.symmetric ? g.row_shift : negated_sums(p, arena, columns, p.m);
  g.exponentials = saved;
  g.factor = std::ldexp(1.0, -exponent);
  g.queries = out.queries, g.keys = out.keys, g.scale = out.scale, g.key_bias = out.key_bias;
  gradient(p, arena, g);
}

}  // namespace fastcl::cpu
