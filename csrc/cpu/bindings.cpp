// Stable-ABI binding of the CPU kernels: checks, allocation, pointers. The schemas are defined in
// fastcl/ops/cpu.py; only torch/csrc/stable and torch/headeronly may be included here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "ops.h"

namespace {

using fastcl::cpu::i64;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
namespace kernels = fastcl::cpu;

// Products and sums below this many multiplications are not worth waking other threads (about
// 10 microseconds of one core).
constexpr double kSerialWork = 1 << 20;

void run_workers(i64 workers, void (*fn)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](i64 begin, i64 end) {
    for (i64 w = begin; w < end; ++w) fn(context);
  });
}

kernels::Pool pool_for(double work) {
  return {work < kSerialWork ? 1 : (int)torch::stable::get_num_threads(), run_workers};
}

Tensor empty(std::initializer_list<i64> shape, ScalarType dtype = ScalarType::Float) {
  const std::vector<i64> sizes(shape);
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor feature_contiguous(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

kernels::Matrix matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, name, " must be a CPU matrix");
  STD_TORCH_CHECK(x.size(0) > 0 && x.size(1) > 0, name, " must not be empty");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16 for the compiled CPU backend");
  const kernels::Storage storage = dtype == ScalarType::Float      ? kernels::Storage::f32
                                   : dtype == ScalarType::BFloat16 ? kernels::Storage::bf16
                                                                   : kernels::Storage::f16;
  return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), storage};
}

float number(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1 && t.scalar_type() == ScalarType::Float, name,
                  " must be one float32 number on the CPU");
  return *static_cast<const float*>(t.const_data_ptr());
}

// A contiguous vector of the right type and length, kept alive beside its pointer.
template <class T>
class Vector {
 public:
  Vector(const OptionalTensor& t, i64 size, const char* name) {
    if (!t) return;
    constexpr ScalarType dtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long;
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == dtype && t->numel() == size, name,
                    " must hold ", size, std::is_same_v<T, float> ? " float32" : " int64", " values on the CPU");
    tensor_ = dense(*t);
    data_ = static_cast<const T*>(tensor_->const_data_ptr());
  }
  operator const T*() const { return data_; }

 private:
  OptionalTensor tensor_;
  const T* data_ = nullptr;
};

// The operands that every operator has in common.
class Call {
 public:
  Call(const Tensor& queries, const OptionalTensor& keys, const Tensor& scale,
       const OptionalTensor& key_bias, const OptionalTensor& query_ids,
       const OptionalTensor& key_ids, i64 relation, const std::vector<i64>& skip, bool bf16,
       bool row_terms = false)
      : queries_(feature_contiguous(queries)), keys_(keys ? feature_contiguous(*keys) : queries_),
        key_bias_(key_bias, keys_.size(0), "key_bias"),
        query_ids_(query_ids, queries_.size(0), "query_ids"),
        key_ids_(key_ids ? key_ids : keys ? key_ids : query_ids, keys_.size(0), "key_ids") {
    problem.queries = matrix(queries_, "queries");
    problem.keys = matrix(keys_, "keys");
    STD_TORCH_CHECK(problem.queries.dim == problem.keys.dim, "queries have ", problem.queries.dim,
                    " features, keys ", problem.keys.dim);
    problem.scale = number(scale, "scale");
    problem.key_bias = key_bias_;
    STD_TORCH_CHECK(relation >= 0 && relation <= 2, "relation must be 0, 1 or 2");
    problem.relation = (kernels::Relation)relation;
    problem.query_ids = query_ids_, problem.key_ids = key_ids_;
    STD_TORCH_CHECK(relation == 0 || (problem.query_ids && problem.key_ids),
                    "a relation needs query_ids and key_ids");
    STD_TORCH_CHECK(skip.size() <= kernels::kMaxSkips, "at most ", kernels::kMaxSkips,
                    " offsets can be skipped, got ", skip.size());
    problem.skips = (int)skip.size();
    std::copy(skip.begin(), skip.end(), problem.skip);
    const bool closed = std::all_of(skip.begin(), skip.end(), [&](i64 s) {
      return std::find(skip.begin(), skip.end(), -s) != skip.end();
    });
    problem.symmetric = !keys && !key_bias && !key_ids && !row_terms && closed;
    problem.kernels = bf16 ? kernels::isa().bf16 : kernels::isa().f32;
    problem.pool = pool_for((double)n() * m() * d());
  }
  i64 n() const { return problem.queries.rows; }
  i64 m() const { return problem.keys.rows; }
  i64 d() const { return problem.queries.dim; }

