#include "ops.h"

namespace fastcl::cpu {
namespace {
// Rows per task: memory-bound work of some ten microseconds.
i64 grain(i64 dim) { return (1 << 15) / (dim < (1 << 15) ? dim : (1 << 15)); }
}  // namespace

void normalize(const Kernels* k, const Pool& pool, const Matrix& x, float eps, float* y,
               float* inverse) {
  parallel_ranges(pool, x.rows, grain(x.dim), [&](i64 begin, i64 end) {
    k->normalize(x, begin, end - begin, eps, y, inverse);
  });
}

void normalize_backward(const Kernels* k, const Pool& pool, const Matrix& grad, const float* y,
                        const float* inverse, float eps, float* dx) {
  parallel_ranges(pool, grad.rows, grain(grad.dim), [&](i64 begin, i64 end) {
    k->normalize_backward(grad, begin, end - begin, y, inverse, eps, dx);
  });
}

}  // namespace fastcl::cpu
