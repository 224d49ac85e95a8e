// Products of a warp by mma.sync (sm_80 and newer): 16 rows with 64 keys, and their 64 weights with
// the keys. Rows and keys lie in shared memory, `pitch` bytes apart: a multiple of 16 that puts the
// same piece of eight rows into different banks. Features are padded with zeros to a multiple of
// kPad. fp32 operands are split, so that products keep fp32's precision.
#pragma once
#include "device.h"

namespace fastcl::cuda {

constexpr int kSweepKeys = 64, kKeyTiles = kSweepKeys / 8;
constexpr int kPad = 32;

// x = high + low, both TF32, all but exactly: three products of parts keep fp32's precision.
struct Parts {
  u32 high, low;
};
FASTCL_DEVICE Parts parts_of(float x) {
  const u32 high = round_tf32(x);
  return {high, round_tf32(x - as_float(high))};
}
FASTCL_DEVICE void multiply_parts(float (&c)[4], const u32 (&high)[4], const u32 (&low)[4],
                                  Parts b0, Parts b1) {
  multiply_tf32(c, low, b0.high, b1.high);
  multiply_tf32(c, high, b0.low, b1.low);
  multiply_tf32(c, high, b0.high, b1.high);
}

// Scores [16, 64] of a warp before lengths divide: number 4 n + i of lane 4 g + t belongs to row
// g + i / 2 * 8 and key 8 n + 2 t + i % 2.
using Scores = float[kKeyTiles][4];

FASTCL_DEVICE void clear(Scores& s) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
    for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
}

// `rows`, `keys`: where this lane loads matrices.
template <class T>
FASTCL_DEVICE void multiply_rows(T, Scores& s, const unsigned char* rows, const unsigned char* keys,
                                 int pitch, int padded) {
  clear(s);
#pragma unroll 2
  for (int d = 0; d < padded; d += 16) {
    u32 a[4];
    load_matrices<false>(a, rows + 2 * d);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      u32 b[4];
      load_matrices<false>(b, keys + 8 * n * pitch + 2 * d);
      multiply(T{}, s[n], a, b[0], b[1]);
      multiply(T{}, s[n + 1], a, b[2], b[3]);
    }
  }
}
FASTCL_DEVICE void multiply_rows(float, Scores& s, const unsigned char* rows,
                                 const unsigned char* keys, int pitch, int padded) {
  clear(s);
  for (int d = 0; d < padded; d += 16) {
    u32 high[2][4], low[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      u32 a[4];
      load_matrices<false>(a, rows + 4 * d + 32 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(as_float(a[i]));
        high[k][i] = parts.high, low[k][i] = parts.low;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      // tensor cores truncate as they add: long sums are formed outside, from short ones
      float part[2][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        u32 b[4];
        load_matrices<false>(b, keys + 8 * n * pitch + 4 * d + 32 * k);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          multiply_parts(part[h], high[k], low[k], parts_of(as_float(b[2 * h])),
                         parts_of(as_float(b[2 * h + 1])));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 4; ++i) s[n + h][i] += part[h][i];
    }
  }
}

// Weights [16, 64] of a warp times its keys, added to [16, features]; tiles are of 8 features.
template <int kTiles>
FASTCL_DEVICE void multiply_keys(bf16, float (&sum)[kTiles][4], const Scores& w,
                                 const unsigned char* keys, int pitch, int tiles) {
  const int lane = threadIdx.x % 32;
  keys += lane % 16 * pitch + lane / 16 * 16;
  u32 a[kKeyTiles / 2][4];
#pragma unroll
  for (int k = 0; k < kKeyTiles; ++k)
    for (int i = 0; i < 2; ++i)
      a[k / 2][k % 2 * 2 + i] = pack(bf16{}, w[k][2 * i], w[k][2 * i + 1]);
#pragma unroll
  for (int begin = 0; begin < kTiles; begin += kPad / 8) {
    if (begin >= tiles) break;
#pragma unroll
    for (int k = 0; k < kKeyTiles / 2; ++k)
#pragma unroll
      for (int n = begin; n < begin + kPad / 8; n += 2) {
        u32 b[4];
        load_matrices<true>(b, keys + 16 * k * pitch + 16 * n);
        multiply(bf16{}, sum[n], a[k], b[0], b[1]);
        multiply(bf16{}, sum[n + 1], a[k], b[2], b[3]);
      }
  }
}
// Weights can be far below what fp16 holds: both sides are widened to TF32, which has its digits.
// Of eight keys, the operands' places t and t + 4 hold keys 2 t and 2 t + 1.
template <int kTiles>
FASTCL_DEVICE void multiply_keys(f16, float (&sum)[kTiles][4], const Scores& w,
                                 const unsigned char* keys, int pitch, int tiles) {
  const int lane = threadIdx.x % 32;
  keys += lane % 16 * pitch + lane / 16 * 16;
  u32 a[kKeyTiles][4];
#pragma unroll
  for (int k = 0; k < kKeyTiles; ++k)
    for (int i = 0; i < 4; ++i) a[k][i] = round_tf32(w[k][i % 2 * 2 + i / 2]);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n >= tiles) break;
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      u32 b[4];
      load_matrices<true>(b, keys + 8 * k * pitch + 16 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        multiply_tf32(sum[n + i / 2], a[k + i % 2], as_bits(widen(f16{(uint16_t)b[i]})),
                      as_bits(widen(f16{(uint16_t)(b[i] >> 16)})));
    }
  }
}
template <int kTiles>
FASTCL_DEVICE void multiply_keys(float, float (&sum)[kTiles][4], const Scores& w,
                                 const unsigned char* keys, int pitch, int tiles) {
  const int lane = threadIdx.x % 32;
  keys += lane % 4 * 2 * pitch + lane / 4 * 4;
#pragma unroll
  for (int k = 0; k < kKeyTiles; k += 2) {
    u32 high[2][4], low[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 4; ++i) {
        const Parts parts = parts_of(w[k + h][i % 2 * 2 + i / 2]);
        high[h][i] = parts.high, low[h][i] = parts.low;
      }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) break;
      float part[4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned char* at = keys + 8 * (k + h) * pitch + 32 * n;
        multiply_parts(part, high[h], low[h], parts_of(*reinterpret_cast<const float*>(at)),
                       parts_of(*reinterpret_cast<const float*>(at + pitch)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] += part[i];
    }
  }
}

}  // namespace fastcl::cuda
