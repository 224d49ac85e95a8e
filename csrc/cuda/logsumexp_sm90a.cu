// Log-sum-exp of similarity tiles on Hopper: sums of every own row, and of every other row beside
// them, from one sweep. The twin of kernels/sweep.py.
//
// A block of 256 own rows stays in shared memory, 128 for each of two consuming warpgroups; the
// other rows stream past both through a ring that one thread of a third warpgroup keeps full. A
// consumer forms products [64 other, 128 own], so that own sums grow in its registers element by
// element; while it takes the exponentials of one tile, the products of the next are under way.
// Sums of other rows are short: they leave through shared memory to a warp that adds the two
// consumers' halves and writes them to a slot. No atomics; every sum has one order.
#include "finish.h"
#include "logsumexp.h"
#include "ring.h"
#include "schedule.h"
#include "scores.h"

namespace fastcl::cuda {
namespace {

constexpr int kWidth = 256;            // own rows of a block
constexpr int kHalf = kWidth / 2;      // of a consumer
constexpr int kTile = 64;              // other rows of a tile
constexpr int kStep = 2 * kTile;       // of a step: two tiles, one in each accumulator
constexpr int kMeeting = kWidth / kStep;  // steps of two blocks of a symmetric problem
constexpr int kThreads = 3 * 128;
constexpr int kConsumerWarps = 8;
constexpr int kSumStages = 2;

// The launch bounds give every thread 65536 / 384 registers, that is 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * (kProducerRegisters + 2 * kConsumerRegisters) <= 384 * 168);

template <int D>
struct Memory {
  static constexpr int kOwnStages = D == 256 ? 1 : 2;
  static constexpr int kStages = D == 256 ? 3 : D == 128 ? 5 : 8;

  unsigned char own[kOwnStages][D / kPanel][panel_bytes(kWidth)];
  unsigned char other[kStages][D / kPanel][panel_bytes(kTile)];
  float other_sums[kSumStages][2][kTile];  // of each consumer
  float own_sums[2][kHalf];
  Ring<kOwnStages> own_ring;
  Ring<kStages> ring;
  Ring<kSumStages> sums;  // filled by the consumers, emptied by the warp that writes
};

struct Sweep {
  Schedule schedule;
  int n, m;
  Skips skips;
  const float* scale;
  float room;
  float* own_sums;    // [most parts, n]
  float* other_sums;  // [slots, m], or null
  bool added;         // see Plan
  float* offset;
};

// The steps of one worker, in order.
class Walk {
 public:
  FASTCL_DEVICE Walk(const Schedule& schedule, int worker)
      : schedule_(schedule),
        left_((int)(schedule.begin(worker + 1) - schedule.begin(worker))),
        block_(schedule.block_at(schedule.begin(worker))),
        step_((int)(schedule.begin(worker) - schedule.start(block_))),
        length_(schedule.length(block_)) {}
  FASTCL_DEVICE bool done() const { return left_ == 0; }
  FASTCL_DEVICE bool last() const { return left_ == 1; }
  FASTCL_DEVICE bool ends_block() const { return left_ == 1 || step_ + 1 == length_; }
  FASTCL_DEVICE int block() const { return block_; }
  FASTCL_DEVICE int own() const { return block_ * kWidth; }
  // How many meetings on the other rows are; 0 where sides differ.
  FASTCL_DEVICE int apart() const { return schedule_.symmetric() ? step_ / kMeeting : 0; }
  FASTCL_DEVICE int other() const {
    if (!schedule_.symmetric()) return step_ * kStep;
    return schedule_.met(block_, apart()) * kWidth + step_ % kMeeting * kStep;
  }
  // Both triangles of a block's meeting with itself are computed, and both are own sums.
  FASTCL_DEVICE bool feeds_other() const { return !schedule_.symmetric() || apart() > 0; }
  FASTCL_DEVICE void next() {
    --left_;
    if (++step_ == length_) length_ = schedule_.length(++block_), step_ = 0;
  }

