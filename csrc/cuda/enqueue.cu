// Normalise, round and store rows at the head of a ring of keys, and move the head, in one launch.
#include "enqueue.h"

#include "device.h"

namespace fastcl::cuda {
namespace {

constexpr int kThreads = 256, kRowsPerBlock = kThreads / 32;

FASTCL_DEVICE float widen(float x) { return x; }
FASTCL_DEVICE void store(float* to, float x) { *to = x; }
template <class T>
FASTCL_DEVICE void store(T* to, float x) {
  to->bits = (uint16_t)pack(T{}, x, 0.0f);
}

// What a row is multiplied with, known to every lane of its warp.
template <class From>
FASTCL_DEVICE float factor_of(const From* row, i64 d, float eps, int lane) {
  // the largest entry is taken out, so that no square overflows or vanishes
  float top = 0.0f;
  for (i64 i = lane; i < d; i += 32) top = fmaxf(fabsf(widen(row[i])), top);
  for (int mask = 16; mask; mask /= 2) top = fmaxf(shuffle_xor(top, mask), top);
  const float unit = top > 0.0f && top < HUGE_VALF ? fmaxf(top, 1e-38f) : 1.0f;
  const float inverse = 1.0f / unit;
  float squares = 0.0f;
  for (i64 i = lane; i < d; i += 32) {
    const float x = widen(row[i]) * inverse;
    squares += x * x;
  }
  for (int mask = 16; mask; mask /= 2) squares += shuffle_xor(squares, mask);
  const float length = sqrtf(squares) * unit;
  return 1.0f / (length < eps ? eps : length);  // NaN stays NaN
}

// `place`, at most one turn of the ring beyond its start.
FASTCL_DEVICE i64 wrapped(i64 place, i64 size) { return place < size ? place : place - size; }

// A warp per row. The first `dropped` rows of q would be overwritten by its last ones; `dropped`
// and n leave the head `skipped` and `moved` slots further, both below size.
template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    enqueue_kernel(Enqueue q, i64 dropped, i64 skipped, i64 moved) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 head = *q.pointer, filled = *q.fill, begin = wrapped(head + skipped, q.size);
  for (i64 i = (i64)blockIdx.x * kRowsPerBlock + warp; i < q.n - dropped;
       i += (i64)gridDim.x * kRowsPerBlock) {
    const From* row = static_cast<const From*>(q.rows) + (dropped + i) * q.stride;
    const i64 slot = wrapped(begin + i, q.size);
    To* key = static_cast<To*>(q.keys) + slot * q.d;
    const float factor = q.eps > 0.0f ? factor_of(row, q.d, q.eps, lane) : 1.0f;
    for (i64 c = lane; c < q.d; c += 32) store(key + c, widen(row[c]) * factor);
    if (lane == 0) q.key_ids[slot] = q.ids ? q.ids[dropped + i] : q.no_id;
  }
  sync_grid();  // until every block has read the head
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *q.pointer = wrapped(head + moved, q.size);
    *q.fill = filled + q.n < q.size ? filled + q.n : q.size;
  }
}

template <class From, class To>
const char* launch_enqueue(const Enqueue& q, void* stream) {
  const auto kernel = enqueue_kernel<From, To>;
  const i64 dropped = q.n > q.size ? q.n - q.size : 0;
  const i64 wanted = (q.n - dropped + kRowsPerBlock - 1) / kRowsPerBlock;
  const i64 resident = (i64)multiprocessors() * blocks_per_multiprocessor(kernel, kThreads, 0);
  if (resident == 0) return "no kernel image runs on this device";
  const unsigned blocks = (unsigned)(wanted < resident ? wanted : resident);
  return launch(kernel, dim3(blocks), kThreads, 0, (Stream)stream, true, q, dropped,
                dropped % q.size, q.n % q.size);
}

template <class From>
const char* launch_from(const Enqueue& q, void* stream) {
  switch (q.keys_type) {
    case Type::f32: return launch_enqueue<From, float>(q, stream);
    case Type::bf16: return launch_enqueue<From, bf16>(q, stream);
    case Type::f16: return launch_enqueue<From, f16>(q, stream);
  }
  return "unknown type of keys";
}

}  // namespace

const char* enqueue(const Enqueue& q, void* stream) {
  if (q.n == 0) return nullptr;
  if (q.n < 0 || q.d < 1 || q.size < 1) return "a queue needs rows of a width and a size";
  switch (q.rows_type) {
    case Type::f32: return launch_from<float>(q, stream);
    case Type::bf16: return launch_from<bf16>(q, stream);
    case Type::f16: return launch_from<f16>(q, stream);
  }
  return "unknown type of rows";
}

}  // namespace fastcl::cuda
