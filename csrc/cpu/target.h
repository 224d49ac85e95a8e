// Per-file instruction sets without per-file compiler flags. Standard headers come first: compiled
// under a higher target, their inline functions could be the copies the linker keeps for everyone.
#pragma once
#include <cstring>

#include "blocks.h"

#define FASTCL_PRAGMA(text) _Pragma(#text)
#if defined(__x86_64__)
#define FASTCL_X86 1
#include <immintrin.h>
#if defined(__clang__)
#define FASTCL_TARGET(isa) \
  FASTCL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTCL_TARGET_END FASTCL_PRAGMA(clang attribute pop)
#else
#define FASTCL_TARGET(isa) FASTCL_PRAGMA(GCC target(isa))
#define FASTCL_TARGET_END
#endif
#else
#define FASTCL_X86 0
#endif
