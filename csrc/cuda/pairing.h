// Two sides whose similarities are wanted, as plain C++ that kernels and bindings share.
#pragma once
#include <cstdint>

#include "types.h"

namespace fastcl::cuda {

// Rows of 16-bit numbers: adjacent entries, rows `stride` entries apart, the address and the stride
// in bytes multiples of 16.
struct Rows {
  const void* data;
  int64_t count, stride;
};

// Scores are scale <own, other>. `d` is at most 256 and a multiple of 8.
struct Pairing {
  Type type;  // bf16 or f16
  Rows own, other;
  int64_t d;
  const float* scale;
  int64_t skip[3];  // offsets (other index - own index) of the pairs left out
  int skips;
};

// The same pairs with the sides' roles exchanged.
inline Pairing exchanged(Pairing p) {
  const Rows own = p.own;
  p.own = p.other, p.other = own;
  for (int i = 0; i < p.skips; ++i) p.skip[i] = -p.skip[i];
  return p;
}

// With as many on both sides, the steps of one worker are still an int.
constexpr int64_t kMostRows = 1 << 24;

// Null, or why the kernels do not serve it.
inline const char* refuse(const Pairing& p) {
  const auto bad = [&](const Rows& rows) {
    return rows.count < 1 || rows.count > kMostRows || rows.stride < p.d || rows.stride % 8 ||
           reinterpret_cast<uintptr_t>(rows.data) % 16;
  };
  if (p.type != Type::bf16 && p.type != Type::f16) return "rows must be bfloat16 or float16";
  if (p.d < 8 || p.d > 256 || p.d % 8) return "features must be a multiple of 8, 256 at most";
  if (bad(p.own) || bad(p.other))
    return "rows must number 1 to 2^24, at addresses and distances of a multiple of 16 bytes";
  if (p.skips < 0 || p.skips > 3) return "at most 3 offsets can be skipped";
  return nullptr;
}

}  // namespace fastcl::cuda
