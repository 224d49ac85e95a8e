// Weights of similarity tiles times the other rows on Hopper: the core of every backward, and of a
// queue's forward. The twin of kernels/product.py.
//
// A block of 128 own rows stays in shared memory, 64 for each of two consuming warpgroups; the
// other rows stream past both through a ring that one thread of a third warpgroup keeps full. A tile
// is read twice: its rows give scores [64 own, tile], its columns, weighted, the result [64 own, D].
// Weights never leave their registers, whose layout as a sum is also that of a left operand. While
// a consumer turns scores into the next weights, its previous weights are being multiplied.
#include "finish.h"
#include "product.h"
#include "ring.h"
#include "schedule.h"
#include "scores.h"

namespace fastcl::cuda {
namespace {

constexpr int kWidth = 128;  // own rows of a block
constexpr int kHalf = kWidth / 2;
constexpr int kStep = 128;  // other rows of a step: one tile, or two
constexpr int kThreads = 3 * 128;
constexpr int kConsumerWarps = 8;

// The launch bounds give every thread 65536 / 384 registers, that is 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * (kProducerRegisters + 2 * kConsumerRegisters) <= 384 * 168);

// Weights of a pair: an exponential on its way to a mean; exponentials times sums of ratios; or two
// exponentials, for sums that left the fixed offset's range.
enum class Weight { mean, fixed, online };

template <int D, Weight weight>
struct Memory {
  // Other rows of a tile: what the accumulators leave registers for.
  static constexpr int kTile = D == 256 || (D == 128 && weight == Weight::online) ? 64 : kStep;
  static constexpr int kTiles = kStep / kTile;
  static constexpr int kOwnStages = D == 256 ? 1 : 2;
  static constexpr int kStages = D * kTile <= 64 * 128 ? 6 : 4;
  static constexpr int kVectors = weight == Weight::mean ? 0 : weight == Weight::fixed ? 1 : 2;

  unsigned char own[kOwnStages][D / kPanel][panel_bytes(kWidth)];
  unsigned char other[kStages][D / kPanel][panel_bytes(kTile)];
  float vectors[kStages][kVectors ? kVectors : 1][kTile];  // ratios, or gains and shifts
  Ring<kOwnStages> own_ring;
  Ring<kStages> ring;
};

struct Sweep {
  Schedule schedule;
  int n, m, d;
  Skips skips;
  const float* scale;
  float room;
  float* offset;         // written for a mean, read otherwise
  const float* factor;   // null for a mean
  const float *own_gain, *own_shift, *other_gain, *other_shift;  // gains are ratios where fixed
  float* out;       // [N, d], what the first worker of a block leaves
  float* parts;     // [most parts - 1, N, d], what the others do
  float* row_sums;  // [most parts, N], for a mean
};

// The steps of one own block that a worker does.
struct Stretch {
  int block, begin, end;
};
// Calls visit(Stretch) for all of them, in order.
template <class F>
FASTCL_DEVICE void for_each_stretch(const Schedule& schedule, F visit) {
  const i64 begin = schedule.begin(blockIdx.x);
  int block = schedule.block_at(begin), first = (int)(begin - schedule.start(block));
  int left = (int)(schedule.begin(blockIdx.x + 1) - begin);
  while (left > 0) {
    const int end = first + left < schedule.steps ? first + left : schedule.steps;
    visit(Stretch{block++, first, end});
    left -= end - first;
    first = 0;
  }
}

template <int D, Weight weight>
FASTCL_DEVICE void produce(Memory<D, weight>& memory, const TensorMap* own, const TensorMap* other,
                           const Sweep& sweep) {
  using M = Memory<D, weight>;
  Turn<M::kOwnStages> own_turn;
  Turn<M::kStages> turn;
  for_each_stretch(sweep.schedule, [&](const Stretch& stretch) {
    memory.own_ring.wait_empty(own_turn);
    u64* full = &memory.own_ring.full[own_turn.stage];
    barrier_expect(full, sizeof(memory.own[0]));
    for (int panel = 0; panel < D / kPanel; ++panel)
      for (int row = 0; row < kWidth; row += M::kTile)
        copy_panel(memory.own[own_turn.stage][panel] + panel_bytes(row), own, panel * kPanel,
                   stretch.block * kWidth + row, full);
    own_turn.next();
    for (int tile = stretch.begin * M::kTiles; tile < stretch.end * M::kTiles; ++tile) {
      memory.ring.wait_empty(turn);
      full = &memory.ring.full[turn.stage];
      barrier_expect(full, sizeof(memory.other[0]) + M::kVectors * sizeof(memory.vectors[0][0]));
      const int row = tile * M::kTile;
      for (int panel = 0; panel < D / kPanel; ++panel)
        copy_panel(memory.other[turn.stage][panel], other, panel * kPanel, row, full);
      auto& vectors = memory.vectors[turn.stage];
      if constexpr (M::kVectors > 0)
        copy_bytes(vectors[0], sweep.other_gain + row, sizeof(vectors[0]), full);
      if constexpr (M::kVectors > 1)
        copy_bytes(vectors[1], sweep.other_shift + row, sizeof(vectors[1]), full);
      turn.next();
    }
  });
}

template <class T, int D, Weight weight>
class Consumer {
  using M = Memory<D, weight>;
  static constexpr int kTile = M::kTile;
  static constexpr int kScores = kTile / 2;  // of a thread, two to a register of weights

