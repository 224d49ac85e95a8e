// Rows and columns of log-sum-exp from one sweep.
//
// Exponents are shifted by one number, the balanced offset: with scores at most B in size,
// c = max(0, B - (124 ln 2 - ln M)) keeps every sum finite. A row whose scores all lie far below
// may flush to zero; when B is so large that this can happen, rows are looked at, and if one did,
// everything is done again with the true maximum of each row and column.
#include <algorithm>

#include "accumulate.h"
#include "sweep.h"

namespace fastcl::cpu {
namespace {

constexpr i64 kRowGrain = 128;  // rows per task of the closing arithmetic: some 3 microseconds

float balanced_offset(double bound, i64 m) {
  return (float)std::max(0.0, bound - (124 * kLn2 - std::log((double)m)));
}

// Is any pair of row i kept? Rows and columns swap roles for `by_column`.
bool keeps_any(const Problem& p, bool by_column, i64 i) {
  const i64 others = by_column ? p.queries.rows : p.keys.rows;
  const i64* own = by_column ? p.key_ids : p.query_ids;
  const i64* other = by_column ? p.query_ids : p.key_ids;
  for (i64 j = 0; j < others; ++j) {
    const i64 offset = by_column ? i - j : j - i;
    if (std::find(p.skip, p.skip + p.skips, offset) != p.skip + p.skips) continue;
    if (p.relation == Relation::any || (own[i] == other[j]) == (p.relation == Relation::same))
      return true;
  }
  return false;
}

// Did a row with something to sum come out below what a flushed row could hide?
bool flushed(const Problem& p, const float* slots, i64 count, i64 size, bool by_column) {
  for (i64 i = 0; i < size; ++i)
    if (!(add_slots(slots, count, size, i) >= 0x1p-100) && keeps_any(p, by_column, i)) return true;
  return false;
}

void write_logs(const Problem& p, const float* slots, i64 count, i64 size, const float* shift,
                float offset, double* out) {
  parallel_ranges(p.pool, size, kRowGrain, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const double largest = shift ? -shift[i] * kLn2 : offset;
      out[i] = std::log(add_slots(slots, count, size, i)) + largest;
    }
  });
}

void write_maxima(const float* slots, i64 count, i64 size, float offset, float* out) {
  for (i64 i = 0; i < size; ++i)
    out[i] = (float)(max_slots(slots, count, size, i) * kLn2 + offset);
}

// Minus the maximum of each row in log2 units, 0 for an empty one.
float* negated_maxima(const Prepared& p, Arena& arena, const float* slots, i64 count, i64 size) {
  float* shift = padded_floats(p.k, arena, size);
  for (i64 i = 0; i < size; ++i) {
    const float largest = max_slots(slots, count, size, i);
    shift[i] = std::isinf(largest) ? 0.0f : -largest;
  }
  return shift;
}

void maxima_out(const Slots& s, i64 n, i64 m, float offset, const LogSumExp& out) {
  if (out.row_max) write_maxima(s.rows, s.row_slots, n, offset, out.row_max);
  if (out.column_max) write_maxima(s.columns, s.column_slots, m, offset, out.column_max);
}

bool by_offset(const Problem& p, const LogSumExp& out, float offset, bool may_flush) {
  Arena arena;
  const Prepared prepared(p, arena, Units::log2, offset, false);
  const Mode mode = out.row_max ? kSumMax : kSum;
  const SweepResult result = sweep(prepared, arena, {mode, nullptr, nullptr, out.exponentials});
  const Slots& s = result.sums;
  if (may_flush && flushed(p, s.rows, s.row_slots, prepared.n, false)) return false;
  if (may_flush && out.columns && flushed(p, s.columns, s.column_slots, prepared.m, true))
    return false;
  write_logs(p, s.rows, s.row_slots, prepared.n, nullptr, offset, out.rows);
  if (out.columns)
    write_logs(p, s.columns, s.column_slots, prepared.m, nullptr, offset, out.columns);
  maxima_out(result.maxima, prepared.n, prepared.m, offset, out);
  return true;
}

void by_maxima(const Problem& p, const LogSumExp& out) {
  Arena arena;
  const Prepared prepared(p, arena, Units::log2, 0.0f, false);
  const Slots maxima = sweep(prepared, arena, {kMax}).maxima;
  maxima_out(maxima, prepared.n, prepared.m, 0.0f, out);
  const float* rows = negated_maxima(prepared, arena, maxima.rows, maxima.row_slots, prepared.n);
  const float* columns =
      p.symmetric ? rows
                  : negated_maxima(prepared, arena, maxima.columns, maxima.column_slots,
                                   prepared.m);
  if (out.mean_keys) {
    mean_keys(prepared, arena, rows, out.mean_keys, out.rows);
    for (i64 i = 0; i < prepared.n; ++i) out.rows[i] -= rows[i] * kLn2;
    return;
  }
  const Slots sums = sweep(prepared, arena, {kExact, rows, columns}).sums;
  write_logs(p, sums.rows, sums.row_slots, prepared.n, rows, 0, out.rows);
  if (out.columns)
    write_logs(p, sums.columns, sums.column_slots, prepared.m, columns, 0, out.columns);
}

bool mean_keys_by_offset(const Problem& p, const LogSumExp& out, float offset, bool may_flush) {
  Arena arena;
  const Prepared prepared(p, arena, Units::log2, offset, false);
  if (out.row_max)
    maxima_out(sweep(prepared, arena, {kMax}).maxima, prepared.n, prepared.m, offset, out);
  mean_keys(prepared, arena, nullptr, out.mean_keys, out.rows);
  for (i64 i = 0; i < prepared.n; ++i) {
    if (may_flush && !(out.rows[i] >= -100 * kLn2) && keeps_any(p, false, i)) return false;
    out.rows[i] += offset;
  }
  return true;
}

}  // namespace

void logsumexp(const Problem& p, const LogSumExp& out) { logsumexp(p, out, score_bound(p)); }

void logsumexp(const Problem& p, const LogSumExp& out, double bound) {
  const float offset = balanced_offset(bound, p.keys.rows);
  const bool may_flush = !(bound + offset < 87);
  bool done = false;
  if (std::isfinite(offset))
    done = out.mean_keys ? mean_keys_by_offset(p, out, offset, may_flush)
                         : by_offset(p, out, offset, may_flush);
  if (!done) by_maxima(p, out);
  *out.offset = done ? offset : NAN;
}

}  // namespace fastcl::cpu
