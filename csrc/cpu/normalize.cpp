#include <algorithm>

#include "ops.h"

namespace fastcl::cpu {
namespace {
// Rows per task: some five microseconds.
i64 grain(i64 dim) { return std::max((i64)1, (1 << 13) / dim); }
}  // namespace

void normalize(const Kernels* k, const Pool& pool, const Matrix& x, float eps, float* y,
               float* inverse) {
  parallel_ranges(pool, x.rows, grain(x.dim), [&](i64 begin, i64 end) {
    k->normalize(x, begin, end - begin, eps, y, inverse);
  });
}

void normalize_backward(const Kernels* k, const Pool& pool, const Matrix& grad, const float* y,
                        const float* inverse, float eps, const Output& dx) {
  parallel_ranges(pool, grad.rows, grain(grad.dim), [&](i64 begin, i64 end) {
    k->normalize_backward(grad, begin, end - begin, y, inverse, eps, nullptr, nullptr, dx);
  });
}

void normalize_pair(const Kernels* k, const Pool& pool, const Matrix& a, const Matrix& b, float eps,
                    float* rows, float* cosines, float* inverse) {
  float* second = rows + a.rows * a.dim;
  parallel_ranges(pool, a.rows, grain(a.dim), [&](i64 begin, i64 end) {
    const i64 count = end - begin;
    k->normalize(a, begin, count, eps, rows, inverse);
    k->normalize(b, begin, count, eps, second, inverse + a.rows);
    k->row_dots(rows, second, a.dim, begin, count, cosines);
  });
}

void normalize_pair_backward(const Kernels* k, const Pool& pool, const Matrix& grad_a,
                             const Matrix& grad_b, const float* grad_cosines, const float* rows,
                             const float* inverse, float eps, const Output& da,
                             const Output& db) {
  const i64 n = grad_a.rows;
  const float* other = rows + n * grad_a.dim;
  parallel_ranges(pool, n, grain(grad_a.dim), [&](i64 begin, i64 end) {
    const i64 count = end - begin;
    if (da.data)
      k->normalize_backward(grad_a, begin, count, rows, inverse, eps, other, grad_cosines, da);
    if (db.data)
      k->normalize_backward(grad_b, begin, count, other, inverse + n, eps, rows, grad_cosines, db);
  });
}

}  // namespace fastcl::cpu
