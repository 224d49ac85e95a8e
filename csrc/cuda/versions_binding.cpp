// Which CUDA this module carries and which one the machine's driver speaks: 13000 for 13.0. Asking
// wakes no device.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

std::tuple<int64_t, int64_t> versions() {
  int driver = 0;  // stays 0 without one
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CompositeExplicitAutograd, m) {
  m.impl("_cuda_versions", TORCH_BOX(&versions));
}
