// The order in which blocks of weights are added to rows that they share.
#pragma once
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "prepare.h"

namespace fastcl::cpu {

// Blocks in rounds: round r visits (i, r - i) of a symmetric problem, (i, i + r) of any other,
// modulo the number of blocks, so that within a round no two tasks write the same rows.
inline std::vector<std::pair<i64, i64>> rounds_of(bool symmetric, i64 row_blocks,
                                                  i64 col_blocks) {
  const i64 rounds = std::max(row_blocks, col_blocks);
  std::vector<std::pair<i64, i64>> blocks;
  for (i64 round = 0; round < rounds; ++round)
    for (i64 i = 0; i < row_blocks; ++i) {
      const i64 j = symmetric ? (round + rounds - i) % rounds : (i + round) % rounds;
      if (j < col_blocks && !(symmetric && j < i)) blocks.emplace_back(i, j);
    }
  return blocks;
}

// Lets tasks that write the same rows do so in the order in which they are listed, without a
// barrier: a task waits until its predecessors on either side are done. Tasks start in that order
// too, so the earliest unfinished one never waits.
class Turns {
 public:
  Turns(const std::vector<std::pair<i64, i64>>& tasks, bool symmetric, i64 row_blocks,
        i64 col_blocks)
      : done_(symmetric ? row_blocks : row_blocks + col_blocks), turn_(tasks.size()) {
    std::vector<int> seen(done_.size());
    const i64 columns = symmetric ? 0 : row_blocks;
    for (size_t t = 0; t < tasks.size(); ++t) {
      const i64 i = tasks[t].first, j = columns + tasks[t].second;
      turn_[t] = {i, j, seen[i], seen[j]};
      ++seen[i];
      if (j != i) ++seen[j];
    }
  }
  void wait(i64 task) const {
    const Turn& t = turn_[task];
    while (done_[t.i].load(std::memory_order_acquire) != t.before_i ||
           done_[t.j].load(std::memory_order_acquire) != t.before_j)
      std::this_thread::yield();
  }
  bool first_for_rows(i64 task) const { return turn_[task].before_i == 0; }
  bool first_for_columns(i64 task) const { return turn_[task].before_j == 0; }
  void finish(i64 task) {
    const Turn& t = turn_[task];
    done_[t.i].store(t.before_i + 1, std::memory_order_release);
    if (t.j != t.i) done_[t.j].store(t.before_j + 1, std::memory_order_release);
  }

 private:
  struct Turn {
    i64 i, j;
    int before_i, before_j;
  };
  std::vector<std::atomic<int>> done_;
  std::vector<Turn> turn_;
};

}  // namespace fastcl::cpu
