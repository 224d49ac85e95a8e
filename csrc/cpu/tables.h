// The table of one instruction set: the last thing an isa_*.cpp includes.
#pragma once
#include "packing.h"
#include "product.h"
#include "scores.h"

namespace fastcl::cpu::FASTCL_ISA {
namespace {

template <Storage S>
FASTCL_INLINE float square_of_row(const char* row, i64 dim) {
  V sum = V{};
  for (i64 d = 0; d < dim; d += L) {
    const V v = load_features<S>(row, d, dim);
    sum += v * v;
  }
  return sum_lanes((const float*)&sum);
}

float largest_square(const Matrix& x, i64 row0, i64 rows) {
  float largest = 0;
  with_storage(x.storage, [&]<Storage S>() {
    for (i64 i = row0; i < row0 + rows; ++i) {
      const float square = square_of_row<S>(row_of(x, i), x.dim);
      if (!(square <= largest)) largest = square;  // a NaN stays
    }
  });
  return largest;
}

void fold(float* lanes, i64 rows, double* totals) {
  for (i64 i = 0; i < rows; i += L) {
    VI block[L];
    V sum = V{};
    for (int l = 0; l < L; ++l) {
      block[l] = (VI)load(lanes + (i + l) * L);
      store(lanes + (i + l) * L, V{});
    }
    transpose(block);
    for (int l = 0; l < L; ++l) sum += (V)block[l];
    for (int l = 0; l < L; ++l) totals[i + l] += sum[l];
  }
}

FASTCL_INLINE void store_features(float* row, i64 d, i64 dim, V v) {
  if (d + L <= dim) return store(row + d, v);
  std::memcpy(row + d, &v, (dim - d) * 4);
}

FASTCL_INLINE void store_features(uint16_t* row, i64 d, i64 dim, V v) {
  const VH h = narrow_bf16(v);
  std::memcpy(row + d, &h, least(L, dim - d) * 2);
}

void normalize(const Matrix& x, i64 row0, i64 rows, float eps, float* y, float* inverse) {
  with_storage(x.storage, [&]<Storage S>() {
    for (i64 i = row0; i < row0 + rows; ++i) {
      const char* row = row_of(x, i);
      const float length = __builtin_sqrtf(square_of_row<S>(row, x.dim));
      inverse[i] = eps == kInfinity ? 1.0f : 1.0f / (length < eps ? eps : length);
      for (i64 d = 0; d < x.dim; d += L)
        store_features(y + i * x.dim, d, x.dim, load_features<S>(row, d, x.dim) * inverse[i]);
    }
  });
}

template <Storage S>
FASTCL_INLINE float dot_rows(const char* a, const float* b, i64 dim) {
  V sum = V{};
  for (i64 d = 0; d < dim; d += L)
    sum += load_features<S>(a, d, dim) * load_features<Storage::f32>((const char*)b, d, dim);
  return sum_lanes((const float*)&sum);
}

// dx = (h - y <y, h>) / |x|, and h / eps where |x| < eps; h = g, plus pull_i partner_i if there is
// a partner, whose cosine with y has the gradient pull.
void normalize_backward(const Matrix& grad, i64 row0, i64 rows, const float* y,
                        const float* inverse, float eps, const float* partner, const float* pull,
                        const Output& dx) {
  const i64 dim = grad.dim;
  with_storage(grad.storage, [&]<Storage S>() {
    for (i64 i = row0; i < row0 + rows; ++i) {
      const char* g = row_of(grad, i);
      const char *unit = (const char*)(y + i * dim), *other = (const char*)(partner + i * dim);
      const float p = partner ? pull[i] : 0.0f;
      const auto h = [&](i64 d) FASTCL_INLINE_LAMBDA {
        const V own = load_features<S>(g, d, dim);
        return partner ? own + load_features<Storage::f32>(other, d, dim) * p : own;
      };
      V sum = V{};
      for (i64 d = 0; d < dim; d += L) sum += h(d) * load_features<Storage::f32>(unit, d, dim);
      const float radial = inverse[i] >= 1.0f / eps ? 0.0f : sum_lanes((const float*)&sum);
      for (i64 d = 0; d < dim; d += L) {
        const V tangent = h(d) - load_features<Storage::f32>(unit, d, dim) * radial;
        if (dx.storage == Storage::f32)
          store_features((float*)dx.data + i * dim, d, dim, tangent * inverse[i]);
        else
          store_features((uint16_t*)dx.data + i * dim, d, dim, tangent * inverse[i]);
      }
    }
  });
}

void row_dots(const float* x, const float* y, i64 dim, i64 row0, i64 rows, float* out) {
  for (i64 i = row0; i < row0 + rows; ++i)
    out[i] = dot_rows<Storage::f32>((const char*)(x + i * dim), y + i * dim, dim);
}

double dot(const Matrix& x, const float* y, i64 row0, i64 rows) {
  double sum = 0;
  with_storage(x.storage, [&]<Storage S>() {
    for (i64 i = row0; i < row0 + rows; ++i) sum += dot_rows<S>(row_of(x, i), y + i * x.dim, x.dim);
  });
  return sum;
}

void exp2_array(const float* x, float* y, i64 n) {
  for (i64 i = 0; i < n; i += L)
    store_features(y, i, n, exp2(load_features<Storage::f32>((const char*)x, i, n)));
}

#define FASTCL_TEXT_(x) #x
#define FASTCL_TEXT(x) FASTCL_TEXT_(x)

const Kernels table = {
    .name = FASTCL_TEXT(FASTCL_ISA),
    .panel = PANEL,
    .lanes = L,
    .pack = kPack,
    .pack_panels = pack_panels,
    .pack_values = pack_values,
    .reduce = {reduce<kSum>, reduce<kSumMax>, reduce<kMax>, reduce<kExact>, reduce<kSoftplus>,
               reduce<kRelu>, reduce<kReluSquared>},
    .weigh = {weigh<kWeightExp>, weigh<kWeightExact>, weigh<kWeightSaved>, weigh<kWeightSoftplus>,
              weigh<kWeightRelu>, weigh<kWeightReluSquared>, weigh_sigmoid},
    .scores = scores,
    .product = product,
    .fold = fold,
    .largest_square = largest_square,
    .normalize = normalize,
    .normalize_backward = normalize_backward,
    .row_dots = row_dots,
    .dot = dot,
    .exp2 = exp2_array,
};

}  // namespace
}  // namespace fastcl::cpu::FASTCL_ISA
