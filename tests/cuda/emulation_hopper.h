// The instructions of csrc/cuda/hopper.h on the machine of emulation.h.
//
// Copies happen at a random later time, box by box. A product happens as late as it may: when the
// first thread of its warpgroup waits for it, with what shared memory and registers hold then, read
// through the descriptors; until a thread has waited, its accumulators are NaN. So a buffer given
// back too early, a wait left out, or a register touched too early shows. Descriptors themselves
// are compared with those of code that runs on Hopper (test_hopper.py).
#pragma once
#include <map>
#include <set>

namespace fastcl::cuda {

struct TensorMap {
  const unsigned char* matrix;
  i64 rows, columns, stride;
  int panel_rows;
};

namespace emulation {

struct Mbarrier {
  int arrivals = 0, arrived = 0;
  i64 bytes = 0;  // expected and not here yet
  u32 phase = 0;
  bool fenced = false;  // since it was initialised
};

// One call of a product by one thread. Accumulators in flight live in the machine.
struct Product {
  bool held;
  int type, columns;  // 0 bf16, 1 f16; N
  bool accumulate;
  u64 a, b;
  const u32* registers;
  float* c;
};

struct Participant {
  std::vector<Product> products;
  std::deque<size_t> groups;  // ends of committed groups
  std::map<float*, std::vector<float>> flight;
  size_t committed = 0;
  bool fenced = false;
};

struct Warpgroup {
  Participant threads[128];
  size_t executed = 0;
};

inline const u64 kBarrierMark = 0x0bad0ba221e20000u;

// Descriptors that products were given: of left operands, of right ones by rows and by columns.
inline std::set<u64> operands[3];

struct HopperBlock : Extension {
  Block* block;
  std::map<u64*, Mbarrier> barriers;
  std::vector<std::function<void()>> loads;  // copies under way
  std::vector<Warpgroup> warpgroups;
  std::mt19937& random = machine.random;
  int patience = 1 << random() % 6;  // turns of threads that a copy takes, on average

