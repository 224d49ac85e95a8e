// What weights are made of, from gradients and log-sum-exps, on any device.
#include "device.h"
#include "product.h"
#include "scores.h"

namespace fastcl::cuda {
namespace {

constexpr int kThreads = 512;
// Weights stay below 2^15, so that the sum of a row's and a column's does not leave fp16.
constexpr int kRoom = 13;

FASTCL_DEVICE float magnitude(float x) { return x < 0 ? -x : x; }

// Every block of threads finds the largest gradient by itself: one launch, and one order.
__global__ void __launch_bounds__(kThreads) gains_kernel(const __grid_constant__ Gains call) {
  auto* tops = reinterpret_cast<float*>(shared_memory());
  float top = 0;
  for (int s = 0; s < 2; ++s) {
    const Side& side = call.sides[s];
    if (!side.gradient) continue;
    for (i64 i = threadIdx.x; i < side.count; i += kThreads) {
      const float g = magnitude(side.gradient[i]);
      // nothing flows through an empty sum, and one broken gradient shall not spoil the others
      if (side.logsum[i] != -INFINITY && g > top && g < INFINITY) top = g;
    }
  }
  tops[threadIdx.x] = top;
  sync_threads();
  for (int half = kThreads / 2; half; half /= 2) {
    const float other = tops[threadIdx.x ^ half];
    sync_threads();
    if (other > top) top = other;
    tops[threadIdx.x] = top;
    sync_threads();
  }
  // a power of two, itself no subnormal number
  const int power = top < 1e-30f ? -100 : ilogb(top);
  const float unit = ldexp(1.0f, power - kRoom);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    call.unit[0] = unit;
    call.unit[1] = unit * *call.scale;
  }
  const Side& side = call.sides[blockIdx.y];
  const float offset = *call.offset * kLog2e;
  const i64 size = (side.count + 127) / 128 * 128, i = (i64)blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  const bool counts = side.gradient && i < side.count && side.logsum[i] != -INFINITY;
  const float gain = counts ? side.gradient[i] / unit : 0;
  const float shift = counts ? side.logsum[i] * kLog2e : kNever;
  side.gain[i] = gain;
  side.shift[i] = shift;
  side.ratio[i] = counts ? gain * exp2_fast(offset - shift) : 0;
}

}  // namespace

const char* gains(const Gains& call, void* stream) {
  const i64 most = padded(call.sides[0].count > call.sides[1].count ? call.sides[0].count
                                                                    : call.sides[1].count);
  return launch(gains_kernel, dim3((unsigned)((most + kThreads - 1) / kThreads), 2), kThreads,
                kThreads * sizeof(float), (Stream)stream, false, call);
}

}  // namespace fastcl::cuda
