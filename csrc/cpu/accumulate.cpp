#include "accumulate.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "turns.h"

namespace fastcl::cpu {
namespace {

// Weights of one block stay in second-level cache between the tile that writes them and the
// products that read them. Of 128, 192, 256, 320 and 384, NT-Xent at 128 features does not care
// (1 to 2 %), at 512 features 256 and more win 10 to 20 % over 128. kPad keeps rows of a power of
// two from sharing cache sets.
constexpr i64 kWeightBlock = 256, kPad = 32;
constexpr i64 kMaxChunks = 32;  // of keys: 4 MB of slots for 256 queries of 128 features

// A square-ish cut: at least four blocks a side, so that rounds of a tournament have work for more
// than one thread.
i64 block_side(i64 n, i64 panel) {
  const i64 blocks = std::max(ceil_div(n, kWeightBlock), std::min((i64)4, ceil_div(n, 64)));
  return round_up(ceil_div(n, blocks), panel);
}

// What turning a block into weights and weights into rows takes.
class Worker {
 public:
  Worker(const Prepared& p, const Gradient& g, const Values* queries, const Values* keys, i64 rows,
         i64 cols)
      : p_(p), g_(g), queries_(queries), keys_(keys), rows_(round_up(rows, p.k->panel)),
        cols_(round_up(cols, p.k->panel)), stride_(cols_ + kPad) {}

  struct Memory {
    void *weights, *weight_pairs, *keys, *key_values, *query_values, *slice;
    float *row_sums, *col_sums;
    double *totals, *pair_sums;
  };

  Memory memory() const {
    const bool pairs = p_.k->pack == 2;
    const i64 weights = rows_ * stride_ / p_.k->pack, weight_pairs = pairs ? weights : 0;
    const i64 keys = p_.key_scratch(cols_);
    const i64 key_values = keys_ ? keys_->scratch(cols_) : 0;
    const i64 query_values = queries_ ? queries_->scratch(rows_) : 0;
    const i64 lanes = rows_ * p_.k->lanes;
    const i64 slice = pairs ? 0 : std::max(rows_, cols_) * p_.k->panel;
    const i64 pair_sums = g_.totals ? 3 * p_.k->lanes : 0;
    i64 total = Scratch::padded(rows_ * 8) + Scratch::padded(pair_sums * 8);
    for (i64 words : {weights, weight_pairs, keys, key_values, query_values, lanes, cols_, slice})
      total += Scratch::padded(words * 4);
    Scratch& s = Scratch::reset(total);
    Memory m;
    m.weights = s.get<uint32_t>(weights);
    m.weight_pairs = s.get<uint32_t>(weight_pairs);
    m.keys = s.get<uint32_t>(keys);
    m.key_values = s.get<uint32_t>(key_values);
    m.query_values = s.get<uint32_t>(query_values);
    m.row_sums = s.get<float>(lanes);
    m.col_sums = s.get<float>(cols_);
    m.totals = s.get<double>(rows_);
    m.pair_sums = s.get<double>(pair_sums);
    std::fill(m.pair_sums, m.pair_sums + pair_sums, 0.0);
    m.slice = pairs ? nullptr : s.get<float>(slice);
    return m;
  }

  struct Block {
    i64 row0, rows, col0, cols;
  };

