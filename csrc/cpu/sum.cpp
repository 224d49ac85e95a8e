// Sums of phi(score + row_bias) and their gradient, on the same tiles as the log-sum-exp.
#include <algorithm>

#include "accumulate.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

constexpr Mode kModeOf[] = {kSoftplus, kRelu, kReluSquared};
constexpr WeightKind kWeightOf[] = {kWeightSoftplus, kWeightRelu, kWeightReluSquared};

float* biases(const Prepared& p, Arena& arena, const float* row_bias) {
  float* shift = padded_floats(p.k, arena, p.n);
  if (row_bias) std::copy(row_bias, row_bias + p.n, shift);
  else std::fill(shift, shift + p.n, 0.0f);
  return shift;
}

}  // namespace

void sum(const Problem& problem, Phi phi, const float* row_bias, float* rows) {
  Arena arena;
  const Prepared p(problem, arena, Units::natural, 0.0f, false);
  const Slots s =
      sweep(p, arena, {kModeOf[(int)phi], biases(p, arena, row_bias)}).sums;
  for (i64 i = 0; i < p.n; ++i) rows[i] = (float)add_slots(s.rows, s.row_slots, p.n, i);
}

void sum_backward(const Problem& problem, const SumGradient& out) {
  Arena arena;
  const Prepared p(problem, arena, Units::natural, 0.0f, out.keys != nullptr);
  float size = 0;
  for (i64 i = 0; i < p.n; ++i) size = std::max(size, std::fabs(out.grad_rows[i]));
  const int exponent = size > 0 && std::isfinite(size) ? -std::ilogb(size) : 0;
  float* u = padded_floats(p.k, arena, p.n);
  for (i64 i = 0; i < p.n; ++i) u[i] = (float)std::ldexp((double)out.grad_rows[i], exponent);
  float* v = u;
  if (!problem.symmetric) {
    v = padded_floats(p.k, arena, p.m);
    std::fill(v, v + p.m, 0.0f);
  }
  Gradient g{kWeightOf[(int)out.phi], u, v, biases(p, arena, out.row_bias)};
  g.factor = std::ldexp(1.0, -exponent);
  g.queries = out.queries, g.keys = out.keys, g.scale = out.scale;
  g.key_bias = out.key_bias, g.row_bias = out.row_bias_grad;
  gradient(p, arena, g);
}

}  // namespace fastcl::cpu
