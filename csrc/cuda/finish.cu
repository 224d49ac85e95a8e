// Partial sums of exponentials to log-sum-exps and softmax-weighted means, on any device.
#include "finish.h"

#include "scores.h"

namespace fastcl::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct Shared {
  float sums[kWarps][kRows];
  float total[kRows];
  float row[256];
  float tops[kWarps], totals[kWarps];
  float weights[kThreads];
};

// One row again with a running maximum: (largest score, sum of 2^(score - largest)) in log2 units.
template <class T>
FASTCL_DEVICE float score(const Shared& shared, const Finish& f, i64 other, float unit) {
  const T* row = static_cast<const T*>(f.pairing.other.data) + other * f.pairing.other.stride;
  float dot = 0;
  for (int c = 0; c < (int)f.pairing.d; ++c) dot += shared.row[c] * widen(row[c]);
  return dot * unit;
}

struct Running {
  float top = -kNever, total = 0;
  FASTCL_DEVICE void add(float t, float weight) {
    const float higher = t > top ? t : top;
    total = total * exp2_fast(top - higher) + weight * exp2_fast(t - higher);
    top = higher;
  }
};

template <class T>
FASTCL_DEVICE void redo(Shared& shared, const Finish& f, const Skips& skips, i64 row, float unit) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int d = (int)f.pairing.d, m = (int)f.pairing.other.count;
  const T* own = static_cast<const T*>(f.pairing.own.data) + row * f.pairing.own.stride;
  for (int c = thread; c < d; c += kThreads) shared.row[c] = widen(own[c]);
  sync_threads();
  Running sum;
  for (int j = thread; j < m; j += kThreads)
    if (!skips.has(j - (int)row)) sum.add(score<T>(shared, f, j, unit), 1);
  for (int mask = 16; mask; mask /= 2) {
    const float top = shuffle_xor(sum.top, mask), total = shuffle_xor(sum.total, mask);
    // both lanes add in one order, so that all end with the same bits
    Running both;
    const bool first = !(lane & mask);
    both.add(first ? sum.top : top, first ? sum.total : total);
    both.add(first ? top : sum.top, first ? total : sum.total);
    sum = both;
  }
  if (lane == 0) shared.tops[warp] = sum.top, shared.totals[warp] = sum.total;
  sync_threads();
  sum = Running();
  for (int w = 0; w < kWarps; ++w) sum.add(shared.tops[w], shared.totals[w]);
  if (thread == 0)
    f.logsum[row] = sum.total == 0 ? -INFINITY : (log2(sum.total) + sum.top) * kLn2;
  if (!f.mean) return;
  float mean = 0;
  for (int first = 0; first < m; first += kThreads) {
    const int j = first + thread;
    const bool counts = j < m && !skips.has(j - (int)row);
    shared.weights[thread] = counts ? exp2_fast(score<T>(shared, f, j, unit) - sum.top) : 0;
    sync_threads();
    for (int k = 0; thread < d && k < kThreads && first + k < m; ++k) {
      const T* other = static_cast<const T*>(f.pairing.other.data) +
                       (first + k) * f.pairing.other.stride;
      mean += shared.weights[k] * widen(other[thread]);
    }
    sync_threads();
  }
  if (thread < d) f.mean[row * d + thread] = sum.total == 0 ? 0 : mean / sum.total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Finish f, const __grid_constant__ Skips skips) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const i64 n = f.pairing.own.count, first = (i64)blockIdx.x * kRows, row = first + lane;
  const int block = (int)(first / f.width);
  const int parts = f.own_sums || f.mean ? f.schedule.parts(block) : 0;
  const int slots =
      f.other_slots == kSlotPerMeeting ? f.schedule.times_met(block) : f.other_slots;
  float sum = 0;
  if (row < n) {
    for (int i = warp; f.own_sums && i < parts; i += kWarps) sum += f.own_sums[i * n + row];
    for (int i = warp; f.other_sums && i < slots; i += kWarps) sum += f.other_sums[i * n + row];
  }
  shared.sums[warp][lane] = sum;
  sync_threads();
  if (warp == 0) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w][lane];
    shared.total[lane] = total;
  }
  sync_threads();
  const float scale = *f.pairing.scale, fixed = exponent_offset(scale, f.room);
  if (f.mean) {
    const i64 d = f.pairing.d;
    for (int at = thread; at < kRows * d; at += kThreads) {
      const i64 r = first + at / d, place = first * d + at;
      if (r >= n) break;
      float mean = f.mean[place];
      for (int i = 1; i < parts; ++i) mean += f.parts[(i - 1) * n * d + place];
      f.mean[place] = mean / shared.total[at / d];  // of a sum that was lost, see below
    }
  }
  for (int r = 0; r < kRows && first + r < n; ++r) {
    const float total = shared.total[r];
    // what is not a number stays so: no other offset would make it one
    if ((total >= kLost && total < INFINITY) || total != total) {
      if (thread == r) f.logsum[first + r] = (log2(total) + fixed) * kLn2;
      continue;
    }
    // The offset did not fit this row: whoever reads it later must not rely on it.
    sync_threads();
    redo<T>(shared, f, skips, first + r, scale * kLog2e);
    if (thread == 0) *f.offset = NAN;
  }
}

constexpr int kBand = 8;  // rows of a block of threads

__global__ void __launch_bounds__(kThreads)
    add_kernel(const __grid_constant__ Schedule schedule, int width, float* out, const float* parts,
               i64 rows, i64 d) {
  const int count = schedule.parts((int)((i64)blockIdx.x * kBand / width));
  if (count == 1) return;
  for (i64 i = threadIdx.x; i < kBand * d; i += kThreads) {
    const i64 at = (i64)blockIdx.x * kBand * d + i;
    if (at >= rows * d) return;
    float sum = out[at];
    for (int part = 1; part < count; ++part) sum += parts[(part - 1) * rows * d + at];
    out[at] = sum;
  }
}

}  // namespace

const char* finish_sums(const Finish& call, Stream stream) {
  const unsigned blocks = (unsigned)((call.pairing.own.count + kRows - 1) / kRows);
  const auto kernel = call.pairing.type == Type::bf16 ? finish_kernel<bf16> : finish_kernel<f16>;
  return launch(kernel, dim3(blocks), kThreads, sizeof(Shared), stream, false, call,
                Skips::of(call.pairing));
}

const char* add_parts(const Schedule& schedule, int width, float* out, const float* parts, i64 rows,
                      i64 d, Stream stream) {
  return launch(add_kernel, dim3((unsigned)((rows + kBand - 1) / kBand)), kThreads, 0, stream,
                false, schedule, width, out, parts, rows, d);
}

}  // namespace fastcl::cuda
