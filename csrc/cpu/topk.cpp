// The k best-scoring keys of each query, best first, ties to the lower index.
#include <algorithm>

#include "prepare.h"

namespace fastcl::cpu {
namespace {

constexpr i64 kRows = 64, kCols = 256;  // a block of scores between the tile and the selection
constexpr i64 kMaxChunks = 32;

struct Candidate {
  float value;
  i64 index;
};

// Heap order: the worst candidate on top.
bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The best k seen so far. Candidates arrive by rising index, so an equal one never displaces.
class Best {
 public:
  Best(Candidate* heap, i64 k) : heap_(heap), k_(k) {}
  void offer(float value, i64 index) {
    if (size_ < k_) {
      heap_[size_++] = {value, index};
      std::push_heap(heap_, heap_ + size_, better);
    } else if (value > heap_[0].value) {
      std::pop_heap(heap_, heap_ + size_, better);
      heap_[size_ - 1] = {value, index};
      std::push_heap(heap_, heap_ + size_, better);
    }
  }
  // What a score must exceed to enter.
  float threshold() const { return size_ < k_ ? -INFINITY : heap_[0].value; }
  i64 sort() {
    std::sort_heap(heap_, heap_ + size_, better);
    return size_;
  }

 private:
  Candidate* heap_;
  i64 k_, size_ = 0;
};

// Is anything in a stretch of scores above the threshold? Nearly always not.
bool any_above(const float* scores, i64 count, float threshold) {
  bool any = false;
  for (i64 c = 0; c < count; ++c) any |= scores[c] > threshold;
  return any;
}

void select(const float* scores, i64 count, i64 first, float below, Best& best) {
  constexpr i64 stretch = 32;
  for (i64 c = 0; c < count; c += stretch) {
    const i64 end = std::min(count, c + stretch);
    if (!any_above(scores + c, end - c, best.threshold())) continue;
    for (i64 n = c; n < end; ++n)
      if (scores[n] > best.threshold() && scores[n] < below) best.offer(scores[n], first + n);
  }
}

void write(Best& best, const Candidate* heap, i64 k, i64* indices, float* values) {
  const i64 found = best.sort();
  for (i64 n = 0; n < k; ++n) {
    indices[n] = n < found ? heap[n].index : -1;
    values[n] = n < found ? heap[n].value : -INFINITY;
  }
}

}  // namespace

void topk(const Problem& problem, i64 k, const float* below, i64* indices, float* values) {
  Arena arena;
  const Prepared p(problem, arena, Units::natural, 0.0f, false);
  const i64 rows = round_up(kRows, p.k->panel), cols = round_up(kCols, p.k->panel);
  const i64 row_blocks = ceil_div(p.n, rows);
  // few queries against many keys: chunks of keys, each with candidates of its own
  const i64 chunks = clamp(16 / row_blocks, 1, std::min(kMaxChunks, ceil_div(p.m, 4 * cols)));
  const i64 chunk_cols = round_up(ceil_div(p.m, chunks), p.k->panel);
  Candidate* found = arena.get<Candidate>(p.n * chunks * k);
  i64* sizes = arena.get<i64>(p.n * chunks);
  parallel(problem.pool, row_blocks * chunks, [&](i64 task) {
    const i64 chunk = task % chunks, row0 = task / chunks * rows;
    const i64 count = std::min(rows, p.n - row0);
    const i64 begin = chunk * chunk_cols, end = std::min(p.m, begin + chunk_cols);
    std::vector<Best> best;
    for (i64 i = 0; i < count; ++i)
      best.emplace_back(found + ((row0 + i) * chunks + chunk) * k, k);
    const i64 keys = p.key_scratch(cols);
    Scratch& s = Scratch::reset(Scratch::padded(keys * 4) + Scratch::padded(rows * cols * 4));
    void* key_scratch = s.get<uint32_t>(keys);
    float* scores = s.get<float>(rows * cols);
    for (i64 col = begin; col < end; col += cols) {
      const i64 width = std::min(cols, end - col);
      ScoreBlock block = p.block(row0, count, col, width, key_scratch);
      block.triangle = false;
      p.k->scores(block, scores, cols);
      for (i64 i = 0; i < count; ++i)
        select(scores + i * cols, width, col, below ? below[row0 + i] : INFINITY, best[i]);
    }
    for (i64 i = 0; i < count; ++i) sizes[(row0 + i) * chunks + chunk] = best[i].sort();
  });
  parallel_ranges(problem.pool, p.n, 64, [&](i64 begin, i64 end) {
    std::vector<Candidate> heap(k);
    for (i64 i = begin; i < end; ++i) {
      Best best(heap.data(), k);
      for (i64 c = 0; c < chunks; ++c)
        for (i64 n = 0; n < sizes[i * chunks + c]; ++n) {
          const Candidate& x = found[(i * chunks + c) * k + n];
          best.offer(x.value, x.index);
        }
      write(best, heap.data(), k, indices + i * k, values + i * k);
    }
  });
}

}  // namespace fastcl::cpu