 public:
  FASTCL_DEVICE Consumer(M& memory, const Sweep& sweep, int which)
      : memory_(memory),
        sweep_(sweep),
        which_(which),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32),
        unit_(*sweep.scale * kLog2e),
        shift_(weight == Weight::mean ? exponent_offset(*sweep.scale, sweep.room)
                                      : *sweep.offset * kLog2e) {}

  FASTCL_DEVICE void run() {
    const bool first = blockIdx.x == 0 && threadIdx.x == 0;
    if (weight == Weight::mean && first) *sweep_.offset = shift_ * kLn2;
    for_each_stretch(sweep_.schedule, [&](const Stretch& stretch) { sum(stretch); });
  }

 private:
  FASTCL_DEVICE void sum(const Stretch& stretch) {
    const int own = stretch.block * kWidth + which_ * kHalf;
    const int begin = stretch.begin * M::kTiles, end = stretch.end * M::kTiles;
    row_ = own + 16 * warp_ + lane_ / 4;
    load_own_vectors();
    float scores[kScores];
    u32 weights[kScores / 2];
    memory_.own_ring.wait_full(own_turn_);
    // The first tile's weights.
    memory_.ring.wait_full(turn_);
    hold(scores);
    product_fence();
    multiply_rows(scores);
    product_commit();
    product_wait<0>();
    hold(scores);
    weigh(scores, own, begin * kTile);
    pack_weights(scores, weights);
    await_next(begin + 1 < end);
    float out[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0;
    // At the loop's head the present tile's weights are ready, the next tile is there, and nothing
    // is under way.
    for (int tile = begin + 1; tile < end; ++tile) {
      const Turn<M::kStages> present = turn_;
      turn_.next();
      hold(scores);
      hold(out);
      hold(weights);
      product_fence();
      multiply_rows(scores);
      product_commit();
      product_fence();
      multiply_columns(out, weights, present.stage);
      product_commit();
      product_wait<1>();
      hold(scores);
      weigh(scores, own, tile * kTile);
      // Also what keeps the assembler from taking the exponentials after the products: it does not
      // move them past a branch.
      await_next(tile + 1 < end);
      product_wait<0>();
      hold(out);
      hold(weights);
      release(present);
      pack_weights(scores, weights);
    }
    hold(out);
    hold(weights);
    product_fence();
    multiply_columns(out, weights, turn_.stage);
    product_commit();
    product_wait<0>();
    hold(out);
    release(turn_);
    turn_.next();
    if (lane_ == 0) memory_.own_ring.release(own_turn_);
    own_turn_.next();
    write(out, stretch.block);
  }

  FASTCL_DEVICE void await_next(bool there_is_one) {
    Turn<M::kStages> next = turn_;
    next.next();
    if (there_is_one) memory_.ring.wait_full(next);
  }

  FASTCL_DEVICE void load_own_vectors() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_ + 8 * h;
      const bool inside = row < sweep_.n;
      if constexpr (weight != Weight::mean) gain_[h] = inside ? sweep_.own_gain[row] : 0;
      if constexpr (weight == Weight::online) level_[h] = inside ? sweep_.own_shift[row] : 0;
      sum_[h] = 0;
    }
  }

  // Scores of the tile whose turn it is.
  FASTCL_DEVICE void multiply_rows(float (&scores)[kScores]) {
    const u64 own = by_rows(memory_.own[own_turn_.stage][0] + panel_bytes(which_ * kHalf));
    const u64 other = by_rows(memory_.other[turn_.stage]);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      multiply_panels(T{}, scores, ahead(own, k / 4 * panel_bytes(kWidth) + k % 4 * 32),
                      ahead(other, k / 4 * panel_bytes(kTile) + k % 4 * 32), k > 0);
  }