 private:
  const Schedule& schedule_;
  int left_, block_, step_, length_;
};

template <int D>
FASTCL_DEVICE void produce(Memory<D>& memory, const TensorMap* own, const TensorMap* other,
                           const Sweep& sweep) {
  Turn<Memory<D>::kOwnStages> own_turn;
  Turn<Memory<D>::kStages> turn;
  int held = -1;
  for (Walk walk(sweep.schedule, blockIdx.x); !walk.done(); walk.next()) {
    if (walk.block() != held) {
      held = walk.block();
      memory.own_ring.wait_empty(own_turn);
      u64* full = &memory.own_ring.full[own_turn.stage];
      barrier_expect(full, sizeof(memory.own[0]));
      for (int panel = 0; panel < D / kPanel; ++panel)
        for (int row = 0; row < kWidth; row += kTile)
          copy_panel(memory.own[own_turn.stage][panel] + panel_bytes(row), own, panel * kPanel,
                     walk.own() + row, full);
      own_turn.next();
    }
    for (int row = 0; row < kStep; row += kTile) {
      memory.ring.wait_empty(turn);
      u64* full = &memory.ring.full[turn.stage];
      barrier_expect(full, sizeof(memory.other[0]));
      for (int panel = 0; panel < D / kPanel; ++panel)
        copy_panel(memory.other[turn.stage][panel], other, panel * kPanel, walk.other() + row,
                   full);
      turn.next();
    }
  }
}

// One warp adds up the consumers' sums of other rows and writes them; a row is always one lane's.
template <int D>
FASTCL_DEVICE void write_other_sums(Memory<D>& memory, const Sweep& sweep) {
  const int lane = threadIdx.x % 32;
  if (sweep.added) {
    float* slot = sweep.other_sums + (i64)blockIdx.x * sweep.m;
    for (int row = lane; row < sweep.m; row += 32) slot[row] = 0;
  }
  Turn<kSumStages> turn;
  for (Walk walk(sweep.schedule, blockIdx.x); !walk.done(); walk.next()) {
    if (!walk.feeds_other()) continue;
    const int slot = sweep.added                   ? (int)blockIdx.x
                     : sweep.schedule.symmetric() ? walk.apart() - 1
                                                  : walk.block();
    for (int tile = 0; tile < 2; ++tile) {
      const int row = walk.other() + tile * kTile + lane;
      float* to = sweep.other_sums + (i64)slot * sweep.m + row;
      float low = sweep.added && row < sweep.m ? to[0] : 0;
      float high = sweep.added && row + 32 < sweep.m ? to[32] : 0;
      memory.sums.wait_full(turn);
      const auto& halves = memory.other_sums[turn.stage];
      low += halves[0][lane] + halves[1][lane];
      high += halves[0][lane + 32] + halves[1][lane + 32];
      sync_warp();
      if (lane == 0) memory.sums.release(turn);
      turn.next();
      if (row < sweep.m) to[0] = low;
      if (row + 32 < sweep.m) to[32] = high;
    }
  }
}

template <class T, int D>
class Consumer {
 public:
  FASTCL_DEVICE Consumer(Memory<D>& memory, const Sweep& sweep, int which)
      : memory_(memory),
        sweep_(sweep),
        which_(which),
        thread_(threadIdx.x % 128),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        unit_(*sweep.scale * kLog2e),
        shift_(exponent_offset(*sweep.scale, sweep.room)) {}

  FASTCL_DEVICE void run() {
    Walk walk(sweep_.schedule, blockIdx.x);
    if (blockIdx.x == 0 && which_ == 0 && thread_ == 0) *sweep_.offset = shift_ * kLn2;
    float a[64], b[64];
#pragma unroll
    for (int i = 0; i < 32; ++i) total_[i] = 0;
    memory_.own_ring.wait_full(own_turn_);
    multiply(a);
    product_wait<0>();
    hold(a);
    release();
    // At the loop's head a holds the products of a step's first tile, and nothing is under way; the
    // last step is apart, since no products may begin under a condition.
    while (!walk.last()) {
      const int block = walk.block(), own = own_row(walk), other = walk.other();
      const bool feeds = feeds_other(walk), ends = walk.ends_block();
      walk.next();
      multiply(b);
      add_exponentials(a, own, other, feeds);
      product_wait<0>();
      hold(b);
      release();
      if (ends) {
        if (lane_ == 0) memory_.own_ring.release(own_turn_);
        own_turn_.next();
        memory_.own_ring.wait_full(own_turn_);
      }
      multiply(a);
      add_exponentials(b, own, other + kTile, feeds);
      if (ends) write_own_sums(block, own);
      product_wait<0>();
      hold(a);
      release();
    }
    const int own = own_row(walk), other = walk.other();
    multiply(b);
    add_exponentials(a, own, other, feeds_other(walk));
    product_wait<0>();
    hold(b);
    add_exponentials(b, own, other + kTile, feeds_other(walk));
    write_own_sums(walk.block(), own);
  }