  explicit HopperBlock(Block* block) : block(block), warpgroups(block->threads / 128) {}
  bool work() override {
    if (loads.empty()) return false;
    std::vector<std::function<void()>> ready;
    for (size_t i = loads.size(); i-- > 0;)
      if (random() % patience == 0) {
        ready.push_back(std::move(loads[i]));
        loads.erase(loads.begin() + i);
      }
    std::shuffle(ready.begin(), ready.end(), random);
    for (const auto& copy : ready) copy();
    return true;
  }
  void end() override {
    if (!loads.empty()) fail("a block ended before its copies arrived");
    for (const Warpgroup& group : warpgroups)
      for (const Participant& thread : group.threads)
        if (!thread.flight.empty()) fail("a thread ended before it waited for its products");
  }
};

inline HopperBlock& hopper() {
  Block* block = self().block;
  if (!block->extension) block->extension = std::make_unique<HopperBlock>(block);
  return static_cast<HopperBlock&>(*block->extension);
}

inline u32 offset_in(const Block& block, const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < block.shared || at + bytes > block.shared + block.shared_bytes)
    fail("an address outside shared memory");
  return (u32)(at - block.shared);
}

inline Mbarrier& mbarrier(HopperBlock& state, u64* at) {
  const auto found = state.barriers.find(at);
  if (found == state.barriers.end()) fail("a barrier was used before it was initialised");
  if (*at != kBarrierMark) fail("a barrier was overwritten");
  if (!found->second.fenced) fail("a barrier was used without a fence after its initialisation");
  return found->second;
}
inline void settle(Mbarrier& barrier) {
  if (barrier.arrived < barrier.arrivals || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
  machine.progress = true;
}
inline void arrive(u64* at, i64 bytes) {
  Mbarrier& barrier = mbarrier(hopper(), at);
  if (barrier.arrived == barrier.arrivals) fail("too many arrivals in a phase of a barrier");
  ++barrier.arrived;
  barrier.bytes += bytes;
  settle(barrier);
}

inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

// Queue a copy of `bytes`; `fill` does it.
template <class F>
void load(const void* to, int bytes, u64* barrier, F fill) {
  HopperBlock& state = hopper();
  offset_in(*state.block, to, bytes);
  mbarrier(state, barrier);
  state.loads.push_back([&state, bytes, barrier, fill] {
    fill();
    Mbarrier& counted = mbarrier(state, barrier);
    counted.bytes -= bytes;
    settle(counted);
  });
}

// The matrix [lines, 16] or, where rows are contracted, its transpose, that a descriptor points at.
inline void decode(const Block& block, u64 descriptor, bool contracts_rows, int type, int lines,
                   float* out) {
  const auto field = [&](int first) { return (u32)(descriptor >> first & 0x3fff) << 4; };
  const u32 start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  if (descriptor >> 49 & 7 || start % 1024 / 128) fail("a descriptor between swizzle patterns");
  for (int line = 0; line < lines; ++line)
    for (int k = 0; k < 16; ++k) {
      const u32 by_line = line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2;
      const u32 by_k = line / 8 * stride + line % 8 * 128 + k * 2;
      const u32 place = swizzled(start + (contracts_rows ? by_line : by_k));
      if (place + 2 > block.shared_bytes) fail("a descriptor points outside shared memory");
      uint16_t bits;
      std::memcpy(&bits, block.shared + place, 2);
      out[line * 16 + k] = type == 0 ? from_bf16(bits) : from_f16(bits);
    }
}

__attribute__((optimize("O3"))) inline void accumulate(const float* a, const float* b, float* c,
                                                       int columns) {
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      const float x = a[row * 16 + k];
      for (int n = 0; n < columns; ++n) c[row * columns + n] += x * b[k * columns + n];
    }
}

inline void execute(const Block& block, Warpgroup& group) {
  const size_t index = group.executed++;
  const Product& first = group.threads[0].products[index];
  const int columns = first.columns;
  if (!first.held) operands[0].insert(first.a);
  operands[first.held ? 2 : 1].insert(first.b);
  std::vector<float> a(64 * 16), lines(columns * 16), b(columns * 16), c(64 * columns);
  decode(block, first.b, first.held, first.type, columns, lines.data());
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k) b[k * columns + n] = lines[n * 16 + k];
  if (!first.held) decode(block, first.a, false, first.type, 64, a.data());
  const auto element = [&](int t, int i) {  // of thread t's accumulator i
    return (16 * (t / 32) + t % 32 / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + t % 4 * 2 + i % 2;
  };
  for (int t = 0; t < 128; ++t) {
    const Product& product = group.threads[t].products[index];
    if (product.held != first.held || product.columns != columns || product.b != first.b ||
        product.type != first.type || product.accumulate != first.accumulate ||
        (!first.held && product.a != first.a))
      fail("the threads of a warpgroup disagree on a product");
    for (int i = 0; first.held && i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const uint16_t bits = (uint16_t)(product.registers[i] >> (16 * e));
        a[(16 * (t / 32) + t % 32 / 4 + i % 2 * 8) * 16 + i / 2 * 8 + t % 4 * 2 + e] =
            first.type == 0 ? from_bf16(bits) : from_f16(bits);
      }
    const std::vector<float>& old = group.threads[t].flight.at(product.c);
    for (int i = 0; i < columns / 2; ++i) c[element(t, i)] = first.accumulate ? old[i] : 0.0f;
  }
  accumulate(a.data(), b.data(), c.data(), columns);
  for (int t = 0; t < 128; ++t) {
    Participant& thread = group.threads[t];
    std::vector<float>& flight = thread.flight.at(thread.products[index].c);
    for (int i = 0; i < columns / 2; ++i) flight[i] = c[element(t, i)];
  }
}

inline Participant& participant() {
  return hopper().warpgroups.at(self().index / 128).threads[self().index % 128];
}

inline void issue(Product product) {
  Participant& thread = participant();
  if (!thread.fenced) fail("a product without a fence");
  const int count = product.columns / 2;
  if (!thread.flight.count(product.c)) {
    thread.flight[product.c].assign(product.c, product.c + count);
    std::fill(product.c, product.c + count, NAN);
  }
  thread.products.push_back(product);
}

inline void wait_products(size_t left) {
  Participant& thread = participant();
  Warpgroup& group = hopper().warpgroups[self().index / 128];
  if (thread.committed != thread.products.size()) fail("products wait for their commit");
  if (thread.groups.size() <= left) return;
  const size_t target = thread.groups[thread.groups.size() - 1 - left];
  while (thread.groups.size() > left) thread.groups.pop_front();
  wait_until([&] {
    for (const Participant& other : group.threads)
      if (other.committed < target) return false;
    return true;
  });
  machine.progress = true;
  while (group.executed < target) execute(*self().block, group);
  std::set<float*> busy;
  for (size_t i = target; i < thread.products.size(); ++i) busy.insert(thread.products[i].c);
  for (auto it = thread.flight.begin(); it != thread.flight.end();) {
    if (busy.count(it->first)) {
      ++it;
      continue;
    }
    std::copy(it->second.begin(), it->second.end(), it->first);
    it = thread.flight.erase(it);
  }
  thread.fenced = false;
}

inline int type_index(bf16) { return 0; }
inline int type_index(f16) { return 1; }

}  // namespace emulation