  // Weights of a block, and on demand their sums over rows and columns, into memory.
  void weigh(const Memory& mem, const Block& b, bool row_sums, bool col_sums) const {
    const ScoreBlock s = p_.block(b.row0, b.rows, b.col0, b.cols, mem.keys);
    Weights w{};
    w.u = g_.u ? g_.u + b.row0 : nullptr;
    w.v = g_.v ? g_.v + b.col0 : nullptr;
    w.row_shift = g_.row_shift ? g_.row_shift + b.row0 : nullptr;
    w.col_shift2 = g_.col_shift2 ? g_.col_shift2 + b.col0 : nullptr;
    w.two_sided = g_.col_shift2 != nullptr;
    w.saved = g_.exponentials ? g_.exponentials + b.row0 * p_.m + b.col0 : nullptr;
    w.saved_stride = p_.m;
    w.rows = mem.weights, w.cols = queries_ ? mem.weight_pairs : nullptr;
    w.stride = stride_;
    w.row_sum = row_sums ? mem.row_sums : nullptr;
    w.col_sum = col_sums ? mem.col_sums : nullptr;
    if (row_sums) std::fill(mem.row_sums, mem.row_sums + rows_ * p_.k->lanes, 0.0f);
    if (col_sums) std::fill(mem.col_sums, mem.col_sums + cols_, 0.0f);
    w.totals = mem.pair_sums;
    p_.k->weigh[g_.kind](s, w);
  }

  // Of all blocks weighed in this memory.
  Totals totals(const Memory& mem) const {
    const i64 lanes = p_.k->lanes;
    const auto sum = [&](i64 n) {
      return std::accumulate(mem.pair_sums + n * lanes, mem.pair_sums + (n + 1) * lanes, 0.0);
    };
    return {sum(0), sum(1), sum(2)};
  }

  struct Out {
    float *rows, *keys;            // += W k and W^T q; null where not wanted
    bool fresh_rows, fresh_keys;   // nothing was added yet
    float *row_sum, *col_sum;      // += sums of W; null where not wanted
    float alpha;
  };

  void add(const Memory& mem, const Block& b, const Out& out) const {
    const bool diagonal = p_.problem.symmetric && b.row0 == b.col0;
    if (out.rows) {
      Product p = product(b.rows, b.cols, out.rows, out.fresh_rows, out.alpha, mem.slice);
      p.w = mem.weights, p.w_row = stride_ / p_.k->pack, p.w_step = 1;
      p.values = keys_->block(b.col0, b.cols, mem.key_values), p.values_stride = keys_->stride;
      p.limit = diagonal ? Product::kFromPanel : Product::kWhole;
      p_.k->product(p);
    }
    if (out.keys) {
      // on the diagonal both products write the same rows, and the first has just been
      const bool fresh = out.fresh_keys && !diagonal;
      Product p = product(b.cols, b.rows, out.keys, fresh, out.alpha, mem.slice);
      p.w = p_.k->pack == 2 ? mem.weight_pairs : mem.weights, p.w_row = 1, p.w_step = stride_;
      p.values = queries_->block(b.row0, b.rows, mem.query_values);
      p.values_stride = queries_->stride;
      p.limit = diagonal ? Product::kToPanel : Product::kWhole;
      p_.k->product(p);
    }
    if (out.row_sum) {
      std::fill(mem.totals, mem.totals + rows_, 0.0);
      p_.k->fold(mem.row_sums, b.rows, mem.totals);
      for (i64 i = 0; i < b.rows; ++i) out.row_sum[i] += (float)mem.totals[i];
    }
    if (out.col_sum)
      for (i64 j = 0; j < b.cols; ++j) out.col_sum[j] += mem.col_sums[j];
  }

 private:
  Product product(i64 rows, i64 steps, float* out, bool fresh, float alpha,
                  void* slice) const {
    Product p{};
    p.rows = rows, p.steps = ceil_div(steps, p_.k->pack), p.dim = p_.dim;
    p.out = out, p.out_stride = p_.dim, p.alpha = alpha, p.fresh = fresh, p.slice = slice;
    return p;
  }

