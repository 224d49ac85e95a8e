// A GPU on the host, for the tests of csrc/cuda: included by csrc/cuda/device.h when
// FASTCL_EMULATED is defined, it gives every name of that header its documented meaning.
//
// Each thread of a block is a fiber; at every synchronisation the next one to run is drawn at
// random, and now and then a warp falls far behind, so a missing barrier shows as a wrong result for
// some seed. Copies with cp.async happen at once or as late as they may, when the thread waits for
// them. Shared memory starts as NaN patterns. What a GPU would not survive (a deadlock, a copy
// outside shared memory) becomes the error that launch returns. Nothing here checks alignment beyond 16 bytes, bank conflicts or memory order.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define FASTCL_DEVICE inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace fastcl::cuda {

using Stream = void*;

namespace emulation {

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t slots[2][32][8];  // what lanes exchange, in turns
  unsigned asleep = 0;       // rounds of the scheduler that pass it by
};

// What a header beside this one adds to a block, such as engines that copy.
struct Extension {
  virtual ~Extension() = default;
  virtual bool work() = 0;  // between the turns of threads; true if something is under way
  virtual void end() = 0;   // all threads are done
};

struct Block {
  dim3 index;
  std::unique_ptr<Extension> extension;
  std::unique_ptr<unsigned char[]> storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int threads = 0;
  Barrier barriers[16];
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

inline void perform(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

struct Thread {
  ucontext_t start;
  jmp_buf place;  // where it left off, once started
  bool started = false;
  std::unique_ptr<unsigned char[]> stack;
  Block* block = nullptr;
  int index = 0;
  Barrier* barrier = nullptr;  // where it waits for the end of a generation
  unsigned generation = 0;
  unsigned turn = 0;  // of the warp's slots
  bool done = false;
  std::vector<Copy> open;               // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// Set by tests before a launch.
struct Settings {
  int multiprocessors = 3;
  int blocks_per_multiprocessor = 1;
  size_t shared_limit = 227 * 1024;
  unsigned seed = 0;
};
inline Settings settings;

struct Machine {
  jmp_buf scheduler;
  Thread* running = nullptr;
  const char* failure = nullptr;  // of a thread
  std::mt19937 random;
  std::function<void()> body;
  Barrier grid;
  int threads = 0;        // alive in this launch
  bool progress = false;  // since the scheduler last looked
  bool has_context = false;  // each launch comes from a new thread, as far as this is concerned
};
inline Machine machine;

struct Failure {
  const char* what;
};
// `what`, a literal, is what launch returns.
[[noreturn]] inline void fail(const char* what) { throw Failure{what}; }

inline Thread& self() { return *machine.running; }

// Jumps, because contexts are swapped by a system call.
inline void yield() {
  if (!_setjmp(self().place)) _longjmp(machine.scheduler, 1);
}
inline void resume(Thread& thread) {
  machine.running = &thread;
  if (_setjmp(machine.scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.start);
}

template <class F>
void wait_until(F ready) {
  while (!ready()) yield();
}

inline void meet(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    machine.progress = true;
  } else {
    self().barrier = &barrier;
    self().generation = generation;
  }
  yield();
}

inline int lane() { return self().index % 32; }
inline Warp& warp() { return self().block->warps[self().index / 32]; }
inline int warp_size() {
  const int first = self().index / 32 * 32, left = self().block->threads - first;
  return left < 32 ? left : 32;
}

// Give `count` words to the warp; returns every lane's words until the exchange after the next.
inline uint32_t (*exchange(const uint32_t* words, int count))[8] {
  auto* slots = warp().slots[self().turn++ % 2];
  std::memcpy(slots[lane()], words, 4 * count);
  meet(warp().barrier, warp_size());
  return slots;
}

inline void enter() {
  try {
    machine.body();
    for (auto& group : self().groups)
      if (!group.empty()) fail("a thread ended before it waited for its cp.async copies");
  } catch (const Failure& failure) {
    machine.failure = failure.what;
  }
  self().done = true;
  machine.progress = true;
  _longjmp(machine.scheduler, 1);
}

inline void run_blocks(std::vector<Block>& blocks, int threads) {
  auto& random = machine.random;
  std::vector<std::unique_ptr<Thread>> fibers;
  constexpr size_t kStack = 256 * 1024;
  for (Block& block : blocks)
    for (int i = 0; i < threads; ++i) {
      auto fiber = std::make_unique<Thread>();
      fiber->stack.reset(new unsigned char[kStack]);
      fiber->block = &block;
      fiber->index = i;
      getcontext(&fiber->start);
      fiber->start.uc_stack.ss_sp = fiber->stack.get();
      fiber->start.uc_stack.ss_size = kStack;
      fiber->start.uc_link = nullptr;
      makecontext(&fiber->start, enter, 0);
      fibers.push_back(std::move(fiber));
    }
  machine.threads = (int)fibers.size();
  std::vector<Thread*> alive;
  for (auto& fiber : fibers) alive.push_back(fiber.get());
  bool stuck = false;  // the round before changed nothing
  while (!alive.empty()) {
    machine.progress = false;
    for (Block& block : blocks)
      for (Warp& warp : block.warps) {
        if (stuck)  // perhaps the others wait for those asleep
          warp.asleep = 0;
        else if (warp.asleep)
          --warp.asleep;
        else if (random() % 128 == 0)
          warp.asleep = random() % 64;
      }
    std::vector<Thread*> ready;
    for (Thread* thread : alive) {
      if (thread->block->warps[thread->index / 32].asleep) continue;
      if (thread->barrier && thread->barrier->generation == thread->generation) continue;
      ready.push_back(thread);
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (Thread* thread : ready) {
      thread->barrier = nullptr;
      threadIdx = dim3(thread->index);
      blockIdx = thread->block->index;
      resume(*thread);
      if (machine.failure) fail(machine.failure);
    }
    for (Block& block : blocks)
      if (block.extension) machine.progress |= block.extension->work();
    std::erase_if(alive, [](Thread* thread) { return thread->done; });
    if (!machine.progress && !alive.empty() && stuck) fail("deadlock: every thread waits");
    stuck = !machine.progress;
  }
}

// All blocks of a grid, `together` at a time.
inline void run_grid(dim3 grid, int threads, size_t shared, size_t together) {
  const size_t count = (size_t)grid.x * grid.y * grid.z;
  auto& random = machine.random;
  random.seed(settings.seed);
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (size_t begin = 0; begin < count; begin += together) {
    std::vector<Block> blocks(together);
    for (size_t i = 0; i < together; ++i) {
      const size_t b = order[begin + i];
      Block& block = blocks[i];
      block.index = dim3((unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                         (unsigned)(b / grid.x / grid.y));
      block.storage.reset(new unsigned char[shared + 2048]);
      std::memset(block.storage.get(), 0xff, shared + 2048);
      block.shared = reinterpret_cast<unsigned char*>(
          ((uintptr_t)block.storage.get() + 1023) / 1024 * 1024);
      block.shared_bytes = shared;
      block.threads = threads;
      block.warps.resize((threads + 31) / 32);
    }
    run_blocks(blocks, threads);
    for (const Block& block : blocks)
      if (block.extension) block.extension->end();
    for (const Block& block : blocks)
      for (size_t i = 0; i < 1024; ++i)
        if (block.shared[shared + i] != 0xff) fail("a block wrote beyond its shared memory");
  }
}

// IEEE conversions of 16-bit formats.
inline float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_f16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return (float)x;
}
inline uint16_t to_f16(float x) {
  const _Float16 y = (_Float16)x;
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float half_of(bf16, uint32_t pair, int which) {
  return from_bf16((uint16_t)(pair >> (16 * which)));
}
inline float half_of(f16, uint32_t pair, int which) {
  return from_f16((uint16_t)(pair >> (16 * which)));
}
inline float tf32(uint32_t bits) { return as_float(bits & ~0x1fffu); }

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto* lanes = exchange(words, 6);
  const T type{};
  const auto left = [&](int row, int k) {
    return half_of(type, lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
  };
  const auto right = [&](int k, int column) {
    return half_of(type, lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += left(row, k) * right(k, column);
    c[i] += sum;
  }
}

}  // namespace emulation

inline unsigned char* shared_memory() { return emulation::self().block->shared; }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float as_float(uint32_t x) { return emulation::as_float(x); }
inline uint32_t as_bits(float x) { return emulation::as_bits(x); }
inline uint32_t pack(bf16, float low, float high) {
  return emulation::to_bf16(low) | (uint32_t)emulation::to_bf16(high) << 16;
}
inline uint32_t pack(f16, float low, float high) {
  return emulation::to_f16(low) | (uint32_t)emulation::to_f16(high) << 16;
}
inline float widen(bf16 x) { return emulation::from_bf16(x.bits); }
inline float widen(f16 x) { return emulation::from_f16(x.bits); }
inline uint32_t round_tf32(float x) {
  return x - x != 0 ? emulation::as_bits(x) : (emulation::as_bits(x) + 0x1000) & ~0x1fffu;
}

inline float shuffle(float x, int lane) {
  const uint32_t word = emulation::as_bits(x);
  return emulation::as_float(emulation::exchange(&word, 1)[lane][0]);
}
inline float shuffle_xor(float x, int mask) { return shuffle(x, emulation::lane() ^ mask); }

inline void store_pair(float* to, float first, float second) {
  if ((uintptr_t)to % 8) emulation::fail("a pair's address is not a multiple of 8");
  to[0] = first, to[1] = second;
}

inline void sync_threads() {
  emulation::meet(emulation::self().block->barriers[0], emulation::self().block->threads);
}
inline void sync_warp() { emulation::meet(emulation::warp().barrier, emulation::warp_size()); }
inline void sync_named(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) emulation::fail("bad named barrier");
  emulation::meet(emulation::self().block->barriers[id], threads);
}
inline void sync_grid() { emulation::meet(emulation::machine.grid, emulation::machine.threads); }

inline void cp_async(void* to, const void* from, bool valid) {
  auto* block = emulation::self().block;
  auto* target = static_cast<unsigned char*>(to);
  if (target < block->shared || target + 16 > block->shared + block->shared_bytes)
    emulation::fail("cp.async writes outside shared memory");
  if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16))
    emulation::fail("cp.async address is not a multiple of 16");
  const emulation::Copy copy{to, from, valid};
  if (emulation::machine.random() % 2)
    emulation::perform(copy);
  else
    emulation::self().open.push_back(copy);
}
inline void cp_async_commit() {
  auto& thread = emulation::self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int left>
void cp_async_wait() {
  auto& thread = emulation::self();
  while ((int)thread.groups.size() > left) {
    for (const auto& copy : thread.groups.front()) emulation::perform(copy);
    thread.groups.pop_front();
  }
}

template <bool transposed>
void load_matrices(uint32_t (&x)[4], const void* row) {
  if ((uintptr_t)row % 16) emulation::fail("ldmatrix address is not a multiple of 16");
  uint32_t words[2];
  std::memcpy(words, &row, 8);
  auto* lanes = emulation::exchange(words, 2);
  const auto number = [&](int matrix, int r, int c) {
    const unsigned char* address;
    std::memcpy(&address, lanes[8 * matrix + r], 8);
    uint16_t bits;
    std::memcpy(&bits, address + 2 * c, 2);
    return (uint32_t)bits;
  };
  const int first = emulation::lane() / 4, pair = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    x[i] = transposed ? number(i, pair, first) | number(i, pair + 1, first) << 16
                      : number(i, first, pair) | number(i, first, pair + 1) << 16;
}

inline void multiply(bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply<bf16>(c, a, b0, b1);
}
inline void multiply(f16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply<f16>(c, a, b0, b1);
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto* lanes = exchange(words, 6);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k)
      sum += tf32(lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]) *
             tf32(lanes[column * 4 + k % 4][4 + k / 4]);
    c[i] += sum;
  }
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline int multiprocessors() { return emulation::settings.multiprocessors; }

template <class... P>
const char* allow_shared(void (*)(P...), size_t shared) {
  if (shared > 48 * 1024) emulation::machine.has_context = true;
  return nullptr;
}
template <class... P>
int blocks_per_multiprocessor(void (*)(P...), int, size_t shared) {
  return shared > emulation::settings.shared_limit ? 0
                                                   : emulation::settings.blocks_per_multiprocessor;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, Stream,
                   bool cooperative, A... arguments) {
  using namespace emulation;
  if (shared > settings.shared_limit || threads > 1024 || !grid.x || !grid.y || !grid.z ||
      grid.y > 65535 || grid.z > 65535)
    return "invalid configuration argument";
  const size_t count = (size_t)grid.x * grid.y * grid.z;
  if (cooperative && count > (size_t)(settings.multiprocessors * settings.blocks_per_multiprocessor))
    return "too many blocks in cooperative launch";
  machine.has_context = false;
  blockDim = dim3(threads);
  gridDim = grid;
  machine.body = [&] { kernel(P(arguments)...); };
  machine.grid = {};
  machine.failure = nullptr;
  try {
    // Blocks of an ordinary launch may run in any order and must not wait for each other.
    run_grid(grid, threads, shared, cooperative ? count : 1);
  } catch (const Failure& failure) {
    return failure.what;
  }
  return nullptr;
}

}  // namespace fastcl::cuda

// Of tests: the machine of the launches that follow.
extern "C" __attribute__((used)) inline void fastcl_emulate(int multiprocessors, int blocks,
                                                            size_t shared_limit, unsigned seed) {
  fastcl::cuda::emulation::settings = {multiprocessors, blocks, shared_limit, seed};
}
