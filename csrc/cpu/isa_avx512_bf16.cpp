// The AVX-512 tile with products of bf16 pairs (vdpbf16ps); serves bf16 precision only.
#include "target.h"
#if FASTCL_X86
FASTCL_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define FASTCL_ISA avx512_bf16
#define FASTCL_LANES 16
#define FASTCL_ROW_TILE 8
#define FASTCL_VECTORS 2
#define FASTCL_BF16 1
#include "tables.h"
FASTCL_TARGET_END

namespace fastcl::cpu {
const Kernels* kernels_avx512_bf16() { return &avx512_bf16::table; }
}  // namespace fastcl::cpu
#else
namespace fastcl::cpu {
const Kernels* kernels_avx512_bf16() { return nullptr; }
}  // namespace fastcl::cpu
#endif
