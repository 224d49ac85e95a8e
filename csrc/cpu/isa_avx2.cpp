// 4 x 24 register tile: 12 accumulators, 3 lines and a broadcast fill the 16 registers.
#include "target.h"
#if FASTCL_X86
FASTCL_TARGET("avx2,fma")
#define FASTCL_ISA avx2
#define FASTCL_LANES 8
#define FASTCL_ROW_TILE 4
#define FASTCL_VECTORS 3
#define FASTCL_BF16 0
#include "tables.h"
FASTCL_TARGET_END

namespace fastcl::cpu {
const Kernels* kernels_avx2() { return &avx2::table; }
}  // namespace fastcl::cpu
#else
namespace fastcl::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace fastcl::cpu
#endif
