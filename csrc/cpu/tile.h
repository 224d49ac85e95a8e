// The register tile: MR x PANEL dot products, and which of its pairs a rule keeps.
#pragma once
#include "vec.h"

namespace fastcl::cpu::FASTCL_ISA {
namespace {

constexpr int kPack = FASTCL_BF16 ? 2 : 1;  // features per unit

#if FASTCL_BF16
typedef uint32_t Unit;  // two neighbouring bf16 numbers
typedef __m512i VUnit;
FASTCL_INLINE VUnit load_unit(const Unit* p) { return _mm512_loadu_si512(p); }
FASTCL_INLINE V multiply_add(Unit a, VUnit b, V c) {
  return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}

// 2 L numbers rounded to bf16, in order: pairs along a row.
FASTCL_INLINE VW round_pair(V low, V high) {
  return (VW)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Lane l holds (a_l, b_l) rounded: pairs along a column.
FASTCL_INLINE VW interleave(V a, V b) {
  const VH low = (VH)_mm512_cvtneps_pbh((__m512)a), high = (VH)_mm512_cvtneps_pbh((__m512)b);
  return __builtin_convertvector(low, VW) | __builtin_convertvector(high, VW) << 16;
}
#else
typedef float Unit;
typedef V VUnit;
FASTCL_INLINE VUnit load_unit(const Unit* p) { return load(p); }
FASTCL_INLINE V multiply_add(Unit a, VUnit b, V c) { return a * b + c; }
#endif

// c[r][v] = sum_k a[r, k] b[k, v]. 8 x 32 reaches 99.9 % of the FMA peak on Zen 4 from either
// cache level, as do 12 x 32 and 8 x 48; 8 divides the panel, so one packing serves both sides.
template <int N>
FASTCL_INLINE void multiply(const Unit* a, i64 a_row, i64 a_step, const Unit* b, i64 b_step,
                            i64 steps, V (&c)[MR][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) c[r][v] = V{};
  for (i64 k = 0; k < steps; ++k, a += a_step, b += b_step) {
    VUnit line[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) line[v] = load_unit(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) c[r][v] = multiply_add(a[r * a_row], line[v], c[r][v]);
  }
}

// Dot products of rows i .. i + MR with columns j .. j + PANEL of the block.
FASTCL_INLINE void dots(const ScoreBlock& s, i64 i, i64 j, V (&c)[MR][NV]) {
  const Unit* a = (const Unit*)s.a + i / PANEL * PANEL * s.depth + i % PANEL;
  multiply<NV>(a, 1, PANEL, (const Unit*)s.b + j * s.depth, PANEL, s.depth, c);
}

// What a tile must test: nothing, ids only, or ids, skipped offsets and the last rows.
enum Mask { kNone, kSame, kDifferent, kAll };

FASTCL_INLINE Mask mask_of(const ScoreBlock& s, i64 i, i64 j) {
  if (i + MR > s.rows) return kAll;
  const i64 offset = (s.col0 + j) - (s.row0 + i);
  for (int n = 0; n < s.skips; ++n)
    if (s.skip[n] > offset - MR && s.skip[n] < offset + PANEL) return kAll;
  return s.relation == Relation::any ? kNone : s.relation == Relation::same ? kSame : kDifferent;
}

template <Mask K>
class Keep {
 public:
  FASTCL_INLINE Keep(const ScoreBlock& s, i64 i, i64 j) : s_(s), i_(i), j_(j) {}

  // All ones where row r and the columns of vector v form a kept pair.
  FASTCL_INLINE VI operator()(int r, int v) const {
    if constexpr (K == kNone) return ~VI{};
    if constexpr (K == kSame) return ids(r, v);
    if constexpr (K == kDifferent) return ~ids(r, v);
    if (i_ + r >= s_.rows) return VI{};
    VI keep = s_.relation == Relation::any    ? ~VI{}
              : s_.relation == Relation::same ? ids(r, v)
                                              : ~ids(r, v);
    const i64 first = (s_.col0 + j_ + v * L) - (s_.row0 + i_ + r);  // offset of lane 0
    for (int n = 0; n < s_.skips; ++n) {
      const i64 lane = s_.skip[n] - first;
      if (lane >= 0 && lane < L) keep &= iota() != set1((int32_t)lane);
    }
    return keep;
  }

 private:
  FASTCL_INLINE VI ids(int r, int v) const {
    return (VI)load((const float*)(s_.col_ids + j_ + v * L)) == set1(s_.row_ids[i_ + r]);
  }
  const ScoreBlock& s_;
  i64 i_, j_;
};

// A right-hand panel this small stays in a 32 KiB first-level cache beside the rows that stream
// past it; a wider one is swept in groups of columns that stay in the second level instead.
constexpr i64 kPanelResident = 16 << 10, kGroupResident = 256 << 10;

// Calls body.template operator()<K>(i, j, square) for every tile of the block.
template <class Body>
FASTCL_INLINE void sweep(const ScoreBlock& s, const Body& body) {
  const i64 line = s.depth * (i64)sizeof(Unit);
  const i64 fit = kGroupResident / line / PANEL * PANEL;
  const i64 group = PANEL * line <= kPanelResident || fit < PANEL ? PANEL : fit;
  for (i64 jj = 0; jj < s.cols; jj += group)
    for (i64 i = 0; i < s.rows; i += MR)
      for (i64 j = jj; j < least(s.cols, jj + group); j += PANEL) {
        const i64 panels = (s.col0 + j) / PANEL - (s.row0 + i) / PANEL;
        if (s.triangle && panels < 0) continue;
        const bool square = s.triangle && panels == 0;
        switch (mask_of(s, i, j)) {
          case kNone: body.template operator()<kNone>(i, j, square); break;
          case kSame: body.template operator()<kSame>(i, j, square); break;
          case kDifferent: body.template operator()<kDifferent>(i, j, square); break;
          case kAll: body.template operator()<kAll>(i, j, square); break;
        }
      }
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
