// What the bindings of CUDA kernels share: checks, the device guard, the stream. Only
// torch/csrc/stable and torch/headeronly may be included here; schemas are defined in Python.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

#include "types.h"

// In libtorch_cuda: weak, so that the module also loads under a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace fastcl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the device of `x` current while it lives, and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// A launcher's answer: null, or what went wrong.
inline void check(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "fastcl ", op, ": ", error);
}

inline Type type_of(const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16 for the CUDA backend");
  return dtype == ScalarType::Float      ? Type::f32
         : dtype == ScalarType::BFloat16 ? Type::bf16
                                         : Type::f16;
}

inline void check_matrix(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  " must be on the GPU of the other arguments");
  STD_TORCH_CHECK(x.dim() == 2, name, " must be a matrix, got ", x.dim(), " dimensions");
}

// Adjacent entries of a row; rows may be apart.
inline Tensor feature_contiguous(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// A contiguous vector of `size` int64 numbers beside `like`.
inline void check_integers(const Tensor& x, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index() &&
                      x.scalar_type() == ScalarType::Long && x.numel() == size && x.is_contiguous(),
                  name, " must hold ", size, " adjacent int64 values on the GPU of the others");
}

}  // namespace fastcl::cuda
