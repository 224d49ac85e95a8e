// From rows of any storage dtype to the operands of the products.
#pragma once
#include "tile.h"

namespace fastcl::cpu::FASTCL_ISA {
namespace {

#if FASTCL_BF16
// Units u .. u + L of a row, that is 2 L features, rounded to nearest even.
template <Storage S>
FASTCL_INLINE VI load_units(const char* row, i64 u, i64 dim) {
  const i64 d = 2 * u;
  if constexpr (S == Storage::bf16)
    if (d + 2 * L <= dim) return (VI)load((const float*)(row + d * 2));
  return (VI)round_pair(load_features<S>(row, d, dim), load_features<S>(row, d + L, dim));
}
#else
template <Storage S>
FASTCL_INLINE VI load_units(const char* row, i64 u, i64 dim) {
  return (VI)load_features<S>(row, u, dim);
}
#endif

// One exchange of a transposition: the lanes with bit W of `b`'s partner swap sides.
template <int W>
FASTCL_INLINE void exchange(VI& a, VI& b) {
  VI first, second;
  for (int l = 0; l < L; ++l) {
    first[l] = l & W ? L + l - W : l;
    second[l] = l & W ? L + l : l + W;
  }
  const VI low = __builtin_shuffle(a, b, first), high = __builtin_shuffle(a, b, second);
  a = low;
  b = high;
}

template <int W = 1>
FASTCL_INLINE void transpose(VI (&x)[L]) {
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l)
    if (!(l & W)) exchange<W>(x[l], x[l | W]);
  if constexpr (2 * W < L) transpose<2 * W>(x);
}

template <Storage S>
void pack_panel(const Matrix& x, i64 row0, i64 rows, Unit* out) {
  const i64 depth = (x.dim + kPack - 1) / kPack;
  for (int group = 0; group < PANEL; group += L)
    for (i64 u = 0; u < depth; u += L) {
      VI block[L];
      for (int l = 0; l < L; ++l)
        block[l] = group + l < rows ? load_units<S>(row_of(x, row0 + group + l), u, x.dim) : VI{};
      transpose(block);
      for (int l = 0; l < least(L, depth - u); ++l)
        store((float*)out + (u + l) * PANEL + group, (V)block[l]);
    }
}

// Reads the rows in order, one byte a line. Packing steps through L rows at once, which defeats the
// hardware's prefetching: from memory it ran at 6 GB/s, and at 12 after this.
void touch_rows(const Matrix& x, i64 row0, i64 rows) {
  for (i64 i = row0; i < row0 + rows; ++i) {
    const volatile char* row = row_of(x, i);
    for (i64 b = 0; b < x.dim * size_of(x.storage); b += 64) (void)row[b];
  }
}

void pack_panels(const Matrix& x, i64 row0, i64 rows, void* panels) {
  const i64 depth = (x.dim + kPack - 1) / kPack;
  touch_rows(x, row0, rows);
  with_storage(x.storage, [&]<Storage S>() {
    for (i64 i = 0; i < rows; i += PANEL)
      pack_panel<S>(x, row0 + i, least(PANEL, rows - i), (Unit*)panels + i * depth);
  });
}

// Values keep their row-major order: [rows][stride] fp32, or [ceil(rows / 2)][stride] pairs of
// vertical neighbours in bf16; zero between dim and stride.
template <Storage S>
void pack_values_as(const Matrix& x, i64 row0, i64 rows, void* values, i64 stride) {
  for (i64 i = 0; i < rows; i += kPack)
    for (i64 d = 0; d < stride; d += L) {
      const V v = load_features<S>(row_of(x, row0 + i), d, x.dim);
#if FASTCL_BF16
      const V below = i + 1 < rows ? load_features<S>(row_of(x, row0 + i + 1), d, x.dim) : V{};
      store((float*)values + i / 2 * stride + d, (V)interleave(v, below));
#else
      store((float*)values + i * stride + d, v);
#endif
    }
}

void pack_values(const Matrix& x, i64 row0, i64 rows, void* values, i64 stride) {
  with_storage(x.storage,
               [&]<Storage S>() { pack_values_as<S>(x, row0, rows, values, stride); });
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
