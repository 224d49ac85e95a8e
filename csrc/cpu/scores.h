// Sweeps that reduce a block of scores, or turn it into weights, while each tile is in registers.
#pragma once
#include "tile.h"

namespace fastcl::cpu::FASTCL_ISA {
namespace {

FASTCL_INLINE void add_to(float* p, V v) { store(p, load(p) + v); }
FASTCL_INLINE void max_to(float* p, V v) { store(p, max(load(p), v)); }
// max gives its second operand where the first is no number: NaN stays NaN
FASTCL_INLINE V relu(V x) { return max(V{}, x); }

// Stores the `cols` first numbers of a tile's row.
FASTCL_INLINE void store_row(float* p, const V (&v)[NV], i64 cols) {
  if (cols >= PANEL) {
    for (int n = 0; n < NV; ++n) store(p + n * L, v[n]);
  } else {
    alignas(64) float row[PANEL];
    for (int n = 0; n < NV; ++n) store(row + n * L, v[n]);
    std::memcpy(p, row, cols * 4);
  }
}

FASTCL_INLINE void load_row(const float* p, V (&v)[NV], i64 cols) {
  alignas(64) float row[PANEL] = {};
  if (cols < PANEL) {
    std::memcpy(row, p, cols * 4);
    p = row;
  }
  for (int n = 0; n < NV; ++n) v[n] = load(p + n * L);
}

FASTCL_INLINE V softplus(V z) {
  return max(z, V{}) + log1p_unit(exp2(abs(z) * -kLog2e));
}

FASTCL_INLINE V sigmoid(V z) {
  const V t = exp2(abs(z) * -kLog2e);
  return (z < 0.0f ? t : set1(1.0f)) / (1.0f + t);
}

// ---- reductions ------------------------------------------------------------------------------

template <Mask K, Mode M>
__attribute__((noinline)) void reduce_tile(const ScoreBlock& s, const Reduction& o, i64 i, i64 j,
                                           bool square) {
  constexpr bool sums = M != kMax, maxima = M == kMax || M == kSumMax;
  constexpr bool is_phi = M == kSoftplus || M == kRelu || M == kReluSquared;
  constexpr bool scores_masked = maxima || M == kExact;
  V c[MR][NV];
  dots(s, i, j, c);
  const Keep<K> keep(s, i, j);
  V shift[NV], shift2[NV], col_sum[NV], col_max[NV];
  for (int v = 0; v < NV; ++v) {
    shift[v] = load(s.col_shift + j + v * L);
    shift2[v] = M == kExact ? load(o.col_shift2 + j + v * L) : V{};
    col_sum[v] = V{};
    col_max[v] = set1(-kInfinity);
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    V row_sum = V{}, row_max = set1(-kInfinity), e[NV];
    const float row_shift = M == kExact || is_phi ? o.row_shift[i + r] : 0.0f;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      V x = c[r][v] * s.scale + shift[v], by_col;
      if (scores_masked && K != kNone) x = keep(r, v) ? x : set1(-kInfinity);
      if constexpr (maxima) {
        row_max = max(x, row_max);
        col_max[v] = max(x, col_max[v]);
      }
      if constexpr (!sums) continue;
      if constexpr (M == kSoftplus) e[v] = softplus(x + row_shift);
      if constexpr (M == kRelu) e[v] = relu(x + row_shift);
      if constexpr (M == kReluSquared) e[v] = relu(x + row_shift) * relu(x + row_shift);
      if constexpr (!is_phi) e[v] = exp2(M == kExact ? x + row_shift : x);
      if (!scores_masked && K != kNone) e[v] = keep_if(keep(r, v), e[v]);
      by_col = M == kExact ? exp2(x + shift2[v]) : e[v];
      row_sum += e[v];
      col_sum[v] += by_col;
    }
    if constexpr (sums) add_to(o.row_sum + (i + r) * L, row_sum);
    if constexpr (maxima) max_to(o.row_max + (i + r) * L, row_max);
    if constexpr (M == kSum || M == kSumMax)
      if (o.saved && i + r < s.rows)
        store_row(o.saved + (i + r) * o.saved_stride + j, e, s.cols - j);
  }
  if (square) return;
  for (int v = 0; v < NV; ++v) {
    if constexpr (sums) add_to(o.col_sum + j + v * L, col_sum[v]);
    if constexpr (maxima) max_to(o.col_max + j + v * L, col_max[v]);
  }
}

template <Mode M>
void reduce(const ScoreBlock& s, const Reduction& o) {
  sweep(s, [&]<Mask K>(i64 i, i64 j, bool square) { reduce_tile<K, M>(s, o, i, j, square); });
}

// ---- weights ---------------------------------------------------------------------------------

#if FASTCL_BF16
FASTCL_INLINE void store_weights(const Weights& o, i64 i, i64 j, const V (&w)[MR][NV]) {
  static_assert(NV == 2 && MR % 2 == 0);
  for (int r = 0; r < MR; ++r)
    store((float*)((uint16_t*)o.rows + (i + r) * o.stride + j), (V)round_pair(w[r][0], w[r][1]));
  if (!o.cols) return;
  for (int r = 0; r < MR; r += 2)
    for (int v = 0; v < NV; ++v)
      store((float*)o.cols + (i + r) / 2 * o.stride + j + v * L,
            (V)interleave(w[r][v], w[r + 1][v]));
}
#else
FASTCL_INLINE void store_weights(const Weights& o, i64 i, i64 j, const V (&w)[MR][NV]) {
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) store((float*)o.rows + (i + r) * o.stride + j + v * L, w[r][v]);
}
#endif

