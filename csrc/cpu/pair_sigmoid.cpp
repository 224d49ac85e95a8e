// The sigmoid loss of aligned pairs, from features to gradients in one sweep: a pair's weight
// depends on nothing but its own score, so it is formed where the score is.
#include <utility>

#include "accumulate.h"

namespace fastcl::cpu {
namespace {

// fp32 rows in which a gradient is formed: its own where they are, null where it is not wanted.
float* rows_of(const Output& out, i64 size, Arena& arena) {
  if (!out.data || out.storage == Storage::f32) return static_cast<float*>(out.data);
  return arena.get<float>(size);
}

}  // namespace

void pair_sigmoid(PairSigmoid p) {
  if (!p.grad_a.data) {  // the loss is the same with sides exchanged, and one side alone is the rows'
    std::swap(p.a, p.b);
    std::swap(p.grad_a, p.grad_b);
  }
  const i64 n = p.a.rows, dim = p.a.dim;
  Arena arena;
  float* unit = arena.get<float>(2 * n * dim);
  float *cosines = arena.get<float>(n), *inverse = arena.get<float>(2 * n);
  normalize_pair(p.kernels, p.pool, p.a, p.b, p.eps, unit, cosines, inverse);

  Problem s{};
  s.queries = {unit, n, dim, dim, Storage::f32};
  s.keys = {unit + n * dim, n, dim, dim, Storage::f32};
  s.scale = p.scale;
  s.skips = 1;  // partners: they stay out of the sweep
  s.kernels = p.kernels, s.pool = p.pool;
  const Prepared prepared(s, arena, Units::log2, -p.bias, p.grad_b.data != nullptr);
  const double share = p.mean ? 1.0 / n : 1.0;
  Totals totals;
  Gradient g{kWeightSigmoid};
  g.factor = share;
  g.queries = rows_of(p.grad_a, n * dim, arena), g.keys = rows_of(p.grad_b, n * dim, arena);
  g.totals = &totals;
  gradient(prepared, arena, g);

  float* pull = arena.get<float>(n);
  for (i64 i = 0; i < n; ++i) {
    double sigmoid;
    totals.phi += softplus(-((double)p.scale * cosines[i] + p.bias), sigmoid);
    totals.weights -= sigmoid;
    totals.moments -= sigmoid * cosines[i];
    pull[i] = (float)(-share * p.scale * sigmoid);
  }
  *p.loss = (float)(share * totals.phi);
  if (p.grad_scale) *p.grad_scale = (float)(share * totals.moments);
  if (p.grad_bias) *p.grad_bias = (float)(share * totals.weights);
  const Matrix grad_a{g.queries, n, dim, dim, Storage::f32};
  const Matrix grad_b{g.keys, n, dim, dim, Storage::f32};
  normalize_pair_backward(p.kernels, p.pool, grad_a, grad_b, pull, unit, inverse, p.eps, p.grad_a,
                          p.grad_b);
}

}  // namespace fastcl::cpu