 private:
  FASTCL_DEVICE int own_row(const Walk& walk) const { return walk.own() + which_ * kHalf; }
  FASTCL_DEVICE bool feeds_other(const Walk& walk) const {
    return sweep_.other_sums && walk.feeds_other();
  }

  // The next tile's products, under way.
  FASTCL_DEVICE void multiply(float (&c)[64]) {
    memory_.ring.wait_full(turn_);
    const u64 rows = by_rows(memory_.other[turn_.stage]);
    const u64 columns = by_rows(memory_.own[own_turn_.stage][0] + panel_bytes(which_ * kHalf));
    hold(c);
    product_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      multiply_panels(T{}, c, ahead(rows, k / 4 * panel_bytes(kTile) + k % 4 * 32),
                      ahead(columns, k / 4 * panel_bytes(kWidth) + k % 4 * 32), k > 0);
    product_commit();
  }

  // The tile just multiplied has been read.
  FASTCL_DEVICE void release() {
    if (lane_ == 0) memory_.ring.release(turn_);
    turn_.next();
  }

  FASTCL_DEVICE void add_exponentials(float (&c)[64], int own, int other, bool feeds) {
#pragma unroll
    for (int i = 0; i < 64; ++i) c[i] = c[i] * unit_ - shift_;
    if (own + kHalf > sweep_.n || other + kTile > sweep_.m ||
        sweep_.skips.cross(own, kHalf, other, kTile))
      drop(c, own, other);
    float low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int at = i / 2 * 4 + i % 2;
      const float x = exp2_fast(c[at]), y = exp2_fast(c[at + 2]);
      total_[i] += x + y;
      low += x;
      high += y;
    }
    if (!feeds) return;
    low += shuffle_xor(low, 1), low += shuffle_xor(low, 2);
    high += shuffle_xor(high, 1), high += shuffle_xor(high, 2);
    memory_.sums.wait_empty(sums_turn_);
    float* sums = memory_.other_sums[sums_turn_.stage][which_] + 16 * warp_ + lane_ / 4;
    if (lane_ % 4 == 0) sums[0] = low, sums[8] = high;
    sync_warp();
    if (lane_ == 0) barrier_arrive(&memory_.sums.full[sums_turn_.stage]);
    sums_turn_.next();
  }

  // Exponents of pairs that do not count leave the range.
  FASTCL_DEVICE void drop(float (&c)[64], int own, int other) {
    const int row = other + 16 * warp_ + lane_ / 4, column = own + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int r = row + i / 2 % 2 * 8, o = column + i / 4 * 8 + i % 2;
      const bool out = (r >= sweep_.m) | (o >= sweep_.n) | sweep_.skips.has(r - o);
      c[i] = out ? -kNever : c[i];
    }
  }

  // The own sums of a block, or of this worker's part of it, warp after warp; then 0 again.
  FASTCL_DEVICE void write_own_sums(int block, int own) {
    float* sums = memory_.own_sums[which_];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      total_[i] += shuffle_xor(total_[i], 4);
      total_[i] += shuffle_xor(total_[i], 8);
      total_[i] += shuffle_xor(total_[i], 16);
    }
    for (int turn = 0; turn < 4; ++turn) {
      if (warp_ == turn && lane_ < 4) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          float* sum = sums + i / 2 * 8 + lane_ * 2 + i % 2;
          *sum = turn == 0 ? total_[i] : *sum + total_[i];
        }
      }
      sync_named(1 + which_, 128);
    }
    const int part = (int)blockIdx.x - sweep_.schedule.first_worker(block);
    float* slot = sweep_.own_sums + (i64)part * sweep_.n;
    if (own + thread_ < sweep_.n) slot[own + thread_] = sums[thread_];
    sync_named(1 + which_, 128);
