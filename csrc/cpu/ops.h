// The operators on plain pointers. Torch-free: threads come from the caller.
#pragma once
#include <atomic>
#include <string>

#include "blocks.h"

namespace fastcl::cpu {

// A thread pool: runs fn(context) on up to `workers` threads at once and waits.
struct Pool {
  int threads;
  void (*run)(i64 workers, void (*fn)(void* context), void* context);
};

// Runs body(task) for each task. Tasks are handed out as threads become free: every task writes
// places of its own, so results depend neither on who runs what nor on the number of threads.
template <class Body>
void parallel(const Pool& pool, i64 tasks, const Body& body) {
  if (tasks <= 1 || pool.threads <= 1) {
    for (i64 t = 0; t < tasks; ++t) body(t);
    return;
  }
  std::atomic<i64> next{0};
  auto worker = [&] {
    for (i64 t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(t);
  };
  pool.run(
      tasks < pool.threads ? tasks : pool.threads,
      [](void* context) { (*static_cast<decltype(worker)*>(context))(); }, &worker);
}

// The same over ranges of at most `grain` items: body(begin, end).
template <class Body>
void parallel_ranges(const Pool& pool, i64 items, i64 grain, const Body& body) {
  parallel(pool, (items + grain - 1) / grain,
           [&](i64 t) { body(t * grain, (t + 1) * grain < items ? (t + 1) * grain : items); });
}

inline bool same_matrix(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.rows == b.rows && a.stride == b.stride && a.storage == b.storage;
}

// Scores s_ij = scale <q_i, k_j> + key_bias_j over the pairs a rule keeps.
struct Problem {
  Matrix queries, keys;  // the same matrix when symmetric
  bool symmetric;        // scores and rule are: one triangle suffices
  float scale;
  const float* key_bias;  // may be null
  Relation relation;
  const i64 *query_ids, *key_ids;  // null unless there is a relation
  int skips;
  i64 skip[kMaxSkips];
  const Kernels* kernels;
  Pool pool;
};

// The tables for fp32 and bf16 products on this machine, or below it where FASTCL_CPU_ISA says so.
// Throws std::runtime_error for a name that is unknown or not supported here.
struct Isa {
  std::string name;
  const Kernels *f32, *bf16;
};
const Isa& isa();
void set_isa(const char* name);  // null: the best; for tests
std::string supported_isas();

// Outputs may be null where not wanted. The logarithms are fp64: rounded to fp32 they would change
// every weight of their row by up to 2^-24 times their own size.
struct LogSumExp {
  double *rows, *columns;
  float *row_max, *column_max;
  float* exponentials;  // [N, M]; symmetric: panels left of the diagonal stay untouched
  float* mean_keys;     // [N, D]; excludes columns, maxima and exponentials
  float* offset;
};
void logsumexp(const Problem&, const LogSumExp&);
void logsumexp(const Problem&, const LogSumExp&, double bound);  // no |s_ij| is larger

struct LogSumExpGradient {
  const float *grad_rows, *grad_columns;  // the latter may be null
  const double *rows, *columns;
  float offset;                // NaN: the forward used maxima
  const float* exponentials;   // null: recompute
  float *queries, *keys, *key_bias;  // outputs, null where not wanted
  double* scale;
};
void logsumexp_backward(const Problem&, const LogSumExpGradient&);

enum class Phi : int { softplus = 0, relu = 1, relu_squared = 2 };
void sum(const Problem&, Phi, const float* row_bias, float* rows);

struct SumGradient {
  Phi phi;
  const float *grad_rows, *row_bias;
  float *queries, *keys, *key_bias, *row_bias_grad;
  double* scale;
};
void sum_backward(const Problem&, const SumGradient&);

void topk(const Problem&, i64 k, const float* below, i64* indices, float* values);

void normalize(const Kernels*, const Pool&, const Matrix& x, float eps, float* y, float* inverse);
void normalize_backward(const Kernels*, const Pool&, const Matrix& grad, const float* y,
                        const float* inverse, float eps, const Output& dx);

// Two aligned batches: unit rows of a, then of b, and the cosine of each pair. An infinite eps,
// here and in the gradient, leaves rows as they are.
void normalize_pair(const Kernels*, const Pool&, const Matrix& a, const Matrix& b, float eps,
                    float* rows, float* cosines, float* inverse);
// da or db may be null, or what was given for it.
void normalize_pair_backward(const Kernels*, const Pool&, const Matrix& grad_a,
                             const Matrix& grad_b, const float* grad_cosines, const float* rows,
                             const float* inverse, float eps, const Output& da, const Output& db);

// A whole loss of aligned batches a and b (fastcl/ops/fused.py); an infinite eps, for the sigmoid
// alone, takes rows as they are.
struct PairLoss {
  Matrix a, b;
  bool mean;
  float scale, eps;
  const Kernels* kernels;
  Pool pool;
  float *loss, *grad_scale;  // gradients null where not wanted
  Output grad_a, grad_b;
};

// Each row finds its partner among negatives.
struct PairSoftmax : PairLoss {
  enum Form { views, rows, both } form;
  bool keep;  // the exponentials, from the forward to the gradient
};
void pair_softmax(const PairSoftmax&);

// Each pair of rows is told to belong together or not.
struct PairSigmoid : PairLoss {
  float bias;
  float* grad_bias;
};
void pair_sigmoid(PairSigmoid);

}  // namespace fastcl::cpu
