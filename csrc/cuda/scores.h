// What the kernels agree on about scores: the pair rule, the exponents' offset, what is lost.
// The twin of kernels/tile.py.
#pragma once
#include <climits>
#include <cmath>

#include "device.h"
#include "pairing.h"

namespace fastcl::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNever = 1e30f;         // 2^-kNever is 0, and so is every score below it
constexpr float kLost = 0x1p-100f;      // a sum below this may have lost terms to underflow
constexpr int kNoOffset = INT_MIN;      // of no pair

// Offsets (other index - own index) of the pairs that are left out.
struct Skips {
  int offset[3];

  static Skips of(const Pairing& p) {
    Skips s{{kNoOffset, kNoOffset, kNoOffset}};
    for (int i = 0; i < p.skips; ++i)
      if (p.skip[i] > -(1 << 30) && p.skip[i] < 1 << 30) s.offset[i] = (int)p.skip[i];
    return s;
  }
  FASTCL_DEVICE bool has(int apart) const {
    return (apart == offset[0]) | (apart == offset[1]) | (apart == offset[2]);
  }
  // Whether a tile of own rows [own, own + width) and other rows [other, other + height) has any.
  FASTCL_DEVICE bool cross(int own, int width, int other, int height) const {
    const int apart = other - own;
    bool hit = false;
#pragma unroll
    for (int i = 0; i < 3; ++i) hit |= (offset[i] > apart - width) & (offset[i] < apart + height);
    return hit;
  }
};

// Binary orders of magnitude between the largest exponential and the overflow of a sum of `size`.
inline float exponent_room(i64 size) { return 124.0f - (float)std::log2((double)size); }

// The balanced offset in log2 units, for unit rows: just what would overflow is taken off. Scores
// of other rows may still overflow or vanish; the sums show it, see finish.cu.
FASTCL_DEVICE float exponent_offset(float scale, float room) {
  const float bound = (scale < 0 ? -scale : scale) * (kLog2e * 1.01f);
  return bound > room ? bound - room : 0.0f;
}

}  // namespace fastcl::cuda