inline u32 shared_address(const void* p) {
  return emulation::offset_in(*emulation::self().block, p, 1);
}

inline void barrier_init(u64* barrier, int arrivals) {
  auto& state = emulation::hopper();
  emulation::offset_in(*state.block, barrier, 8);
  if ((uintptr_t)barrier % 8 || arrivals < 1) emulation::fail("bad barrier");
  state.barriers[barrier] = {arrivals};
  *barrier = emulation::kBarrierMark;
}
inline void barrier_fence() {
  for (auto& barrier : emulation::hopper().barriers) barrier.second.fenced = true;
}
inline void barrier_arrive(u64* barrier) { emulation::arrive(barrier, 0); }
inline void barrier_expect(u64* barrier, int bytes) { emulation::arrive(barrier, bytes); }
inline void barrier_wait(u64* barrier, u32 parity) {
  auto& counted = emulation::mbarrier(emulation::hopper(), barrier);
  emulation::machine.progress = true;
  emulation::yield();
  emulation::wait_until([&] { return (counted.phase & 1) != parity; });
  emulation::machine.progress = true;
}

inline void copy_panel(void* to, const TensorMap* map, int column, int row, u64* barrier) {
  using namespace emulation;
  const u32 address = shared_address(to);
  if (address % 1024) fail("a panel does not begin at a multiple of 1024");
  load(to, panel_bytes(map->panel_rows), barrier, [=, shared = self().block->shared] {
    for (i64 r = 0; r < map->panel_rows; ++r)
      for (i64 c = 0; c < kPanel; ++c) {
        uint16_t bits = 0;
        if (row + r >= 0 && row + r < map->rows && column + c >= 0 && column + c < map->columns)
          std::memcpy(&bits, map->matrix + 2 * ((row + r) * map->stride + column + c), 2);
        std::memcpy(shared + swizzled(address + (u32)(128 * r + 2 * c)), &bits, 2);
      }
  });
}
inline void copy_bytes(void* to, const void* from, int bytes, u64* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16)
    emulation::fail("a bulk copy that is not a multiple of 16");
  emulation::load(to, bytes, barrier, [=] { std::memcpy(to, from, bytes); });
}
inline void prefetch_map(const TensorMap*) {}

template <int registers>
void take_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
}
template <int registers>
void give_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
}

inline void product_fence() { emulation::participant().fenced = true; }
inline void product_commit() {
  auto& thread = emulation::participant();
  thread.committed = thread.products.size();
  thread.groups.push_back(thread.committed);
}
template <int left>
void product_wait() {
  emulation::wait_products(left);
}
template <class T, int count>
void hold(T (&)[count]) {}

template <class T, int count>
void multiply_panels(T, float (&c)[count], u64 a, u64 b, bool accumulate) {
  emulation::issue({false, emulation::type_index(T{}), 2 * count, accumulate, a, b, nullptr, c});
}
template <int first, class T, int count, int size>
void multiply_held(T, float (&c)[count], const u32 (&a)[size], u64 b, bool accumulate) {
  static_assert(first + 4 <= size);
  emulation::issue({true, emulation::type_index(T{}), 2 * count, accumulate, 0, b, a + first, c});
}

inline const char* describe(TensorMap* map, bool, const void* matrix, i64 rows, i64 columns,
                            i64 stride, int panel_rows) {
  if (!emulation::machine.has_context) return "the driver's thread has no context";
  if ((uintptr_t)matrix % 16 || stride % 8 || rows < 1 || columns < 1 || panel_rows > 256)
    return "the driver refuses the matrix's tensor map";
  *map = {static_cast<const unsigned char*>(matrix), rows, columns, stride, panel_rows};
  return nullptr;
}

}  // namespace fastcl::cuda

// Of tests: descriptors since this was last asked, at most `most` of a kind; their number.
extern "C" __attribute__((used)) inline int fastcl_operands(int kind, uint64_t* to, int most) {
  auto& operands = fastcl::cuda::emulation::operands[kind];
  const int count = (int)operands.size();
  if (count <= most) std::copy(operands.begin(), operands.end(), to);
  operands.clear();
  return count;
}