  const Prepared& p_;
  const Gradient& g_;
  const Values *queries_, *keys_;
  i64 rows_, cols_, stride_;
};

// Both sides at once.
void both_sides(const Prepared& p, const Gradient& g, const Values& queries, const Values& keys,
                float* out_queries, float* out_keys, float alpha) {
  const bool symmetric = p.problem.symmetric;
  const i64 rows = block_side(p.n, p.k->panel), cols = block_side(p.m, p.k->panel);
  const i64 row_blocks = ceil_div(p.n, rows), col_blocks = ceil_div(p.m, cols);
  const auto blocks = rounds_of(symmetric, row_blocks, col_blocks);
  Turns turns(blocks, symmetric, row_blocks, col_blocks);
  std::vector<Totals> totals(g.totals ? blocks.size() : 0);
  const Worker worker(p, g, &queries, &keys, rows, cols);
  parallel(p.problem.pool, (i64)blocks.size(), [&](i64 task) {
    const i64 row0 = blocks[task].first * rows, col0 = blocks[task].second * cols;
    const Worker::Block block{row0, std::min(rows, p.n - row0), col0, std::min(cols, p.m - col0)};
    const Worker::Memory memory = worker.memory();
    worker.weigh(memory, block, g.row_bias != nullptr, g.key_bias != nullptr);
    if (g.totals) totals[task] = worker.totals(memory);
    turns.wait(task);
    worker.add(memory, block,
               {.rows = out_queries ? out_queries + row0 * p.dim : nullptr,
                .keys = out_keys ? out_keys + col0 * p.dim : nullptr,
                .fresh_rows = turns.first_for_rows(task),
                .fresh_keys = turns.first_for_columns(task),
                .row_sum = g.row_bias ? g.row_bias + row0 : nullptr,
                .col_sum = g.key_bias ? g.key_bias + col0 : nullptr,
                .alpha = alpha});
    turns.finish(task);
  });
  for (const Totals& t : totals) *g.totals += t;
}

// Rows only (or nothing but totals), whatever the number of keys: these are cut into chunks with
// slots of their own, so that a few queries against a long queue still occupy every thread. The
// queue is packed block by block, in scratch.
struct Chunks {
  explicit Chunks(const Prepared& p) {
    count = clamp(p.m / (4 * p.n), 1, std::min(kMaxChunks, ceil_div(p.m, kWeightBlock)));
    cols = round_up(ceil_div(p.m, count), p.k->panel);
    count = ceil_div(p.m, cols);
    const i64 row_blocks = std::max(ceil_div(p.n, kWeightBlock), ceil_div(8, count));
    rows = round_up(ceil_div(p.n, row_blocks), p.k->panel);
  }
  i64 rows, cols, count;
};

void rows_only(const Prepared& p, Arena& arena, const Gradient& g, const Values& keys, float* out,
               float* row_sum, float alpha) {
  const Chunks chunks(p);
  const i64 row_blocks = ceil_div(p.n, chunks.rows);
  const i64 cols = std::min(round_up(kWeightBlock, p.k->panel), chunks.cols);
  float* slots = chunks.count == 1 || !out ? out : arena.get<float>(chunks.count * p.n * p.dim);
  float* sums = chunks.count == 1 || !row_sum ? row_sum : arena.get<float>(chunks.count * p.n);
  std::vector<Totals> totals(g.totals ? row_blocks * chunks.count : 0);
  const Worker worker(p, g, nullptr, &keys, chunks.rows, cols);
  parallel(p.problem.pool, row_blocks * chunks.count, [&](i64 task) {
    const i64 chunk = task / row_blocks, row0 = task % row_blocks * chunks.rows;
    const i64 rows = std::min(chunks.rows, p.n - row0);
    const i64 col0 = chunk * chunks.cols, end = std::min(p.m, col0 + chunks.cols);
    float* slot = slots ? slots + (chunk * p.n + row0) * p.dim : nullptr;
    float* sum = sums ? sums + chunk * p.n + row0 : nullptr;
    if (sum) std::memset(sum, 0, rows * 4);
    const Worker::Memory memory = worker.memory();
    for (i64 col = col0; col < end; col += cols) {
      const Worker::Block block{row0, rows, col, std::min(cols, end - col)};
      worker.weigh(memory, block, sum != nullptr, false);
      worker.add(memory, block, {slot, nullptr, col == col0, false, sum, nullptr, alpha});
    }
    if (g.totals) totals[task] = worker.totals(memory);
  });
  for (const Totals& t : totals) *g.totals += t;
  if (chunks.count == 1) return;
  const auto add = [&](const float* from, float* to, i64 size) {
    parallel_ranges(p.problem.pool, size, 1 << 14, [&](i64 begin, i64 end) {
      std::copy(from + begin, from + end, to + begin);
      for (i64 c = 1; c < chunks.count; ++c)
        for (i64 i = begin; i < end; ++i) to[i] += from[c * size + i];
    });
  };
  if (out) add(slots, out, p.n * p.dim);
  if (row_sum) add(sums, row_sum, p.n);
}

void multiply(const Pool& pool, float* p, i64 count, float factor) {
  parallel_ranges(pool, p && factor != 1.0f ? count : 0, 1 << 16, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) p[i] *= factor;
  });
}

