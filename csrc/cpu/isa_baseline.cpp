// Whatever the compiler targets by default: SSE2 on x86-64, NEON on AArch64.
#define FASTCL_ISA baseline
#define FASTCL_LANES 4
#define FASTCL_ROW_TILE 4
#define FASTCL_VECTORS 2
#define FASTCL_BF16 0
#include "tables.h"

namespace fastcl::cpu {
const Kernels* kernels_baseline() { return &baseline::table; }
}  // namespace fastcl::cpu