template <WeightKind W>
FASTCL_INLINE V weight(V x, float u, V v, float row_shift, V col_shift2, bool two_sided) {
  if constexpr (W == kWeightExp) return exp2(x) * (v + u);
  if constexpr (W == kWeightSaved) return x * (v + u);
  if constexpr (W == kWeightExact) {
    const V by_row = exp2(x + row_shift) * u;
    return two_sided ? by_row + exp2(x + col_shift2) * v : by_row;
  }
  const V z = x + row_shift;
  if constexpr (W == kWeightSoftplus) return sigmoid(z) * (v + u);
  if constexpr (W == kWeightRelu) return keep_if(z > 0.0f, v + u);
  return relu(z) * 2.0f * (v + u);
}

template <Mask K, WeightKind W>
__attribute__((noinline)) void weigh_tile(const ScoreBlock& s, const Weights& o, i64 i, i64 j) {
  constexpr bool shifted = W != kWeightExp && W != kWeightSaved;
  V c[MR][NV], shift[NV], shift2[NV], v[NV], col_sum[NV];
  if constexpr (W == kWeightSaved) {
    for (int r = 0; r < MR; ++r)
      if (i + r < s.rows) load_row(o.saved + (i + r) * o.saved_stride + j, c[r], s.cols - j);
      else for (int n = 0; n < NV; ++n) c[r][n] = V{};
  } else {
    dots(s, i, j, c);
  }
  for (int n = 0; n < NV; ++n) {
    shift[n] = W == kWeightSaved ? V{} : load(s.col_shift + j + n * L);
    shift2[n] = W == kWeightExact && o.two_sided ? load(o.col_shift2 + j + n * L) : V{};
    v[n] = load(o.v + j + n * L);
    col_sum[n] = V{};
  }
  const Keep<K> keep(s, i, j);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    V row_sum = V{};
    const float u = o.u[i + r], row_shift = shifted ? o.row_shift[i + r] : 0.0f;
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      V x = W == kWeightSaved ? c[r][n] : c[r][n] * s.scale + shift[n];
      V w = weight<W>(x, u, v[n], row_shift, shift2[n], o.two_sided);
      if constexpr (K != kNone) w = keep_if(keep(r, n), w);
      row_sum += w;
      col_sum[n] += w;
      c[r][n] = w;
    }
    if (o.row_sum) add_to(o.row_sum + (i + r) * L, row_sum);
  }
  store_weights(o, i, j, c);
  if (o.col_sum)
    for (int n = 0; n < NV; ++n) add_to(o.col_sum + j + n * L, col_sum[n]);
}

template <WeightKind W>
void weigh(const ScoreBlock& s, const Weights& o) {
  sweep(s, [&]<Mask K>(i64 i, i64 j, bool) {
    weigh_tile<W == kWeightSaved ? kNone : K, W>(s, o, i, j);  // dropped pairs were saved as zero
  });
}

FASTCL_INLINE void add_to(double* p, V v) {
  *(VDMem*)p = *(const VDMem*)p + __builtin_convertvector(v, VD);
}

// softplus(x) = max(x, 0) + log(1 + e^-|x|) and its derivative need one exponential. The logarithms
// of a tile are one per lane: that of the product of its 1 + t, kept less 1 so that small t keep
// their digits, and below 2^(MR NV).
template <Mask K>
__attribute__((noinline)) void sigmoid_tile(const ScoreBlock& s, const Weights& o, i64 i, i64 j) {
  constexpr float ln2 = 0x1.62e430p-1f;
  V c[MR][NV], shift[NV];
  dots(s, i, j, c);
  for (int n = 0; n < NV; ++n) shift[n] = load(s.col_shift + j + n * L);
  const Keep<K> keep(s, i, j);
  V positive = V{}, product = V{}, weights = V{}, moments = V{};
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      V x = c[r][n] * s.scale + shift[n];
      if constexpr (K != kNone) x = keep(r, n) ? x : set1(-kInfinity);
      const V t = exp2(-abs(x));
      positive += max(x, V{});
      product = product * t + (product + t);
      const V w = (x < 0.0f ? t : set1(1.0f)) / (1.0f + t);
      weights += w;
      moments += w * c[r][n];
      c[r][n] = w;
    }
  }
  add_to(o.totals, positive * ln2 + log1p(product));
  add_to(o.totals + L, weights);
  add_to(o.totals + 2 * L, moments);
  store_weights(o, i, j, c);
}

void weigh_sigmoid(const ScoreBlock& s, const Weights& o) {
  sweep(s, [&]<Mask K>(i64 i, i64 j, bool) { sigmoid_tile<K>(s, o, i, j); });
}

// ---- plain scores, -inf where dropped --------------------------------------------------------

template <Mask K>
__attribute__((noinline)) void score_tile(const ScoreBlock& s, float* out, i64 stride, i64 i,
                                          i64 j) {
  V c[MR][NV];
  dots(s, i, j, c);
  const Keep<K> keep(s, i, j);
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) {
      const V x = c[r][v] * s.scale + load(s.col_shift + j + v * L);
      store(out + (i + r) * stride + j + v * L,
            K == kNone ? x : keep(r, v) ? x : set1(-kInfinity));
    }
}

void scores(const ScoreBlock& s, float* out, i64 stride) {
  sweep(s, [&]<Mask K>(i64 i, i64 j, bool) { score_tile<K>(s, out, stride, i, j); });
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
