#include "sweep.h"

#include <algorithm>

namespace fastcl::cpu {
namespace {

constexpr i64 kMinBlock = 64;         // 64 x 64 x 128: a task of some 10 microseconds
constexpr i64 kMaxSlots = 32;         // bounds the partial sums at 128 bytes a row
constexpr i64 kRowBlock = 2048;       // rows that share one packing of a key block: under 1 %
constexpr i64 kKeyBytes = 512 << 10;  // packed keys of one sub-block: half a second-level cache
constexpr i64 kFlush = 1024;          // columns summed in fp32 lanes before they join a double

// One task's accumulators.
struct Lanes {
  Lanes(Scratch& s, const Kernels* k, i64 rows, i64 cols, float start)
      : row(s.get<float>(round_up(rows, k->panel) * k->lanes)), column(s.get<float>(cols)) {
    std::fill(row, row + round_up(rows, k->panel) * k->lanes, start);
    std::fill(column, column + cols, start);
  }
  static i64 bytes(const Kernels* k, i64 rows, i64 cols) {
    return Scratch::padded(round_up(rows, k->panel) * k->lanes * 4) + Scratch::padded(cols * 4);
  }
  float *row, *column;
};

class Task {
 public:
  Task(const Prepared& p, const Plan& plan, const SweepArgs& args, const SweepResult& out)
      : p_(p), plan_(plan), args_(args), out_(out),
        step_(std::min(kFlush, clamp(kKeyBytes / (p.depth * 4), 1, kFlush))) {
    step_ = std::max(step_ / p.k->panel, (i64)1) * p.k->panel;
  }

  void operator()(i64 task) const {
    i64 bi, bj;
    plan_.locate(task, bi, bj);
    const i64 row0 = bi * plan_.rows, rows = std::min(plan_.rows, p_.n - row0);
    const i64 col0 = bj * plan_.cols, cols = std::min(plan_.cols, p_.m - col0);
    const i64 padded_rows = round_up(rows, p_.k->panel), padded = round_up(cols, p_.k->panel);
    const i64 keys = p_.key_scratch(step_);
    Scratch& s = Scratch::reset(2 * Lanes::bytes(p_.k, rows, padded) + Scratch::padded(keys * 4) +
                                Scratch::padded(padded_rows * 8));
    Lanes sums(s, p_.k, out_.sums.rows ? rows : 0, out_.sums.rows ? padded : 0, 0.0f);
    Lanes maxima(s, p_.k, out_.maxima.rows ? rows : 0, out_.maxima.rows ? padded : 0, -INFINITY);
    double* totals = s.get<double>(padded_rows);
    std::fill(totals, totals + padded_rows, 0.0);
    void* key_scratch = s.get<uint32_t>(keys);
    for (i64 c = 0; c < cols; c += step_) {
      const ScoreBlock block =
          p_.block(row0, rows, col0 + c, std::min(step_, cols - c), key_scratch);
      p_.k->reduce[args_.mode](block, reduction(row0, col0 + c, sums, maxima, c));
      if (out_.sums.rows) p_.k->fold(sums.row, rows, totals);
    }
    if (out_.sums.rows) write_sums(bi, bj, row0, rows, col0, cols, totals, sums.column);
    if (out_.maxima.rows) write_maxima(bi, bj, row0, rows, col0, cols, maxima);
  }

 private:
  Reduction reduction(i64 row0, i64 col, const Lanes& sums, const Lanes& maxima, i64 c) const {
    Reduction r{};
    r.row_sum = sums.row, r.col_sum = sums.column + c;
    r.row_max = maxima.row, r.col_max = maxima.column + c;
    r.row_shift = args_.row_shift ? args_.row_shift + row0 : nullptr;
    r.col_shift2 = args_.col_shift2 ? args_.col_shift2 + col : nullptr;
    r.saved = args_.exponentials ? args_.exponentials + row0 * p_.m + col : nullptr;
    r.saved_stride = p_.m;
    return r;
  }

  void write_sums(i64 bi, i64 bj, i64 row0, i64 rows, i64 col0, i64 cols, const double* totals,
                  const float* columns) const {
    float* row = out_.sums.rows + bj * p_.n + row0;
    float* column = out_.sums.columns + bi * p_.m + col0;
    const bool diagonal = plan_.triangle && bi == bj;
    for (i64 i = 0; i < rows; ++i) row[i] = (float)(totals[i] + (diagonal ? columns[i] : 0.0f));
    if (!diagonal) std::copy(columns, columns + cols, column);
  }

  void write_maxima(i64 bi, i64 bj, i64 row0, i64 rows, i64 col0, i64 cols,
                    const Lanes& maxima) const {
    float* row = out_.maxima.rows + bj * p_.n + row0;
    float* column = out_.maxima.columns + bi * p_.m + col0;
    const bool diagonal = plan_.triangle && bi == bj;
    for (i64 i = 0; i < rows; ++i) {
      const float* lanes = maxima.row + i * p_.k->lanes;
      row[i] = *std::max_element(lanes, lanes + p_.k->lanes);
      if (diagonal) row[i] = std::max(row[i], maxima.column[i]);
    }
    if (!diagonal) std::copy(maxima.column, maxima.column + cols, column);
  }

  const Prepared& p_;
  const Plan& plan_;
  const SweepArgs& args_;
  const SweepResult& out_;
  i64 step_;
};

Slots make_slots(const Prepared& p, const Plan& plan, Arena& arena) {
  Slots s;
  s.row_slots = plan.col_blocks;
  s.column_slots = plan.row_blocks;
  s.rows = arena.get<float>(s.row_slots * p.n);
  s.columns = plan.triangle ? s.rows : arena.get<float>(s.column_slots * p.m);
  return s;
}

}  // namespace

Plan::Plan(const Prepared& p) : triangle(p.problem.symmetric) {
  const i64 panel = p.k->panel;
  if (triangle) {
    // eight blocks a side give 36 tasks; long sides are cut into as many slots as there may be
    const i64 side = clamp(p.n / 8, kMinBlock, std::max((i64)512, ceil_div(p.n, kMaxSlots)));
    rows = cols = round_up(side, panel);
  } else {
    rows = round_up(std::max(kRowBlock, ceil_div(p.n, kMaxSlots)), panel);
    const i64 row_blocks = ceil_div(p.n, rows);
    const i64 side = ceil_div(p.m * row_blocks, 16);
    cols = round_up(std::max({kMinBlock, side, ceil_div(p.m, kMaxSlots)}), panel);
  }
  row_blocks = ceil_div(p.n, rows);
  col_blocks = ceil_div(p.m, cols);
}

void Plan::locate(i64 task, i64& i, i64& j) const {
  if (!triangle) {
    i = task / col_blocks;
    j = task % col_blocks;
    return;
  }
  for (i = 0; task >= row_blocks - i; ++i) task -= row_blocks - i;
  j = i + task;
}

SweepResult sweep(const Prepared& p, Arena& arena, const SweepArgs& args) {
  const Plan plan(p);
  SweepResult out;
  if (args.mode != kMax) out.sums = make_slots(p, plan, arena);
  if (args.mode == kMax || args.mode == kSumMax) out.maxima = make_slots(p, plan, arena);
  parallel(p.problem.pool, plan.tasks(), Task(p, plan, args, out));
  return out;
}

}  // namespace fastcl::cpu