// <x, y> in a fixed order: partial sums per range of rows.
double dot(const Problem& p, const Matrix& x, const float* y) {
  constexpr i64 grain = 256;
  std::vector<double> parts(ceil_div(x.rows, grain));
  parallel_ranges(p.pool, x.rows, grain, [&](i64 begin, i64 end) {
    parts[begin / grain] = p.kernels->dot(x, y, begin, end - begin);
  });
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

}  // namespace

void mean_keys(const Prepared& p, Arena& arena, const float* row_shift, float* out, double* rows) {
  float* u = padded_floats(p.k, arena, p.n);
  std::fill(u, u + p.n, 1.0f);
  float* v = padded_floats(p.k, arena, p.m);
  std::fill(v, v + p.m, 0.0f);
  const Gradient g{row_shift ? kWeightExact : kWeightExp, u, v, row_shift};
  const Values keys(p.problem, p.problem.keys, arena, false);
  float* sums = arena.get<float>(p.n);
  rows_only(p, arena, g, keys, out, sums, 1.0f);
  parallel_ranges(p.problem.pool, p.n, 64, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const float inverse = sums[i] > 0 ? 1.0f / sums[i] : sums[i] == 0 ? 0.0f : NAN;
      for (i64 d = 0; d < p.dim; ++d) out[i * p.dim + d] *= inverse;
      rows[i] = std::log((double)sums[i]);
    }
  });
}

void gradient(const Prepared& p, Arena& arena, const Gradient& g) {
  const Problem& problem = p.problem;
  const Pool& pool = problem.pool;
  const bool both = problem.symmetric || g.keys || g.key_bias || g.row_bias;
  const i64 size = p.n * p.dim;
  // the scale's gradient is <q, W k>: without a caller's buffer, W k goes to one of ours
  float* rows = g.queries || !g.scale ? g.queries : arena.get<float>(size);
  const float alpha = (float)(g.scale ? g.factor : g.factor * problem.scale);
  if (g.row_bias) std::fill(g.row_bias, g.row_bias + p.n, 0.0f);
  if (g.key_bias) std::fill(g.key_bias, g.key_bias + p.m, 0.0f);
  const Values keys(problem, problem.keys, arena, both);
  if (both) {
    const Values queries = problem.symmetric ? keys : Values(problem, problem.queries, arena, true);
    both_sides(p, g, queries, keys, rows, problem.symmetric ? rows : g.keys, alpha);
  } else if (rows || g.totals) {
    rows_only(p, arena, g, keys, rows, nullptr, alpha);
  }
  multiply(pool, g.row_bias, p.n, (float)g.factor);
  multiply(pool, g.key_bias, p.m, (float)g.factor);
  if (!g.scale) return;
  *g.scale = dot(problem, problem.queries, rows) * (problem.symmetric ? 0.5 : 1.0);
  multiply(pool, g.queries, size, problem.scale);
  multiply(pool, g.keys, p.m * p.dim, problem.scale);
}

}  // namespace fastcl::cpu
