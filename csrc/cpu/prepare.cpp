#include "prepare.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fastcl::cpu {
namespace {

// What a thread keeps between calls: enough for the packed operands of some 8192 rows of 128.
constexpr i64 kSlabBytes = 16 << 20;
constexpr i64 kPackRows = 64;  // rows per packing task: about 10 microseconds at 128 features

struct Slab {
  void* memory = nullptr;
  i64 used = 0;
  ~Slab() { std::free(memory); }
};
thread_local Slab slab;
thread_local Scratch worker_scratch;

constexpr i64 kHugePage = 2 << 20;

// Large blocks come fresh from the system at every call. In huge pages, where it has them for those
// who ask, that costs 32 faults instead of 16384 for 64 MB, and rows far apart share translations.
void* allocate(i64 bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const i64 unit = huge ? kHugePage : 64;
  void* p = std::aligned_alloc(unit, round_up(bytes, unit));
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(p, round_up(bytes, unit), MADV_HUGEPAGE);
#endif
  return p;
}

// Ids become 32-bit with equality kept: shifted when their range allows, ranked otherwise.
void compress_ids(const i64* a, i64 n, const i64* b, i64 m, int32_t* out_a, int32_t* out_b) {
  const auto [low_a, high_a] = std::minmax_element(a, a + n);
  const auto [low_b, high_b] = std::minmax_element(b, b + m);
  const i64 low = std::min(*low_a, *low_b), high = std::max(*high_a, *high_b);
  if ((uint64_t)high - (uint64_t)low <= 0xffffffffu) {
    for (i64 i = 0; i < n; ++i) out_a[i] = (int32_t)(uint32_t)((uint64_t)a[i] - (uint64_t)low);
    for (i64 j = 0; j < m; ++j) out_b[j] = (int32_t)(uint32_t)((uint64_t)b[j] - (uint64_t)low);
    return;
  }
  std::vector<i64> seen(a, a + n);
  seen.insert(seen.end(), b, b + m);
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  const auto rank = [&](i64 id) {
    return (int32_t)(std::lower_bound(seen.begin(), seen.end(), id) - seen.begin());
  };
  std::transform(a, a + n, out_a, rank);
  std::transform(b, b + m, out_b, rank);
}

float largest_norm(const Problem& p, const Matrix& x) {
  std::atomic<float> largest{0.0f};
  parallel_ranges(p.pool, x.rows, 1024, [&](i64 begin, i64 end) {
    const float mine = p.kernels->largest_square(x, begin, end - begin);
    float seen = largest.load();
    while (!(mine <= seen) && !std::isnan(seen) && !largest.compare_exchange_weak(seen, mine)) {}
  });
  return std::sqrt(largest.load());
}

}  // namespace

Arena::Arena() : begin_(slab.used) {
  if (!slab.memory) slab.memory = allocate(kSlabBytes);
}

Arena::~Arena() {
  for (void* p : extra_) std::free(p);
  slab.used = begin_;
}

void* Arena::bytes(i64 size) {
  size = round_up(size, 64) + 64;  // a vector may read one past the end
  if (slab.used + size <= kSlabBytes) {
    slab.used += size;
    return static_cast<char*>(slab.memory) + slab.used - size;
  }
  extra_.push_back(allocate(size));
  return extra_.back();
}

Scratch& Scratch::reset(i64 total) {
  Scratch& s = worker_scratch;
  if (s.size_ < total) {
    std::free(s.base_);
    s.size_ = 0;
    s.base_ = static_cast<char*>(allocate(total));
    s.size_ = total;
  }
  s.used_ = 0;
  return s;
}

Scratch::~Scratch() { std::free(base_); }

float* padded_floats(const Kernels* k, Arena& arena, i64 n) {
  const i64 padded = round_up(n, k->panel);
  float* p = arena.get<float>(padded);
  std::memset(p + n, 0, (padded - n) * sizeof(float));
  return p;
}

const uint32_t* pack_all(const Problem& p, const Matrix& x, Arena& arena) {
  const Kernels* k = p.kernels;
  const i64 depth = ceil_div(x.dim, k->pack), group = round_up(kPackRows, k->panel);
  uint32_t* panels = arena.get<uint32_t>(round_up(x.rows, k->panel) * depth);
  parallel_ranges(p.pool, x.rows, group, [&](i64 begin, i64 end) {
    k->pack_panels(x, begin, end - begin, panels + begin * depth);
  });
  return panels;
}