  kernels::Problem problem;

 private:
  Tensor queries_, keys_;
  Vector<float> key_bias_;
  Vector<i64> query_ids_, key_ids_;
};

kernels::Output output(Tensor& t) {
  const bool bf16 = t.scalar_type() == ScalarType::BFloat16;
  return {t.numel() ? t.mutable_data_ptr() : nullptr,
          bf16 ? kernels::Storage::bf16 : kernels::Storage::f32};
}

float* data(Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

enum Save { kNothing = 0, kMeanKeys = 1, kExponentials = 2 };

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six logsumexp(const Tensor& queries, const OptionalTensor& keys, const Tensor& scale,
              const OptionalTensor& key_bias, const OptionalTensor& query_ids,
              const OptionalTensor& key_ids, i64 relation, std::vector<i64> skip, bool columns,
              bool maxima, i64 save, bool bf16) {
  const Call call(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, bf16);
  STD_TORCH_CHECK(save != kMeanKeys || (keys && !columns),
                  "mean_keys can be saved for rows over given keys only");
  Tensor rows = empty({call.n()}), column_sums = empty({columns ? call.m() : 0});
  Tensor row_max = empty({maxima ? call.n() : 0});
  Tensor column_max = empty({maxima && columns ? call.m() : 0});
  Tensor saved = save == kMeanKeys       ? empty({call.n(), call.d()})
                 : save == kExponentials ? empty({call.n(), call.m()})
                                         : empty({0});
  Tensor offset = empty({});
  std::vector<double> exact_rows(call.n()), exact_columns(columns ? call.m() : 0);
  kernels::LogSumExp out{};
  out.rows = exact_rows.data(), out.columns = columns ? exact_columns.data() : nullptr;
  out.row_max = data(row_max), out.column_max = data(column_max);
  (save == kMeanKeys ? out.mean_keys : out.exponentials) = data(saved);
  out.offset = data(offset);
  kernels::logsumexp(call.problem, out);
  std::copy(exact_rows.begin(), exact_rows.end(), data(rows));
  if (columns) std::copy(exact_columns.begin(), exact_columns.end(), data(column_sums));
  return {rows, column_sums, row_max, column_max, saved, offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logsumexp_backward(
    const Tensor& grad_rows, const OptionalTensor& grad_columns, const Tensor& queries,
    const OptionalTensor& keys, const Tensor& scale, const OptionalTensor& key_bias,
    const OptionalTensor& query_ids, const OptionalTensor& key_ids, i64 relation,
    std::vector<i64> skip, const Tensor& rows, const Tensor& columns, const Tensor& saved,
    const Tensor& offset, i64 save, std::vector<bool> needs, bool bf16) {
  const Call call(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, bf16);
  STD_TORCH_CHECK(needs.size() == 4, "needs must have 4 entries");
  STD_TORCH_CHECK(call.problem.symmetric || keys, "keys must be given unless scores are symmetric");
  const Vector<float> row_gradients(grad_rows, call.n(), "grad_rows");
  const Vector<float> row_sums(rows, call.n(), "rows");
  const Vector<float> column_gradients(grad_columns, call.m(), "grad_columns");
  const Vector<float> column_sums(grad_columns ? OptionalTensor(columns) : std::nullopt, call.m(),
                                  "columns");
  Tensor dq = needs[0] ? empty({call.n(), call.d()}) : empty({0});
  Tensor dk = needs[1] && keys ? empty({call.m(), call.d()}) : empty({0});
  Tensor dscale = needs[2] ? empty({}) : empty({0});
  Tensor dbias = needs[3] && key_bias ? empty({call.m()}) : empty({0});
  const auto widened = [](const float* values, i64 size) {
    return values ? std::vector<double>(values, values + size) : std::vector<double>();
  };
  const std::vector<double> wide_rows = widened(row_sums, call.n());
  const std::vector<double> wide_columns = widened(column_sums, call.m());
  double scale_sum = 0;
  kernels::LogSumExpGradient g{};
  g.grad_rows = row_gradients, g.grad_columns = column_gradients;
  g.rows = wide_rows.data(), g.columns = wide_columns.data();
  g.offset = *static_cast<const float*>(offset.const_data_ptr());
  const Vector<float> exponentials(save == kExponentials ? OptionalTensor(saved) : std::nullopt,
                                   call.n() * call.m(), "saved");
  g.exponentials = exponentials;
  g.queries = data(dq), g.keys = data(dk), g.key_bias = data(dbias);
  g.scale = needs[2] ? &scale_sum : nullptr;
  kernels::logsumexp_backward(call.problem, g);
  if (needs[2]) *data(dscale) = (float)scale_sum;
  return {dq, dk, dscale, dbias};
}

Tensor sum(const Tensor& queries, const OptionalTensor& keys, const Tensor& scale,
           const OptionalTensor& key_bias, const OptionalTensor& row_bias,
           const OptionalTensor& query_ids, const OptionalTensor& key_ids, i64 relation,
           std::vector<i64> skip, i64 phi, bool bf16) {
  const Call call(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, bf16,
                  row_bias.has_value());
  STD_TORCH_CHECK(phi >= 0 && phi <= 2, "phi must be 0, 1 or 2");
  const Vector<float> bias(row_bias, call.n(), "row_bias");
  Tensor rows = empty({call.n()});
  kernels::sum(call.problem, (kernels::Phi)phi, bias, data(rows));
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sum_backward(
    const Tensor& grad_rows, const Tensor& queries, const OptionalTensor& keys, const Tensor& scale,
    const OptionalTensor& key_bias, const OptionalTensor& row_bias, const OptionalTensor& query_ids,
    const OptionalTensor& key_ids, i64 relation, std::vector<i64> skip, i64 phi,
    std::vector<bool> needs, bool bf16) {
  const Call call(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, bf16,
                  row_bias.has_value());
  STD_TORCH_CHECK(needs.size() == 5, "needs must have 5 entries");
  STD_TORCH_CHECK(phi >= 0 && phi <= 2, "phi must be 0, 1 or 2");
  const Vector<float> gradients(grad_rows, call.n(), "grad_rows");
  const Vector<float> bias(row_bias, call.n(), "row_bias");
  // queries that are their own keys, without symmetry: both sides are formed and added
  const bool fold = !keys && !call.problem.symmetric && needs[0];
  Tensor dq = needs[0] ? empty({call.n(), call.d()}) : empty({0});
  Tensor dk = fold || (needs[1] && keys) ? empty({call.m(), call.d()}) : empty({0});
  Tensor dscale = needs[2] ? empty({}) : empty({0});
  Tensor dkey_bias = needs[3] && key_bias ? empty({call.m()}) : empty({0});
  Tensor drow_bias = needs[4] && row_bias ? empty({call.n()}) : empty({0});
  kernels::SumGradient g{};
  g.phi = (kernels::Phi)phi;
  g.grad_rows = gradients, g.row_bias = bias;
  double scale_sum = 0;
  g.queries = data(dq), g.keys = data(dk), g.scale = needs[2] ? &scale_sum : nullptr;
  g.key_bias = data(dkey_bias), g.row_bias_grad = data(drow_bias);
  kernels::sum_backward(call.problem, g);
  if (needs[2]) *data(dscale) = (float)scale_sum;
  if (fold) {
    dq = torch::stable::subtract(dq, dk, -1.0);
    dk = empty({0});
  }
  return {dq, dk, dscale, dkey_bias, drow_bias};
}

std::tuple<Tensor, Tensor> topk(const Tensor& queries, const OptionalTensor& keys,
                                const Tensor& scale, const OptionalTensor& key_bias,
                                const OptionalTensor& query_ids, const OptionalTensor& key_ids,
                                i64 relation, std::vector<i64> skip, i64 k,
                                const OptionalTensor& below, bool bf16) {
  const Call call(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, bf16);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const Vector<float> limit(below, call.n(), "below");
  Tensor indices = empty({call.n(), k}, ScalarType::Long), values = empty({call.n(), k});
  kernels::topk(call.problem, k, limit, static_cast<i64*>(indices.mutable_data_ptr()),
                data(values));
  return {indices, values};
}

std::tuple<Tensor, Tensor> l2_normalize(const Tensor& input, double eps) {
  const Tensor x = feature_contiguous(input);
  const kernels::Matrix m = matrix(x, "x");
  Tensor y = empty({m.rows, m.dim}), inverse = empty({m.rows});
  kernels::normalize(kernels::isa().f32, pool_for((double)m.rows * m.dim), m, (float)eps, data(y),
                     data(inverse));
  return {y, inverse};
}

Tensor l2_normalize_backward(const Tensor& grad, const Tensor& y, const Tensor& inverse, double eps,
                             bool bf16) {
  const Tensor g = feature_contiguous(grad);
  const kernels::Matrix m = matrix(g, "grad");
  const Vector<float> unit(y, m.rows * m.dim, "y"), factor(inverse, m.rows, "inverse");
  Tensor dx = empty({m.rows, m.dim}, bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  kernels::normalize_backward(kernels::isa().f32, pool_for((double)m.rows * m.dim), m, unit, factor,
                              (float)eps, output(dx));
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> l2_normalize_pair(const Tensor& a, const Tensor& b, double eps) {
  const Tensor first = feature_contiguous(a), second = feature_contiguous(b);
  const kernels::Matrix ma = matrix(first, "a"), mb = matrix(second, "b");
  STD_TORCH_CHECK(ma.rows == mb.rows && ma.dim == mb.dim, "a and b must have one shape");
  Tensor rows = empty({2 * ma.rows, ma.dim}), cosines = empty({ma.rows});
  Tensor inverse = empty({2 * ma.rows});
  kernels::normalize_pair(kernels::isa().f32, pool_for(2.0 * ma.rows * ma.dim), ma, mb, (float)eps,
                          data(rows), data(cosines), data(inverse));
  return {rows, cosines, inverse};
}

std::tuple<Tensor, Tensor> l2_normalize_pair_backward(const Tensor& grad_rows,
                                                      const Tensor& grad_cosines,
                                                      const Tensor& rows, const Tensor& inverse,
                                                      double eps, bool bf16_a, bool bf16_b) {
  const Tensor g = dense(grad_rows);
  const kernels::Matrix m = matrix(g, "grad_rows");
  STD_TORCH_CHECK(m.storage == kernels::Storage::f32 && m.rows % 2 == 0,
                  "grad_rows must be float32 with an even number of rows");
  const i64 n = m.rows / 2;
  const Vector<float> unit(rows, m.rows * m.dim, "rows"), factor(inverse, m.rows, "inverse"),
      pull(grad_cosines, n, "grad_cosines");
  const auto gradient = [&](bool bf16) {
    return empty({n, m.dim}, bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  };
  Tensor da = gradient(bf16_a), db = gradient(bf16_b);
  kernels::Matrix of_a = m, of_b = m;
  of_a.rows = of_b.rows = n;
  of_b.data = static_cast<const float*>(m.data) + n * m.stride;
  kernels::normalize_pair_backward(kernels::isa().f32, pool_for(2.0 * m.rows * m.dim), of_a, of_b,
                                   pull, unit, factor, (float)eps, output(da), output(db));
  return {da, db};
}

// What losses of aligned pairs have in common.
template <class Loss>
struct PairCall {
  PairCall(const Tensor& a, const Tensor& b, const Tensor& scale, bool mean, double eps,
           const std::vector<bool>& needs, size_t inputs, bool bf16)
      : first(feature_contiguous(a)), second(feature_contiguous(b)), loss(empty({})) {
    p.a = matrix(first, "a"), p.b = matrix(second, "b");
    STD_TORCH_CHECK(p.a.rows == p.b.rows && p.a.dim == p.b.dim, "a and b must have one shape");
    STD_TORCH_CHECK(needs.size() == inputs, "needs must have ", inputs, " entries");
    p.mean = mean, p.scale = number(scale, "scale"), p.eps = (float)eps;
    p.kernels = bf16 ? kernels::isa().bf16 : kernels::isa().f32;
    p.pool = pool_for((double)p.a.rows * p.a.rows * p.a.dim);
    for (size_t i = 0; i < inputs; ++i) {
      const ScalarType dtype = i < 2 ? gradient_dtype(i ? b : a) : ScalarType::Float;
      gradients.push_back(!needs[i] ? empty({0}, dtype)
                          : i < 2   ? empty({p.a.rows, p.a.dim}, dtype)
                                    : empty({}));
    }
    p.loss = data(loss), p.grad_a = output(gradients[0]), p.grad_b = output(gradients[1]);
    p.grad_scale = data(gradients[2]);
  }
  static ScalarType gradient_dtype(const Tensor& x) {  // stored_gradient in fastcl/ops/registry.py
    return x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  }
  Tensor first, second, loss;
  std::vector<Tensor> gradients;
  Loss p{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(const Tensor& a, const Tensor& b,
                                                        const Tensor& scale, i64 form, bool mean,
                                                        double eps, std::vector<bool> needs,
                                                        bool keep, bool bf16) {
  PairCall<kernels::PairSoftmax> call(a, b, scale, mean, eps, needs, 3, bf16);
  STD_TORCH_CHECK(form >= 0 && form <= 2, "form must be 0, 1 or 2");
  call.p.form = (kernels::PairSoftmax::Form)form, call.p.keep = keep;
  kernels::pair_softmax(call.p);
  return {call.loss, call.gradients[0], call.gradients[1], call.gradients[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_sigmoid(
    const Tensor& a, const Tensor& b, const Tensor& scale, const Tensor& bias, bool mean,
    double eps, std::vector<bool> needs, bool bf16) {
  PairCall<kernels::PairSigmoid> call(a, b, scale, mean, eps, needs, 4, bf16);
  call.p.bias = number(bias, "bias"), call.p.grad_bias = data(call.gradients[3]);
  kernels::pair_sigmoid(call.p);
  return {call.loss, call.gradients[0], call.gradients[1], call.gradients[2], call.gradients[3]};
}

Tensor exp2_values(const Tensor& x) {
  const Vector<float> in(x, x.numel(), "x");
  Tensor y = empty({x.numel()});
  kernels::isa().f32->exp2(in, data(y), x.numel());
  return y;
}

std::string info() {
  return "isa=" + kernels::isa().name + " fp32=" + kernels::isa().f32->name +
         " bf16=" + kernels::isa().bf16->name + " supported=" + kernels::supported_isas();
}

void set_isa(std::string name) { kernels::set_isa(name.empty() ? nullptr : name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("_cpu_logsumexp", TORCH_BOX(&logsumexp));
  m.impl("_cpu_logsumexp_backward", TORCH_BOX(&logsumexp_backward));
  m.impl("_cpu_sum", TORCH_BOX(&sum));
  m.impl("_cpu_sum_backward", TORCH_BOX(&sum_backward));
  m.impl("_cpu_topk", TORCH_BOX(&topk));
  m.impl("_cpu_l2_normalize", TORCH_BOX(&l2_normalize));
  m.impl("_cpu_l2_normalize_backward", TORCH_BOX(&l2_normalize_backward));
  m.impl("_cpu_l2_normalize_pair", TORCH_BOX(&l2_normalize_pair));
  m.impl("_cpu_l2_normalize_pair_backward", TORCH_BOX(&l2_normalize_pair_backward));
  m.impl("_cpu_pair_softmax", TORCH_BOX(&pair_softmax));
  m.impl("_cpu_pair_sigmoid", TORCH_BOX(&pair_sigmoid));
  m.impl("_cpu_exp2", TORCH_BOX(&exp2_values));
}

STABLE_TORCH_LIBRARY_IMPL(fastcl, CompositeExplicitAutograd, m) {
  m.impl("_cpu_info", TORCH_BOX(&info));
  m.impl("_cpu_set_isa", TORCH_BOX(&set_isa));
}
