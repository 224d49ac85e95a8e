// Vectors and elementary functions of one instruction set, in the compilers' vector extensions.
// An isa_*.cpp defines the parameters below and includes tables.h; nothing else differs.
//
//   FASTCL_ISA        namespace
//   FASTCL_LANES      fp32 numbers per vector
//   FASTCL_ROW_TILE   rows of a register tile
//   FASTCL_VECTORS    vectors per row of a register tile
//   FASTCL_BF16       1: products of bf16 pairs (vdpbf16ps), else fp32
#pragma once
#include <cstring>

#include "blocks.h"

#define FASTCL_INLINE inline __attribute__((always_inline))
#define FASTCL_INLINE_LAMBDA __attribute__((always_inline))

namespace fastcl::cpu::FASTCL_ISA {
namespace {

constexpr int L = FASTCL_LANES, MR = FASTCL_ROW_TILE, NV = FASTCL_VECTORS, PANEL = L * NV;
static_assert(PANEL % MR == 0, "a row tile must not straddle panels");

typedef float V __attribute__((vector_size(L * 4)));
typedef int32_t VI __attribute__((vector_size(L * 4)));
typedef uint32_t VW __attribute__((vector_size(L * 4)));
typedef double VD __attribute__((vector_size(L * 8)));
typedef uint16_t VH __attribute__((vector_size(L * 2)));
typedef float VMem __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef double VDMem __attribute__((vector_size(L * 8), aligned(8), may_alias));
typedef uint16_t VHMem __attribute__((vector_size(L * 2), aligned(2), may_alias));

FASTCL_INLINE V load(const float* p) { return *(const VMem*)p; }
FASTCL_INLINE void store(float* p, V v) { *(VMem*)p = v; }
FASTCL_INLINE V set1(float x) { return x - V{}; }
FASTCL_INLINE VI set1(int32_t x) { return x - VI{}; }
FASTCL_INLINE V max(V a, V b) { return a > b ? a : b; }
FASTCL_INLINE V abs(V a) { return (V)((VI)a & 0x7fffffff); }
FASTCL_INLINE V keep_if(VI mask, V a) { return (V)((VI)a & mask); }
FASTCL_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

FASTCL_INLINE VI iota() {
  VI v;
  for (int l = 0; l < L; ++l) v[l] = l;
  return v;
}

FASTCL_INLINE float sum_lanes(const float* p) {
  float s[L];
  std::memcpy(s, p, sizeof s);
  for (int w = L / 2; w > 0; w /= 2)
    for (int l = 0; l < w; ++l) s[l] += s[l + w];
  return s[0];
}

constexpr float kInfinity = __builtin_inff();

// 2^x for x <= 127, 0 below -126. Relative error at most 1e-7 (about 0.85 units in the last
// place, tests/cpu/test_exp2.py): degree 6 minimax on [-1/2, 1/2], the integer part added to the
// exponent bits. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; this keeps
// everything but the polynomial off the multipliers, which the products keep busy.
FASTCL_INLINE V exp2(V x) {
  const V t = x + 0x1.8p23f;
  const V r = x - (t - 0x1.8p23f);
  V p = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2dbcp-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  const VI bits = (VI)p + ((VI)t << 23);
  return x < -126.0f ? V{} : (V)bits;  // a NaN passes
}

constexpr float kLog2e = 0x1.715476p+0f;

// log(1 + t) for t in [0, 1]; relative error 1.2e-7 (degree 9 minimax of log1p(t) / t).
FASTCL_INLINE V log1p_unit(V t) {
  V p = t * -0x1.a9336cp-9f + 0x1.453f12p-6f;
  p = p * t + -0x1.d29ccep-5f;
  p = p * t + 0x1.b25362p-4f;
  p = p * t + -0x1.397562p-3f;
  p = p * t + 0x1.92f696p-3f;
  p = p * t + -0x1.ff0f88p-3f;
  p = p * t + 0x1.554c80p-2f;
  p = p * t + -0x1.ffffbep-2f;
  p = p * t + 1.0f;
  return p * t;
}

// log(1 + p) for p in [0, 2^100]; relative error 2e-7. A NaN passes.
FASTCL_INLINE V log1p(V p) {
  constexpr float ln2 = 0x1.62e430p-1f;
  const V u = 1.0f + p;
  const V exponent = __builtin_convertvector(((VI)u >> 23) - 127, V);
  const V fraction = (V)(((VI)u & 0x7fffff) | 0x3f800000) - 1.0f;
  return log1p_unit(u >= 2.0f ? fraction : p) + exponent * ln2;
}

// ---- rows of any storage dtype ---------------------------------------------------------------

FASTCL_INLINE V widen_bf16(VH h) { return (V)(__builtin_convertvector(h, VW) << 16); }

FASTCL_INLINE V widen_f16(VH h) {
  const VW w = __builtin_convertvector(h, VW);
  const VW magnitude = (w & 0x7fff) << 13;
  V v = (V)magnitude * 0x1p112f;  // rebias; exact, subnormals included
  v = (w & 0x7c00) == 0x7c00 ? (V)(magnitude | 0x7f800000) : v;  // inf and NaN keep theirs
  return (V)((VW)v | (w & 0x8000) << 16);
}

template <Storage S>
FASTCL_INLINE V load_as(const void* row, i64 d) {
  if constexpr (S == Storage::f32) return load((const float*)row + d);
  const VH h = *(const VHMem*)((const uint16_t*)row + d);
  return S == Storage::bf16 ? widen_bf16(h) : widen_f16(h);
}

constexpr int size_of(Storage s) { return s == Storage::f32 ? 4 : 2; }

FASTCL_INLINE const char* row_of(const Matrix& x, i64 i) {
  return (const char*)x.data + i * x.stride * size_of(x.storage);
}

// To nearest even; a NaN stays one.
FASTCL_INLINE VH narrow_bf16(V v) {
  const VW w = (VW)v, rounded = w + 0x7fff + ((w >> 16) & 1);
  const VW nan = (w >> 16) | 0x40;
  return __builtin_convertvector((v == v ? rounded >> 16 : nan) & 0xffff, VH);
}

// Features d .. d + L of a row as fp32, zero past the last.
template <Storage S>
FASTCL_INLINE V load_features(const char* row, i64 d, i64 dim) {
  if (d + L <= dim) return load_as<S>(row, d);
  alignas(64) char tail[L * 4] = {};
  if (d < dim) std::memcpy(tail, row + d * size_of(S), (dim - d) * size_of(S));
  return load_as<S>(tail, 0);
}

// Calls body.template operator()<S>() for the storage at hand.
template <class Body>
FASTCL_INLINE void with_storage(Storage s, const Body& body) {
  switch (s) {
    case Storage::f32: return body.template operator()<Storage::f32>();
    case Storage::bf16: return body.template operator()<Storage::bf16>();
    case Storage::f16: return body.template operator()<Storage::f16>();
  }
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