  template <int k = 0>
  FASTCL_DEVICE void multiply_columns(float (&out)[D / 2], const u32 (&weights)[kScores / 2],
                                      int stage) {
    const u64 other = by_columns(memory_.other[stage], panel_bytes(kTile));
    multiply_held<4 * k>(T{}, out, weights, ahead(other, panel_bytes(16 * k)), true);
    if constexpr (16 * (k + 1) < kTile) multiply_columns<k + 1>(out, weights, stage);
  }

  FASTCL_DEVICE void release(const Turn<M::kStages>& turn) {
    sync_warp();  // vectors are read by every lane
    if (lane_ == 0) memory_.ring.release(turn);
  }

  FASTCL_DEVICE void weigh(float (&c)[kScores], int own, int other) {
    const bool edge = own + kHalf > sweep_.n || other + kTile > sweep_.m ||
                      sweep_.skips.cross(own, kHalf, other, kTile);
    const float shift = weight == Weight::online ? 0 : shift_;
#pragma unroll
    for (int i = 0; i < kScores; ++i) c[i] = c[i] * unit_ - shift;
    if (edge) drop(c, other);
    const float* gains = memory_.vectors[turn_.stage][0] + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int h = i / 2 % 2, column = i / 4 * 8 + i % 2;
      if constexpr (weight == Weight::mean) {
        c[i] = exp2_fast(c[i]);
        sum_[h] += c[i];
      } else if constexpr (weight == Weight::fixed) {
        c[i] = exp2_fast(c[i]) * (gain_[h] + gains[column]);
      } else {
        c[i] = exp2_fast(c[i] - level_[h]) * gain_[h] +
               exp2_fast(c[i] - gains[kTile + column]) * gains[column];
      }
    }
  }

  // Exponents of pairs that do not count leave the range.
  FASTCL_DEVICE void drop(float (&c)[kScores], int other) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int row = row_ + i / 2 % 2 * 8, column = other + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
      const bool out = (row >= sweep_.n) | (column >= sweep_.m) | sweep_.skips.has(column - row);
      c[i] = out ? -kNever : c[i];
    }
  }

  FASTCL_DEVICE void pack_weights(const float (&c)[kScores], u32 (&weights)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weights[i] = pack(T{}, c[2 * i], c[2 * i + 1]);
  }

  FASTCL_DEVICE void write(const float (&out)[D / 2], int block) {
    const int part = (int)blockIdx.x - sweep_.schedule.first_worker(block);
    const float factor = weight == Weight::mean ? 1 : *sweep_.factor;
    float* to = part == 0 ? sweep_.out : sweep_.parts + (i64)(part - 1) * sweep_.n * sweep_.d;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_ + 8 * h;
      float sum = sum_[h];
      if constexpr (weight == Weight::mean) {
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
      }
      if (row >= sweep_.n) continue;
      if (weight == Weight::mean && lane_ % 4 == 0)
        sweep_.row_sums[(i64)part * sweep_.n + row] = sum;
      float* line = to + (i64)row * sweep_.d;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int column = 8 * n + lane_ % 4 * 2;
        if (column < sweep_.d)
          store_pair(line + column, out[4 * n + 2 * h] * factor, out[4 * n + 2 * h + 1] * factor);
      }
    }
  }

  M& memory_;
  const Sweep& sweep_;
  const int which_, warp_, lane_;
  const float unit_, shift_;
  int row_ = 0;                      // own rows of this thread: this one, and 8 on
  float gain_[2], level_[2], sum_[2];  // of these rows
  Turn<M::kOwnStages> own_turn_;
  Turn<M::kStages> turn_;
};

template <class T, int D, Weight weight>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
                   const __grid_constant__ Sweep sweep) {
  // Of two launches one returns: only one form is valid under this offset.
  if constexpr (weight != Weight::mean) {
    const float offset = *sweep.offset;
    if ((weight == Weight::fixed) == (offset != offset)) return;
  }
  auto& memory = *reinterpret_cast<Memory<D, weight>*>(shared_memory());
  if (threadIdx.x == 0) {
    prefetch_map(&own);
    prefetch_map(&other);
    memory.own_ring.init(kConsumerWarps);
    memory.ring.init(kConsumerWarps);
    barrier_fence();
  }
  sync_threads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 256) produce<D, weight>(memory, &own, &other, sweep);
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, D, weight>(memory, sweep, warpgroup).run();
  }
}

