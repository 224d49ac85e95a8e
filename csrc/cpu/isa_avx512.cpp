// 8 x 32 register tile: 16 accumulators; the other 16 registers serve the exponentials.
#include "target.h"
#if FASTCL_X86
FASTCL_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define FASTCL_ISA avx512
#define FASTCL_LANES 16
#define FASTCL_ROW_TILE 8
#define FASTCL_VECTORS 2
#define FASTCL_BF16 0
#include "tables.h"
FASTCL_TARGET_END

namespace fastcl::cpu {
const Kernels* kernels_avx512() { return &avx512::table; }
}  // namespace fastcl::cpu
#else
namespace fastcl::cpu {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace fastcl::cpu
#endif
