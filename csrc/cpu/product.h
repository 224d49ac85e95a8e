// Gradient products: a block of weights times rows of values, added to fp32 rows.
#pragma once
#include "tile.h"

namespace fastcl::cpu::FASTCL_ISA {
namespace {

// Rows i .. i + MR times N vectors of features from d on.
template <int N>
__attribute__((noinline)) void product_tile(const Product& p, i64 i, i64 d, i64 from, i64 to) {
  const int valid = (int)least(MR, p.rows - i);
  V c[MR][N];
  float* out = p.out + i * p.out_stride + d;
  for (int r = 0; r < valid; ++r)  // on their way while the products run
    for (int v = 0; v < N * L; v += 16) __builtin_prefetch(out + r * p.out_stride + v, 1);
  multiply<N>((const Unit*)p.w + i * p.w_row + from * p.w_step, p.w_row, p.w_step,
              (const Unit*)p.values + from * p.values_stride + d, p.values_stride, to - from, c);
  if (d + N * L <= p.dim && valid == MR) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r, out += p.out_stride)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        const V sum = c[r][v] * p.alpha;
        store(out + v * L, p.fresh ? sum : sum + load(out + v * L));
      }
    return;
  }
  for (int r = 0; r < valid; ++r, out += p.out_stride) {
    alignas(64) float row[N * L];
    for (int v = 0; v < N; ++v) store(row + v * L, c[r][v] * p.alpha);
    for (i64 n = 0; n < least(N * L, p.dim - d); ++n)
      out[n] = p.fresh ? row[n] : out[n] + row[n];
  }
}

// A slice of N vectors of features. Copied side by side first where there is room: rows of values
// are often a power of two apart, and would share a few cache sets (5 % at 512 features in fp32;
// bf16 pairs are packed already and gain nothing). The lines of the next slice, which no hardware
// expects, are fetched while this one is multiplied (3 % at 512 features).
template <int N>
void product_slice(Product p, i64 d) {
  const float* next = (const float*)p.values + d + N * L;
  const i64 next_stride = p.values_stride;
  const i64 fetch = p.slice && d + N * L < p.dim ? (p.steps * MR + p.rows - 1) / p.rows : 0;
  if (p.slice) {
    Unit* slice = (Unit*)p.slice;
    for (i64 k = 0; k < p.steps; ++k)
      for (int v = 0; v < N; ++v)
        store((float*)slice + k * N * L + v * L,
              load((const float*)p.values + k * p.values_stride + d + v * L));
    p.values = slice - d;
    p.values_stride = N * L;
  }
  for (i64 i = 0; i < p.rows; i += MR) {
    const i64 step = i / MR * fetch;
    for (i64 k = step; k < least(p.steps, step + fetch); ++k)
      for (int v = 0; v < N * L; v += 16) __builtin_prefetch(next + k * next_stride + v, 0, 2);
    const i64 own = i / PANEL * (PANEL / kPack);
    const i64 from = p.limit == Product::kFromPanel ? least(own, p.steps) : 0;
    const i64 to = p.limit == Product::kToPanel ? least(own, p.steps) : p.steps;
    if (from < to) product_tile<N>(p, i, d, from, to);
  }
}

// A slice of features at a time, so that its values stay in cache while the weights stream.
void product(const Product& p) {
  i64 d = 0;
  for (; d + (NV - 1) * L < p.dim; d += NV * L) product_slice<NV>(p, d);
  if constexpr (NV > 2)
    if (d + L < p.dim) {
      product_slice<2>(p, d);
      return;
    }
  if (d < p.dim) product_slice<1>(p, d);
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