Prepared::Prepared(const Problem& p, Arena& arena, Units units, float offset, bool whole_keys,
                   bool scored)
    : problem(p), k(p.kernels), n(p.queries.rows), m(p.keys.rows), dim(p.queries.dim),
      depth(ceil_div(dim, k->pack)) {
  const double unit = units == Units::log2 ? kLog2e : 1.0;
  scale_ = (float)(p.scale * unit);
  if (scored) {
    query_panels_ = pack_all(p, p.queries, arena);
    const bool shared = same_matrix(p.keys, p.queries);
    packs_blocks_ = !shared && !whole_keys;
    if (!packs_blocks_) key_panels_ = shared ? query_panels_ : pack_all(p, p.keys, arena);
  }
  float* shift = arena.get<float>(round_up(m, k->panel));
  for (i64 j = 0; j < m; ++j)
    shift[j] = (float)(((p.key_bias ? p.key_bias[j] : 0.0f) - (double)offset) * unit);
  std::fill(shift + m, shift + round_up(m, k->panel), -INFINITY);
  col_shift_ = shift;
  query_ids_ = key_ids_ = nullptr;
  if (p.relation == Relation::any) return;
  int32_t* queries = arena.get<int32_t>(round_up(n, k->panel));
  int32_t* keys = arena.get<int32_t>(round_up(m, k->panel));
  compress_ids(p.query_ids, n, p.key_ids, m, queries, keys);
  query_ids_ = queries;
  key_ids_ = keys;
}

ScoreBlock Prepared::block(i64 row0, i64 rows, i64 col0, i64 cols, void* scratch) const {
  if (packs_blocks_) k->pack_panels(problem.keys, col0, cols, scratch);
  ScoreBlock s{};
  s.a = query_panels_ ? query_panels_ + row0 * depth : nullptr;
  s.b = key_panels_ ? key_panels_ + col0 * depth : scratch;
  s.depth = depth;
  s.row0 = row0, s.rows = rows, s.col0 = col0, s.cols = cols;
  s.scale = scale_;
  s.col_shift = col_shift_ + col0;
  s.relation = problem.relation;
  s.row_ids = query_ids_ + (query_ids_ ? row0 : 0);
  s.col_ids = key_ids_ + (key_ids_ ? col0 : 0);
  s.skips = problem.skips;
  std::copy(problem.skip, problem.skip + problem.skips, s.skip);
  s.triangle = problem.symmetric;
  return s;
}

Values::Values(const Problem& p, const Matrix& x, Arena& arena, bool whole)
    : x_(x), k_(p.kernels), ready_(nullptr) {
  if (k_->pack == 1 && x.storage == Storage::f32 && x.dim % k_->lanes == 0) {
    stride = x.stride;
    ready_ = static_cast<const uint32_t*>(x.data);
    return;
  }
  stride = round_up(x.dim, k_->lanes);
  if (!whole) return;
  uint32_t* packed = arena.get<uint32_t>(ceil_div(x.rows, k_->pack) * stride);
  parallel_ranges(p.pool, x.rows, kPackRows, [&](i64 begin, i64 end) {
    k_->pack_values(x, begin, end - begin, packed + begin / k_->pack * stride, stride);
  });
  ready_ = packed;
}

const void* Values::block(i64 row0, i64 rows, void* scratch) const {
  if (ready_) return ready_ + row0 / k_->pack * stride;
  k_->pack_values(x_, row0, rows, scratch, stride);
  return scratch;
}

double score_bound(const Problem& p) {
  const double q = largest_norm(p, p.queries);
  const double k = same_matrix(p.keys, p.queries) ? q : largest_norm(p, p.keys);
  double bias = 0;
  if (p.key_bias)
    for (i64 j = 0; j < p.keys.rows; ++j) bias = std::max(bias, (double)std::fabs(p.key_bias[j]));
  return q * k * std::fabs((double)p.scale) + bias;
}

}  // namespace fastcl::cpu