Schedule schedule_of(const Pairing& p) {
  return Schedule::make(p.own.count, kWidth, p.other.count, kStep, false, multiprocessors());
}

template <class T, int D, Weight weight>
const char* launch_product(const Pairing& p, const Sweep& sweep, Stream stream) {
  TensorMap own, other;
  const bool is_bf16 = p.type == Type::bf16;
  const int rows = Memory<D, weight>::kTile;
  const auto kernel = product_kernel<T, D, weight>;
  const char* error = allow_shared(kernel, sizeof(Memory<D, weight>));
  if (!error) error = describe(&own, is_bf16, p.own.data, p.own.count, p.d, p.own.stride, rows);
  if (!error)
    error = describe(&other, is_bf16, p.other.data, p.other.count, p.d, p.other.stride, rows);
  if (error) return error;
  return launch(kernel, dim3(sweep.schedule.workers), kThreads, sizeof(Memory<D, weight>), stream,
                false, own, other, sweep);
}

template <class T, Weight weight>
const char* launch_product(const Pairing& p, const Sweep& sweep, Stream stream) {
  return p.d <= 64    ? launch_product<T, 64, weight>(p, sweep, stream)
         : p.d <= 128 ? launch_product<T, 128, weight>(p, sweep, stream)
                      : launch_product<T, 256, weight>(p, sweep, stream);
}

template <Weight weight>
const char* launch_product(const Pairing& p, const Sweep& sweep, Stream stream) {
  return p.type == Type::bf16 ? launch_product<bf16, weight>(p, sweep, stream)
                              : launch_product<f16, weight>(p, sweep, stream);
}

Sweep sweep_of(const Pairing& p, float* workspace, float* out) {
  Sweep sweep{};
  sweep.schedule = schedule_of(p);
  sweep.n = (int)p.own.count, sweep.m = (int)p.other.count, sweep.d = (int)p.d;
  sweep.skips = Skips::of(p);
  sweep.scale = p.scale;
  sweep.room = exponent_room(sweep.n > sweep.m ? sweep.n : sweep.m);
  sweep.out = out, sweep.parts = workspace;
  return sweep;
}

}  // namespace

int64_t product_workspace(const Pairing& p) {
  return refuse(p) ? 0 : (i64)(schedule_of(p).most_parts() - 1) * p.own.count * p.d;
}

const char* product(const Product& call, void* stream_) {
  const Pairing& p = call.pairing;
  if (const char* reason = refuse(p)) return reason;
  const Stream stream = (Stream)stream_;
  Sweep sweep = sweep_of(p, call.workspace, call.out);
  sweep.offset = const_cast<float*>(call.offset), sweep.factor = call.factor;
  sweep.own_gain = call.own.ratio, sweep.other_gain = call.other.ratio;
  const char* error = launch_product<Weight::fixed>(p, sweep, stream);
  sweep.own_gain = call.own.gain, sweep.own_shift = call.own.shift;
  sweep.other_gain = call.other.gain, sweep.other_shift = call.other.shift;
  if (!error) error = launch_product<Weight::online>(p, sweep, stream);
  if (error) return error;
  return add_parts(sweep.schedule, kWidth, call.out, call.workspace, p.own.count, p.d, stream);
}

int64_t mean_workspace(const Pairing& p) {
  return refuse(p) ? 0 : product_workspace(p) + schedule_of(p).most_parts() * p.own.count;
}

const char* mean(const Mean& call, void* stream_) {
  const Pairing& p = call.pairing;
  if (const char* reason = refuse(p)) return reason;
  if (p.type != Type::bf16) return "means are formed of bfloat16 rows only";
  const Stream stream = (Stream)stream_;
  Sweep sweep = sweep_of(p, call.workspace, call.mean);
  sweep.offset = call.offset;
  sweep.row_sums = call.workspace + product_workspace(p);
  if (const char* error = launch_product<bf16, Weight::mean>(p, sweep, stream)) return error;
  Finish finish{};
  finish.pairing = p, finish.room = sweep.room, finish.offset = call.offset;
  finish.schedule = sweep.schedule, finish.width = kWidth;
  finish.own_sums = sweep.row_sums, finish.logsum = call.logsum;
  finish.mean = call.mean, finish.parts = call.workspace;
  return finish_sums(finish, stream);
}

}  // namespace fastcl::cuda
