// What a block kernel is given and what the table of one instruction set offers. Torch-free.
//
// A block is a rectangle of the score matrix. Its operands are *panels*: `panel` rows of the
// matrix side by side, transposed, so that one step along the feature axis is one contiguous line
// of `panel` numbers. The same panels serve as left operand (a few neighbours broadcast) and as
// right operand (whole vectors), hence a symmetric problem packs its rows once.
#pragma once
#include <cstdint>

namespace fastcl::cpu {

using i64 = int64_t;

enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Relation : int { any = 0, same = 1, different = 2 };

constexpr int kMaxSkips = 3;

// Rows of features; `stride` in elements, features contiguous.
struct Matrix {
  const void* data;
  i64 rows, dim, stride;
  Storage storage;
};

// Contiguous rows to write, in fp32 or rounded to bf16; no data where they are not wanted.
struct Output {
  void* data;
  Storage storage;
};

// Scores x_ij = scale * <a_i, b_j> + col_shift_j of one block, and the rule that keeps or drops.
// Pointers are at the block's first row or column; arrays over columns are readable to the end of
// the last panel, and col_shift is -inf past the last column, so that tails vanish by themselves.
struct ScoreBlock {
  const void *a, *b;
  i64 depth;  // packed steps along the feature axis
  i64 row0, rows, col0, cols;
  float scale;
  const float* col_shift;
  Relation relation;
  const int32_t *row_ids, *col_ids;
  int skips;
  i64 skip[kMaxSkips];
  // Symmetric problem: only panels on or right of the diagonal. A square on the diagonal is
  // complete in itself and therefore contributes to rows only.
  bool triangle;
};

// How a tile is reduced. Exponents are in log2 units; the phis in natural units.
enum Mode {
  kSum = 0,     // row and column sums of exp2(x)
  kSumMax,      // the same, and row and column maxima of x
  kMax,         // maxima of x only
  kExact,       // sums of exp2(x + row_shift) by row and of exp2(x + col_shift2) by column
  kSoftplus,    // sums of phi(x + row_shift)
  kRelu,
  kReluSquared,
  kModes
};

// Row results have one slot per vector lane, [rows][lanes]; column results one per column.
struct Reduction {
  float *row_sum, *col_sum, *row_max, *col_max;
  const float *row_shift, *col_shift2;
  float* saved;  // where kSum and kSumMax store the exponentials; may be null
  i64 saved_stride;
};

// W_ij = dLoss/dx_ij up to the factors that multiply whole gradients.
enum WeightKind {
  kWeightExp = 0,  // exp2(x) (u_i + v_j)
  kWeightExact,    // u_i exp2(x + row_shift_i) + v_j exp2(x + col_shift2_j)
  kWeightSaved,    // saved_ij (u_i + v_j)
  kWeightSoftplus, // phi'(x + row_shift_i) (u_i + v_j)
  kWeightRelu,
  kWeightReluSquared,
  kWeightSigmoid,  // softplus'(x), x in log2 units; and sums over all pairs
  kWeightKinds
};

struct Weights {
  const float *u, *v;
  const float *row_shift, *col_shift2;
  bool two_sided;  // kWeightExact: v is not all zero
  const float* saved;
  i64 saved_stride;
  void* rows;  // W as left operand of W k: [rows][stride] of the product's precision
  void* cols;  // 16-bit products only: row pairs of W, as left operand of W^T q; may be null
  i64 stride;
  float *row_sum, *col_sum;  // as in Reduction; may be null
  double* totals;  // kWeightSigmoid: [3][lanes] += softplus(x), W and W <a, b>
};

// out[r][d] (+)= alpha * sum_k w(r, k) values[k][d]; strides of w in 32-bit units.
struct Product {
  const void* w;
  i64 w_row, w_step;
  const void* values;
  i64 values_stride;
  i64 rows, steps, dim;
  float* out;
  i64 out_stride;
  float alpha;
  bool fresh;   // out holds nothing yet: store instead of adding
  void* slice;  // room for steps x panel numbers, or null: read the values where they are
  // Symmetric block on the diagonal: row r takes steps from (kFromPanel) or up to (kToPanel) the
  // start of its own panel.
  enum Limit { kWhole, kFromPanel, kToPanel } limit;
};

// One instruction set and product precision.
struct Kernels {
  const char* name;
  i64 panel, lanes;
  i64 pack;  // features per packed 32-bit unit: 1 in fp32, 2 in bf16
  void (*pack_panels)(const Matrix&, i64 row0, i64 rows, void* panels);
  // Right operand of the gradient products: row-major fp32, or 16-bit row pairs.
  void (*pack_values)(const Matrix&, i64 row0, i64 rows, void* values, i64 stride);
  void (*reduce[kModes])(const ScoreBlock&, const Reduction&);
  void (*weigh[kWeightKinds])(const ScoreBlock&, const Weights&);
  void (*scores)(const ScoreBlock&, float* out, i64 stride);
  void (*product)(const Product&);
  // totals[i] += the lanes of row i, which are cleared; rows up to a whole number of vectors.
  void (*fold)(float* lanes, i64 rows, double* totals);
  float (*largest_square)(const Matrix&, i64 row0, i64 rows);
  void (*normalize)(const Matrix&, i64 row0, i64 rows, float eps, float* y, float* inverse);
  void (*normalize_backward)(const Matrix& grad, i64 row0, i64 rows, const float* y,
                             const float* inverse, float eps, const float* partner,
                             const float* pull, const Output& dx);
  void (*row_dots)(const float* x, const float* y, i64 dim, i64 row0, i64 rows, float* out);
  double (*dot)(const Matrix&, const float* y, i64 row0, i64 rows);  // <x, y>, y contiguous
  void (*exp2)(const float* x, float* y, i64 n);
};

// Defined one per isa_*.cpp; null where the compiler does not target that architecture.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace fastcl::cpu
