// Stable-ABI binding of the sm_90a kernels; the schemas are defined in fastcl/ops/hopper.py.
#include <algorithm>
#include <tuple>
#include <vector>

#include "binding.h"
#include "logsumexp.h"
#include "product.h"

namespace {

using namespace fastcl::cuda;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
}

const float* numbers(const Tensor& x, const char* name, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index() &&
                      x.scalar_type() == ScalarType::Float && x.numel() == count &&
                      x.is_contiguous(),
                  name, " must hold ", count, " adjacent float32 values on the GPU of the others");
  return static_cast<const float*>(x.const_data_ptr());
}

float* out(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Rows rows_of(const Tensor& x, const char* name, const Tensor& like) {
  check_matrix(x, name, like);
  STD_TORCH_CHECK(x.size(1) == like.size(1) && x.scalar_type() == like.scalar_type(), name,
                  " must have the width and dtype of the other side");
  STD_TORCH_CHECK(x.stride(1) == 1, name, " must have adjacent features");
  return {x.const_data_ptr(), x.size(0), x.stride(0)};
}

Pairing pairing_of(const Tensor& own, const Tensor& other, const Tensor& scale,
                   const std::vector<int64_t>& skip) {
  Pairing p{};
  p.type = type_of(own, "rows");
  p.own = rows_of(own, "rows", own), p.other = rows_of(other, "the other rows", own);
  p.d = own.size(1);
  p.scale = numbers(scale, "scale", 1, own);
  STD_TORCH_CHECK(skip.size() <= 3, "at most 3 offsets can be skipped, got ", skip.size());
  p.skips = (int)skip.size();
  std::copy(skip.begin(), skip.end(), p.skip);
  check(refuse(p), "kernels for sm_90a");
  return p;
}

Three logsumexp_rows(const Tensor& queries, const OptionalTensor& keys, const Tensor& scale,
                     std::vector<int64_t> skip, bool columns) {
  const OnDevice device(queries);
  LogSumExp call{};
  call.pairing = pairing_of(queries, keys ? *keys : queries, scale, skip);
  call.symmetric = !keys;
  STD_TORCH_CHECK(keys || !columns, "columns are the rows where keys are the queries");
  Tensor rows = empty(queries, {call.pairing.own.count}), offset = empty(queries, {});
  Tensor column_sums = empty(queries, {columns ? call.pairing.other.count : 0});
  call.rows = out(rows), call.offset = out(offset);
  call.columns = columns ? out(column_sums) : nullptr;
  Tensor workspace = empty(queries, {logsumexp_workspace(call)});
  call.workspace = out(workspace);
  check(logsumexp(call, device.stream()), "logsumexp");
  return {rows, column_sums, offset};
}

// Rows of a side's [3, padded]: gains, shifts, ratios.
Side side_of(const float* gradient, const float* logsum, int64_t count, float* table) {
  const int64_t size = padded(count);
  return {gradient, logsum, count, table, table + size, table + 2 * size};
}

Three gains_of(const OptionalTensor& grad_own, const OptionalTensor& own_sums, int64_t own_count,
               const OptionalTensor& grad_other, const OptionalTensor& other_sums,
               int64_t other_count, const Tensor& scale, const Tensor& offset) {
  const OnDevice device(scale);
  const auto given = [&](const OptionalTensor& x, const char* name, int64_t count) {
    return x ? numbers(*x, name, count, scale) : nullptr;
  };
  STD_TORCH_CHECK(grad_own.has_value() == own_sums.has_value() &&
                      grad_other.has_value() == other_sums.has_value(),
                  "a side's gradients and sums come together");
  Tensor own = empty(scale, {3, padded(own_count)}), other = empty(scale, {3, padded(other_count)});
  Tensor unit = empty(scale, {2});
  Gains call{};
  call.sides[0] = side_of(given(grad_own, "grad_own", own_count),
                          given(own_sums, "own_sums", own_count), own_count, out(own));
  call.sides[1] = side_of(given(grad_other, "grad_other", other_count),
                          given(other_sums, "other_sums", other_count), other_count, out(other));
  call.scale = numbers(scale, "scale", 1, scale), call.unit = out(unit);
  call.offset = numbers(offset, "offset", 1, scale);
  check(gains(call, device.stream()), "gains");
  return {own, other, unit};
}

Tensor product_of(const Tensor& own, const Tensor& other, const Tensor& scale,
                  std::vector<int64_t> skip, const Tensor& own_gains, const Tensor& other_gains,
                  const Tensor& offset, const Tensor& factor) {
  const OnDevice device(own);
  Product call{};
  const Pairing& p = call.pairing = pairing_of(own, other, scale, skip);
  const auto side = [&](const Tensor& table, const char* name, int64_t count) {
    const float* data = numbers(table, name, 3 * padded(count), own);
    return side_of(nullptr, nullptr, count, const_cast<float*>(data));
  };
  call.own = side(own_gains, "own_gains", p.own.count);
  call.other = side(other_gains, "other_gains", p.other.count);
  call.offset = numbers(offset, "offset", 1, own), call.factor = numbers(factor, "factor", 1, own);
  Tensor result = empty(own, {p.own.count, p.d}), workspace = empty(own, {product_workspace(p)});
  call.out = out(result), call.workspace = out(workspace);
  check(product(call, device.stream()), "product");
  return result;
}

Three mean_of(const Tensor& own, const Tensor& other, const Tensor& scale,
              std::vector<int64_t> skip) {
  const OnDevice device(own);
  Mean call{};
  const Pairing& p = call.pairing = pairing_of(own, other, scale, skip);
  Tensor rows = empty(own, {p.own.count}), result = empty(own, {p.own.count, p.d});
  Tensor offset = empty(own, {}), workspace = empty(own, {mean_workspace(p)});
  call.logsum = out(rows), call.mean = out(result), call.offset = out(offset);
  call.workspace = out(workspace);
  check(mean(call, device.stream()), "mean");
  return {rows, result, offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CUDA, m) {
  m.impl("_cuda_logsumexp", TORCH_BOX(&logsumexp_rows));
  m.impl("_cuda_gains", TORCH_BOX(&gains_of));
  m.impl("_cuda_product", TORCH_BOX(&product_of));
  m.impl("_cuda_mean", TORCH_BOX(&mean_of));
}
