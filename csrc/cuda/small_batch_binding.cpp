#include <tuple>
#include <vector>

#include "binding.h"
#include "small_batch.h"

namespace {

using namespace fastcl::cuda;

float* data(Tensor& x) { return x.numel() ? static_cast<float*>(x.mutable_data_ptr()) : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(const Tensor& a, const Tensor& b,
                                                        const Tensor& scale, int64_t form,
                                                        bool mean, double eps,
                                                        std::vector<bool> needs,
                                                        int64_t precision) {
  check_matrix(a, "a", a);
  check_matrix(b, "b", a);
  STD_TORCH_CHECK(a.size(0) == b.size(0) && a.size(1) == b.size(1), "a and b must have one shape");
  STD_TORCH_CHECK(scale.is_cuda() && scale.get_device_index() == a.get_device_index() &&
                      scale.scalar_type() == ScalarType::Float && scale.numel() == 1,
                  "scale must be one float32 number on the GPU of a");
  STD_TORCH_CHECK(form >= 0 && form <= 2, "form must be 0, 1 or 2");
  STD_TORCH_CHECK(precision >= 0 && precision <= 2, "precision must be 0, 1 or 2");
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 entries");
  const OnDevice device(a);
  const Tensor first = feature_contiguous(a), second = feature_contiguous(b);
  SmallBatch call{};
  call.a = first.const_data_ptr(), call.a_type = type_of(a, "a"), call.a_stride = first.stride(0);
  call.b = second.const_data_ptr(), call.b_type = type_of(b, "b");
  call.b_stride = second.stride(0);
  call.n = a.size(0), call.d = a.size(1);
  call.precision = (Type)precision, call.form = (SmallBatch::Form)form;
  call.mean = mean, call.eps = (float)eps;
  call.scale = static_cast<const float*>(scale.const_data_ptr());
  const auto empty = [&](std::initializer_list<int64_t> shape) {
    const std::vector<int64_t> sizes(shape);
    return torch::stable::new_empty(a, {sizes.data(), sizes.size()}, ScalarType::Float);
  };
  const auto gradient = [&](int which) {
    return needs[which] ? empty({call.n, call.d}) : empty({0});
  };
  Tensor loss = empty({}), grad_a = gradient(0), grad_b = gradient(1);
  Tensor grad_scale = needs[2] ? empty({}) : empty({0});
  const size_t bytes = small_batch_workspace(call.n, call.d, call.form);
  Tensor workspace = empty({(int64_t)(bytes / sizeof(float))});
  call.loss = data(loss), call.grad_a = data(grad_a), call.grad_b = data(grad_b);
  call.grad_scale = data(grad_scale), call.workspace = data(workspace);
  check(small_batch(call, device.stream()), "pair_softmax");
  return {loss, grad_a, grad_b, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CUDA, m) {
  m.impl("_cuda_pair_softmax", TORCH_BOX(&pair_softmax));
}
