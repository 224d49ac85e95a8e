// How numbers lie in memory, as plain C++ that kernels, launchers and bindings share.
#pragma once

namespace fastcl::cuda {

enum class Type { f32, bf16, f16 };

}  // namespace fastcl::cuda