#pragma unroll
    for (int i = 0; i < 32; ++i) total_[i] = 0;
  }

  Memory<D>& memory_;
  const Sweep& sweep_;
  const int which_, thread_, warp_, lane_;
  const float unit_, shift_;
  float total_[32];  // of own rows 8 n + 2 (lane % 4) + e, at 2 n + e
  Turn<Memory<D>::kOwnStages> own_turn_;
  Turn<Memory<D>::kStages> turn_;
  Turn<kSumStages> sums_turn_;
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    sweep_kernel(const __grid_constant__ TensorMap own, const __grid_constant__ TensorMap other,
                 const __grid_constant__ Sweep sweep) {
  auto& memory = *reinterpret_cast<Memory<D>*>(shared_memory());
  if (threadIdx.x == 0) {
    prefetch_map(&own);
    prefetch_map(&other);
    memory.own_ring.init(kConsumerWarps);
    memory.ring.init(kConsumerWarps);
    for (int i = 0; i < kSumStages; ++i) {
      barrier_init(&memory.sums.full[i], kConsumerWarps);
      barrier_init(&memory.sums.empty[i], 1);
    }
    barrier_fence();
  }
  sync_threads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 256) produce<D>(memory, &own, &other, sweep);
    if (threadIdx.x / 32 == 9 && sweep.other_sums) write_other_sums<D>(memory, sweep);
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, D>(memory, sweep, warpgroup).run();
  }
}

template <class T, int D>
const char* launch_sweep(const Pairing& p, const Sweep& sweep, Stream stream) {
  TensorMap own, other;
  const bool is_bf16 = p.type == Type::bf16;
  const auto kernel = sweep_kernel<T, D>;
  const char* error = allow_shared(kernel, sizeof(Memory<D>));
  if (!error) error = describe(&own, is_bf16, p.own.data, p.own.count, p.d, p.own.stride, kTile);
  if (!error)
    error = describe(&other, is_bf16, p.other.data, p.other.count, p.d, p.other.stride, kTile);
  if (error) return error;
  return launch(kernel, dim3(sweep.schedule.workers), kThreads, sizeof(Memory<D>), stream, false,
                own, other, sweep);
}

template <class T>
const char* launch_sweep(const Pairing& p, const Sweep& sweep, Stream stream) {
  return p.d <= 64    ? launch_sweep<T, 64>(p, sweep, stream)
         : p.d <= 128 ? launch_sweep<T, 128>(p, sweep, stream)
                      : launch_sweep<T, 256>(p, sweep, stream);
}

// Where the sums of a sweep lie.
struct Plan {
  Schedule schedule;
  bool added;        // a slot per worker, to which its blocks add; else one per block or meeting
  i64 parts, slots;  // of own and of other sums

  explicit Plan(const LogSumExp& call)
      : schedule(Schedule::make(call.pairing.own.count, kWidth, call.pairing.other.count, kStep,
                                call.symmetric, multiprocessors())),
        parts(schedule.most_parts()) {
    const int each = call.symmetric ? schedule.reach : schedule.blocks;
    added = each > schedule.workers;
    slots = !call.columns && !call.symmetric ? 0 : added ? schedule.workers : each;
  }
};

}  // namespace

int64_t logsumexp_workspace(const LogSumExp& call) {
  if (refuse(call.pairing)) return 0;
  const Plan plan(call);
  return plan.parts * call.pairing.own.count + plan.slots * call.pairing.other.count;
}

const char* logsumexp(const LogSumExp& call, void* stream_) {
  const Pairing& p = call.pairing;
  if (const char* reason = refuse(p)) return reason;
  const Stream stream = (Stream)stream_;
  const Plan plan(call);
  const i64 n = p.own.count, m = p.other.count;
  Sweep sweep{};
  sweep.schedule = plan.schedule;
  sweep.n = (int)n, sweep.m = (int)m;
  sweep.skips = Skips::of(p);
  sweep.scale = p.scale, sweep.room = exponent_room(n > m ? n : m);
  sweep.own_sums = call.workspace;
  sweep.other_sums = plan.slots ? call.workspace + plan.parts * n : nullptr;
  sweep.added = plan.added;
  sweep.offset = call.offset;
  const char* error = p.type == Type::bf16 ? launch_sweep<bf16>(p, sweep, stream)
                                           : launch_sweep<f16>(p, sweep, stream);
  if (error) return error;
  Finish finish{};
  finish.pairing = p, finish.room = sweep.room, finish.offset = call.offset;
  finish.schedule = plan.schedule, finish.width = kWidth;
  finish.own_sums = sweep.own_sums, finish.logsum = call.rows;
  if (call.symmetric) {
    finish.other_sums = sweep.other_sums;
    finish.other_slots = plan.added ? (int)plan.slots : kSlotPerMeeting;
  }
  error = finish_sums(finish, stream);
  if (error || !call.columns) return error;
  finish.pairing = exchanged(p);
  finish.own_sums = nullptr;
  finish.other_sums = sweep.other_sums, finish.other_slots = (int)plan.slots;
  finish.logsum = call.columns;
  return finish_sums(finish, stream);
}

}  // namespace fastcl::cuda
