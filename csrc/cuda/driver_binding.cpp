#include <torch/csrc/stable/library.h>

#include <tuple>

#include "driver.h"

namespace {

std::tuple<int64_t, int64_t> versions() {
  return {fastcl::cuda::compiled_runtime(), fastcl::cuda::driver()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CompositeExplicitAutograd, m) {
  m.impl("_cuda_versions", TORCH_BOX(&versions));
}
