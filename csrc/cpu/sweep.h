// A problem reduced block by block: every task leaves partial sums in a slot of its own, and slots
// are added in a fixed order, so results do not depend on threads.
#pragma once
#include "prepare.h"

namespace fastcl::cpu {

// How the score matrix is cut into tasks.
struct Plan {
  Plan(const Prepared&);
  i64 rows, cols;          // of a task's block
  i64 row_blocks, col_blocks;
  bool triangle;
  i64 tasks() const {
    return triangle ? row_blocks * (row_blocks + 1) / 2 : row_blocks * col_blocks;
  }
  void locate(i64 task, i64& i, i64& j) const;
};

// Partial results: rows[slot][n] and columns[slot][m]; in a triangle they share their slots.
struct Slots {
  float *rows = nullptr, *columns = nullptr;
  i64 row_slots, column_slots;
};

struct SweepResult {
  Slots sums, maxima;  // the fields that the mode does not fill stay null
};

struct SweepArgs {
  Mode mode;
  const float *row_shift = nullptr, *col_shift2 = nullptr;
  float* exponentials = nullptr;
};

SweepResult sweep(const Prepared&, Arena&, const SweepArgs&);

// Sum of a position over its slots, in their order.
inline double add_slots(const float* slots, i64 count, i64 size, i64 position) {
  double sum = 0;
  for (i64 s = 0; s < count; ++s) sum += slots[s * size + position];
  return sum;
}

inline float max_slots(const float* slots, i64 count, i64 size, i64 position) {
  float largest = -INFINITY;
  for (i64 s = 0; s < count; ++s) largest = std::fmax(largest, slots[s * size + position]);
  return largest;
}

}  // namespace fastcl::cpu
