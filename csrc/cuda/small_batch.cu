// From features to a loss and its gradients in one cooperative launch, for batches whose time is
// that of launches and of trips to memory, not of arithmetic.
//
// Rows of a and of b alike meet keys: all rows of both (form views) or those of the other batch.
// Entry (i, j) then counts for row i, and for the row that j is: its gradient is
//     W_ij = g_i exp(s_ij - lse_i) + g_j exp(s_ij - lse_j),
// so every gradient is a sum over a row's keys, W x keys, and no other direction is needed. Row i
// and its partner share an index and are no negatives, nor is i itself: whatever the form, what is
// left out is i == j.
//
// A block of threads takes an item: 64 rows and some tiles of 128 keys, of which each of 4 x 2
// warps takes 16 rows and 64 keys. The grid meets twice:
//   1. sums of exponentials (with their maximum) go to slots;
//   2. slots give log-sum-exps, hence weights; scores are formed again, unless an item is one tile
//      and they are still in registers; parts of the gradients go to slots;
//   3. slots are added up and pass the derivative of the normalisation.
// Every slot has one writer and is read in a fixed order. What an item is depends on the shape of
// the problem and on the number of multiprocessors, not on how many blocks run.
//
// Products take features as they come: lengths divide afterwards, in fp32, so that 16-bit inputs
// are not rounded again. Logarithms and scores are to base 2.
#include "small_batch.h"

#include <cmath>

#include "device.h"
#include "tensor_cores.h"

namespace fastcl::cuda {
namespace {

constexpr int kRows = 64, kKeys = 128, kThreads = 256, kWarps = kThreads / 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A sum of 2^(x - max).
struct alignas(8) Sum {
  float max, sum;
};

struct Batch {
  const void* data;
  Type type;
  i64 stride;
  bool copies;   // rows are copied as they are, in pieces of 16 bytes
  bool shrinks;  // rounded to fewer bits: lengths divide first, lest range be lost
  bool loses;    // its rows are classified
  float* grad;
};

struct Call {
  Batch batches[2];
  int n, d, padded, pitch;  // the pitch is in bytes: 16 over, so that rows lie in other banks
  int blocks, tiles;        // of a batch's rows, of its keys
  int splits, span, items;  // parts of a row's keys, tiles in each but the last; all items
  int turns;                // items of a block at most
  int stages;               // tiles of keys in shared memory
  bool kept;  // a block has one item of one tile: it stays there, and its scores in registers
  bool views;
  float eps, share;
  const float* scale;
  float *loss, *grad_scale;
  Sum* sums;         // [2 splits, 2 n], a warp's keys each
  float* gradients;  // [splits, 2 n, padded]
  float* cosines;    // [n]
  float* inverse;    // [2 n], reciprocal lengths
  float* gains;      // [2 n], derivatives by log-sum-exps
  float* losses;     // [2 n]
  float* scales;     // [items], parts of the scale's gradient

  FASTCL_DEVICE int met() const { return views ? 2 * tiles : tiles; }  // tiles that a row meets
};

struct Tile {
  int batch, first;
};

struct Item {
  int batch, first, split, begin, tiles;

  FASTCL_DEVICE Item(const Call& c, int index) {
    const int block = index / c.splits;
    split = index % c.splits;
    batch = block / c.blocks;
    first = block % c.blocks * kRows;
    begin = split * c.span;
    tiles = c.span < c.met() - begin ? c.span : c.met() - begin;
  }
  FASTCL_DEVICE Tile tile(const Call& c, int t) const {
    const int index = begin + t;
    return {c.views ? index / c.tiles : 1 - batch, index % c.tiles * kKeys};
  }
};

// What is known of a row or a key.
struct alignas(16) Line {
  float factor;       // times which it is of unit length
  float max, weight;  // its negatives' exponentials weigh weight 2^(score - max) in the gradient
  float cosine;       // with its partner
};

// Known offsets first.
struct Shared {
  Line rows[kRows], keys[kKeys];
  float warps[kWarps];

  static FASTCL_DEVICE Shared& get() { return *reinterpret_cast<Shared*>(shared_memory()); }
  static FASTCL_DEVICE unsigned char* row_data() { return shared_memory() + sizeof(Shared); }
  static FASTCL_DEVICE unsigned char* key_data(const Call& c, int stage) {
    return row_data() + (kRows + stage * kKeys) * c.pitch;
  }
};

FASTCL_DEVICE void store(float* to, float x) { *to = x; }
template <class T>
FASTCL_DEVICE void store(T* to, float x) {
  to->bits = (uint16_t)pack(T{}, x, 0.0f);
}

FASTCL_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

FASTCL_DEVICE float inverse_length(float squares, float eps) {
  const float length = sqrtf(squares);
  return 1.0f / (length < eps ? eps : length);  // NaN stays NaN
}

FASTCL_DEVICE float entry(const Batch& batch, i64 place) {
  if (batch.type == Type::f32) return static_cast<const float*>(batch.data)[place];
  const uint16_t bits = static_cast<const uint16_t*>(batch.data)[place];
  return batch.type == Type::bf16 ? widen(bf16{bits}) : widen(f16{bits});
}

// Entries lane, lane + 32, ... of a row, zero past its end.
template <int kCount>
FASTCL_DEVICE void read_row(float (&x)[kCount], const Batch& batch, i64 row, int d, int lane) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    x[k] = lane + 32 * k < d ? entry(batch, row * batch.stride + lane + 32 * k) : 0.0f;
}

// Both reciprocal lengths and the cosine of each pair, a warp per pair.
template <int kWidth>
FASTCL_DEVICE void measure_pairs(const Call& c) {
  const int lane = threadIdx.x % 32;
  for (int i = blockIdx.x * kWarps + threadIdx.x / 32; i < c.n; i += gridDim.x * kWarps) {
    float a[kWidth / 32], b[kWidth / 32], aa = 0.0f, bb = 0.0f, ab = 0.0f;
    read_row(a, c.batches[0], i, c.d, lane);
    read_row(b, c.batches[1], i, c.d, lane);
#pragma unroll
    for (int k = 0; k < kWidth / 32; ++k) aa += a[k] * a[k], bb += b[k] * b[k], ab += a[k] * b[k];
    const float first = inverse_length(warp_sum(aa), c.eps);
    const float second = inverse_length(warp_sum(bb), c.eps);
    const float cosine = warp_sum(ab) * first * second;
    if (lane == 0) c.inverse[i] = first, c.inverse[c.n + i] = second, c.cosines[i] = cosine;
  }
}

// `count` rows to shared memory, zeros past the batch: there, or on their way.
template <class T, int kWidth>
FASTCL_DEVICE void bring(const Call& c, unsigned char* to, Tile rows, int count) {
  const Batch& batch = c.batches[rows.batch];
  if (batch.copies) {
    constexpr int kPiece = 16 / sizeof(T);
    const T* from = static_cast<const T*>(batch.data);
    const int pieces = c.padded / kPiece;
    int row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    while (row < count) {
      const bool valid = rows.first + row < c.n && piece * kPiece < c.d;
      cp_async(to + row * c.pitch + piece * 16,
               from + (valid ? (rows.first + row) * batch.stride + piece * kPiece : 0), valid);
      row += kThreads / pieces, piece += kThreads % pieces;
      if (piece >= pieces) ++row, piece -= pieces;
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < count; row += kWarps) {
    float x[kWidth / 32], squares = 0.0f;
    read_row(x, batch, rows.first + row, rows.first + row < c.n ? c.d : 0, lane);
#pragma unroll
    for (int k = 0; k < kWidth / 32; ++k) squares += x[k] * x[k];
    const float factor = batch.shrinks ? inverse_length(warp_sum(squares), c.eps) : 1.0f;
    T* line = reinterpret_cast<T*>(to + row * c.pitch);
#pragma unroll
    for (int k = 0; k < kWidth / 32; ++k)
      if (32 * k < c.padded) store(line + lane + 32 * k, x[k] * factor);
  }
}

struct alignas(16) Piece {
  u32 words[4];
};
FASTCL_DEVICE float squares_of(float, u32 word) { return as_float(word) * as_float(word); }
template <class T>
FASTCL_DEVICE float squares_of(T, u32 word) {
  const float low = widen(T{(uint16_t)word}), high = widen(T{(uint16_t)(word >> 16)});
  return low * low + high * high;
}

// The factors of rows in shared memory, eight lanes per row.
template <class T>
FASTCL_DEVICE void measure(const Call& c, Line* lines, const unsigned char* rows, int batch,
                           int count) {
  const int member = threadIdx.x % 8, pieces = c.padded * (int)sizeof(T) / 16;
  for (int row = threadIdx.x / 8; row < count; row += kThreads / 8) {
    float squares = 0.0f;
    for (int i = member; i < pieces; i += 8) {
      const Piece piece = *reinterpret_cast<const Piece*>(rows + row * c.pitch + 16 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) squares += squares_of(T{}, piece.words[k]);
    }
    for (int mask = 4; mask; mask /= 2) squares += shuffle_xor(squares, mask);
    if (member == 0)
      lines[row].factor = c.batches[batch].shrinks ? 1.0f : inverse_length(squares, c.eps);
  }
}

// Where a thread's scores lie.
struct Place {
  int warp, lane;
  int row;  // the first of two, eight apart, in the block of rows
  int key;  // the first, in the tile

  FASTCL_DEVICE Place() {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = warp % 4 * 16 + lane / 4;
    key = half() * kSweepKeys + lane % 4 * 2;
  }
  FASTCL_DEVICE int half() const { return warp / 4; }
};

template <class T>
FASTCL_DEVICE void form_cosines(const Call& c, Scores& x, const unsigned char* keys,
                                const Place& p) {
  const int lane = p.lane;
  const int row = p.warp % 4 * 16 + lane % 16;
  const int key = p.half() * kSweepKeys + lane % 8 + lane / 16 * 8;
  multiply_rows(T{}, x, Shared::row_data() + row * c.pitch + lane / 16 * 16,
                keys + key * c.pitch + lane / 8 % 2 * 16, c.pitch, c.padded);
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
    for (int i = 0; i < 4; ++i)
      x[n][i] *= Shared::get().rows[p.row + i / 2 * 8].factor *
                 Shared::get().keys[p.key + 8 * n + i % 2].factor;
}

// Whether row and key, both numbers in their batch, are a row and one of its negatives.
FASTCL_DEVICE bool counts(const Call& c, int row, int key) {
  return row != key && row < c.n && key < c.n;
}

// What is subtracted from scores whose maximum this is: of none, -inf.
FASTCL_DEVICE float base_of(float max) { return max == -INFINITY ? 0.0f : max; }

// The exponentials of this thread's scores in one of its rows.
FASTCL_DEVICE void add_exponentials(const Call& c, Sum& sum, const Scores& cosines, int which,
                                    float scale, int row, int key) {
  float max = sum.max;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
    for (int i = 0; i < 2; ++i)
      if (counts(c, row, key + 8 * n + i)) max = fmaxf(max, cosines[n][2 * which + i] * scale);
  const float base = base_of(max);
  float total = sum.sum * exp2_fast(sum.max - base);
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
    for (int i = 0; i < 2; ++i)
      if (counts(c, row, key + 8 * n + i))
        total += exp2_fast(cosines[n][2 * which + i] * scale - base);
  sum = {max, total};
}

// How a row is classified, given the slots.
struct Term {
  float max, weight;  // of its Line
  float gain, loss;
};
FASTCL_DEVICE Term classify(const Call& c, int batch, int row, float scale) {
  if (!c.batches[batch].loses || row >= c.n) return {INFINITY, 0.0f, 0.0f, 0.0f};
  const Sum* sums = c.sums + batch * c.n + row;
  float max = -INFINITY, total = 0.0f;
#pragma unroll 8
  for (int i = 0; i < 2 * c.splits; ++i) max = fmaxf(max, sums[i * 2 * c.n].max);
  const float base = base_of(max);
#pragma unroll 8
  for (int i = 0; i < 2 * c.splits; ++i) {
    const Sum part = sums[i * 2 * c.n];
    total += part.sum * exp2_fast(part.max - base);
  }
  const float gap = ((base - c.cosines[row] * scale) + log2f(total)) * kLn2;  // no negative: -inf
  const float t = expf(-fabsf(gap));
  const float gain = c.share * ((gap < 0.0f ? t : 1.0f) / (1.0f + t));
  return {base, total == 0.0f ? 0.0f : gain / total, gain, fmaxf(gap, 0.0f) + log1pf(t)};
}

FASTCL_DEVICE Line line_of(const Call& c, int batch, int row, const Term& term) {
  if (row >= c.n) return {1.0f, term.max, term.weight, 0.0f};
  const float factor = c.batches[batch].shrinks ? 1.0f : c.inverse[batch * c.n + row];
  return {factor, term.max, term.weight, c.cosines[row]};
}

// What the keys of a tile weigh, and with the first tile an item's rows, from the slots; of rows
// also, once, what the end needs.
FASTCL_DEVICE void classify_lines(const Call& c, const Item& item, Tile tile, bool first,
                                  float scale) {
  const int i = threadIdx.x;
  const bool key = i < kKeys;
  if (!key && !(first && i < kKeys + kRows)) return;
  const int batch = key ? tile.batch : item.batch;
  const int row = key ? tile.first + i : item.first + i - kKeys;
  const Term term = classify(c, batch, row, scale);
  (key ? Shared::get().keys[i] : Shared::get().rows[i - kKeys]) = line_of(c, batch, row, term);
  if (key || item.split > 0 || row >= c.n) return;
  c.gains[batch * c.n + row] = term.gain;
  c.losses[batch * c.n + row] = term.loss;
}

// From cosines to weights of unit keys, times what makes keys unit; `by_scale` gains the derivative
// by the scale.
FASTCL_DEVICE void weigh(const Call& c, Scores& x, float& by_scale, float scale, int first_row,
                         int first_key, const Place& p) {
  const Line rows[2] = {Shared::get().rows[p.row], Shared::get().rows[p.row + 8]};
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Line& row = rows[i / 2];
      const int number = p.key + 8 * n + i % 2;
      const Line key = Shared::get().keys[number];
      const float cosine = x[n][i], score = cosine * scale;
      const float own = exp2_fast(score - row.max) * row.weight;
      const float other = exp2_fast(score - key.max) * key.weight;
      const bool counted = counts(c, first_row + p.row + i / 2 * 8, first_key + number);
      if (counted) by_scale += own * (cosine - row.cosine);
      x[n][i] = counted ? (own + other) * key.factor : 0.0f;
    }
}

// An item's sums of exponentials, from those of the four threads that share a row, to its slots.
FASTCL_DEVICE void store_sums(const Call& c, const Item& item, const Sum (&sums)[2],
                              const Place& p) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float pair = fmaxf(sums[i].max, shuffle_xor(sums[i].max, 1));
    const float max = fmaxf(pair, shuffle_xor(pair, 2));
    float sum = sums[i].sum * exp2_fast(sums[i].max - base_of(max));
    for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
    const int row = item.first + p.row + 8 * i;
    if (p.lane % 4 == 0 && row < c.n)
      c.sums[((item.split * 2 + p.half()) * 2 + item.batch) * c.n + row] = {max, sum};
  }
}

struct alignas(8) Two {
  float first, second;
};

// Both halves' sums [16, features] of each four warps, to the item's slot.
template <int kTiles>
FASTCL_DEVICE void store_gradients(const Call& c, const Item& item, const float (&sum)[kTiles][4],
                                   const Place& p) {
  const int tiles = c.padded / 8;
  float* exchange = reinterpret_cast<float*>(Shared::key_data(c, 0));
  exchange += p.warp % 4 * tiles * 128 + p.lane;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int i = 0; i < 4; ++i)
      if (p.half() == 1 && n < tiles) exchange[(4 * n + i) * 32] = sum[n][i];
  sync_threads();
  float* slot = c.gradients + (i64)(item.split * 2 + item.batch) * c.n * c.padded;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int i = 0; i < 2; ++i) {
      const int row = item.first + p.row + 8 * i;
      if (p.half() == 0 && n < tiles && row < c.n)
        *reinterpret_cast<Two*>(slot + row * c.padded + 8 * n + p.lane % 4 * 2) = {
            sum[n][2 * i] + exchange[(4 * n + 2 * i) * 32],
            sum[n][2 * i + 1] + exchange[(4 * n + 2 * i + 1) * 32]};
    }
  sync_threads();
}

// The sum of a number per thread, in thread 0.
FASTCL_DEVICE float block_sum(float x) {
  float* const warps = Shared::get().warps;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  sync_threads();
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  sync_threads();
  return total;
}

FASTCL_DEVICE float vector_sum(const float* x, int count) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += x[i];
  return block_sum(sum);
}

// A row's gradient from its parts, a warp per row: the pull of its negatives less that of its
// partner, less what is along the row, over its length.
template <int kWidth>
FASTCL_DEVICE void finish_row(const Call& c, int batch, int row, int lane) {
  constexpr int kCount = kWidth / 32;
  float x[kCount], partner[kCount], pull[kCount] = {}, along = 0.0f;
  read_row(x, c.batches[batch], row, c.d, lane);
  read_row(partner, c.batches[1 - batch], row, c.d, lane);
  const float* part = c.gradients + (i64)(batch * c.n + row) * c.padded + lane;
#pragma unroll 4
  for (int split = 0; split < c.splits; ++split, part += (i64)2 * c.n * c.padded)
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (32 * k < c.padded) pull[k] += part[32 * k];
  float lost = 0.0f;
  for (int side = 0; side < 2; ++side)
    if (c.batches[side].loses) lost += c.gains[side * c.n + row];
  const float inverse = c.inverse[batch * c.n + row];
  lost *= c.inverse[(1 - batch) * c.n + row];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    pull[k] = (pull[k] - lost * partner[k]) * *c.scale;
    x[k] *= inverse;
    along += x[k] * pull[k];
  }
  along = warp_sum(along);
  if (inverse == 1.0f / c.eps) along = 0.0f;  // a short row is divided by a constant
  float* grad = c.batches[batch].grad + (i64)row * c.d;
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (lane + 32 * k < c.d) grad[lane + 32 * k] = (pull[k] - along * x[k]) * inverse;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) small_batch_kernel(const __grid_constant__ Call c) {
  const Place p;
  const float scale = *c.scale * kLog2e;
  Scores scores;
  // all of a block's items in phase 0, then again in phase 1
#pragma unroll 1
  for (int turn = 0; turn < 2 * c.turns; ++turn) {
    const int phase = turn < c.turns ? 0 : 1;
    const int index = blockIdx.x + (turn - phase * c.turns) * gridDim.x;
    if (index >= c.items) continue;
    const Item item(c, index);
    const Batch& batch = c.batches[item.batch];
    const bool wanted = phase == 0 ? c.kept || batch.loses
                                   : batch.grad || (c.grad_scale && batch.loses);
    // in phase 1 rows are classified in any case
    const int tiles = wanted ? item.tiles : phase;
    Sum sums[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
    float sum[kWidth / 8][4] = {}, by_scale = 0.0f;
    // each step brings the tile that is `stages` ahead; those before the first do nothing else
#pragma unroll 1
    for (int t = -c.stages; t < tiles; ++t) {
      if (t >= 0) {
        const Tile tile = item.tile(c, t);
        const unsigned char* keys = Shared::key_data(c, t % c.stages);
        if (c.stages == 2)
          cp_async_wait<1>();
        else
          cp_async_wait<0>();
        sync_threads();
        if (phase == 0) {
          if (t == 0) measure<T>(c, Shared::get().rows, Shared::row_data(), item.batch, kRows);
          measure<T>(c, Shared::get().keys, keys, tile.batch, kKeys);
        } else {
          classify_lines(c, item, tile, t == 0, scale);
        }
        sync_threads();
        if (!wanted) break;
        if (phase == 0 || !c.kept) form_cosines<T>(c, scores, keys, p);
        if (phase == 0) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            add_exponentials(c, sums[i], scores, i, scale, item.first + p.row + 8 * i,
                             tile.first + p.key);
        } else {
          weigh(c, scores, by_scale, scale, item.first, tile.first, p);
          if (batch.grad)
            multiply_keys(T{}, sum, scores, keys + p.half() * kSweepKeys * c.pitch, c.pitch,
                          c.padded / 8);
        }
        sync_threads();
      }
      const int next = t + c.stages;
      if (wanted && next < tiles && (phase == 0 || !c.kept)) {
#pragma unroll 1
        for (int part = next == 0 ? 0 : 1; part < 2; ++part)
          bring<T, kWidth>(c, part ? Shared::key_data(c, next % c.stages) : Shared::row_data(),
                           part ? item.tile(c, next) : Tile{item.batch, item.first},
                           part ? kKeys : kRows);
      }
      cp_async_commit();
      // what the first tiles may travel beside
      if (t == -1 && turn == phase * c.turns) {
        if (phase == 0)
          measure_pairs<kWidth>(c);
        else
          sync_grid();
      }
    }
    if (phase == 0) {
      if (wanted) store_sums(c, item, sums, p);
      continue;
    }
    if (batch.grad) store_gradients(c, item, sum, p);
    if (wanted && c.grad_scale) {
      by_scale = block_sum(by_scale);
      if (threadIdx.x == 0) c.scales[index] = by_scale;
    }
  }
  sync_grid();

  for (int i = blockIdx.x * kWarps + p.warp; i < 2 * c.n; i += gridDim.x * kWarps)
    if (c.batches[i / c.n].grad) finish_row<kWidth>(c, i / c.n, i % c.n, p.lane);
  if (blockIdx.x != gridDim.x - 1) return;  // the one with the fewest rows
  const int losers = c.batches[1].loses ? 2 : 1;
  const float loss = vector_sum(c.losses, losers * c.n);
  if (threadIdx.x == 0) *c.loss = loss * c.share;
  if (!c.grad_scale) return;
  const float by_scale = vector_sum(c.scales, losers * c.blocks * c.splits);
  if (threadIdx.x == 0) *c.grad_scale = by_scale;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How a problem is cut, into about an item for each multiprocessor, and where the workspace goes;
// the bytes of the latter.
size_t lay_out(Call& c, i64 n, i64 d, SmallBatch::Form form, void* workspace) {
  c.n = (int)n, c.d = (int)d, c.padded = ceil_div(c.d, kPad) * kPad;
  c.views = form == SmallBatch::views;
  c.blocks = ceil_div(c.n, kRows), c.tiles = ceil_div(c.n, kKeys);
  const int met = c.views ? 2 * c.tiles : c.tiles, wanted = multiprocessors() / (2 * c.blocks);
  c.span = ceil_div(met, wanted < 1 ? 1 : wanted < met ? wanted : met);
  c.splits = ceil_div(met, c.span);
  c.items = 2 * c.blocks * c.splits;
  unsigned char* const begin = static_cast<unsigned char*>(workspace);
  unsigned char* end = begin;
  const auto take = [&](auto*& to, size_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(end);
    end += (count * sizeof(*to) + 15) / 16 * 16;
  };
  take(c.sums, (size_t)4 * c.splits * c.n);
  take(c.gradients, (size_t)2 * c.splits * c.n * c.padded);
  take(c.cosines, c.n);
  take(c.inverse, 2 * c.n);
  take(c.gains, 2 * c.n);
  take(c.losses, 2 * c.n);
  take(c.scales, c.items);
  return (size_t)(end - begin);
}

template <class T>
Batch batch_of(const void* data, Type type, i64 stride, i64 n, i64 d, bool loses, float* grad,
               Type precision) {
  constexpr i64 kPiece = 16 / sizeof(T);
  const bool aligned =
      (uintptr_t)data % 16 == 0 && d % kPiece == 0 && (n == 1 || stride % kPiece == 0);
  return {data, type, stride, type == precision && aligned,
          type != precision && precision != Type::f32, loses, grad};
}

template <class T, int kWidth>
const char* launch_width(Call& c, void* stream) {
  const auto kernel = small_batch_kernel<T, kWidth>;
  c.pitch = c.padded * (int)sizeof(T) + 16;
  size_t shared = 0;
  int resident = 0;
  // the next tile comes while one is worked on, where there is a next one and room for it
  for (c.stages = c.span > 1 ? 2 : 1; c.stages && !resident; --c.stages) {
    shared = sizeof(Shared) + (size_t)(kRows + c.stages * kKeys) * c.pitch;
    resident = blocks_per_multiprocessor(kernel, kThreads, shared);
  }
  ++c.stages;
  if (multiprocessors() == 0) return "no device";
  if (resident == 0) return "rows of this width do not fit into this device's shared memory";
  const int most = multiprocessors() * resident, grid = c.items < most ? c.items : most;
  c.turns = ceil_div(c.items, grid);
  c.kept = c.turns == 1 && c.span == 1;
  return launch(kernel, dim3(grid), kThreads, shared, (Stream)stream, true,
                c);
}

template <class T>
const char* launch_precision(const SmallBatch& call, Call& c, void* stream) {
  c.batches[0] = batch_of<T>(call.a, call.a_type, call.a_stride, call.n, call.d, true, call.grad_a,
                             call.precision);
  c.batches[1] = batch_of<T>(call.b, call.b_type, call.b_stride, call.n, call.d,
                             call.form != SmallBatch::rows, call.grad_b, call.precision);
  return call.d <= 128 ? launch_width<T, 128>(c, stream) : launch_width<T, 256>(c, stream);
}

const char* refusal(i64 n, i64 d) {
  if (n < 1 || n > kSmallBatch) return "n is not in 1 to 2048";
  if (d < 1 || d > kSmallWidth) return "d is not in 1 to 256";
  return nullptr;
}

}  // namespace

size_t small_batch_workspace(int64_t n, int64_t d, SmallBatch::Form form) {
  if (refusal(n, d)) return 0;
  Call c{};
  return lay_out(c, n, d, form, nullptr);
}

const char* small_batch(const SmallBatch& call, void* stream) {
  if (const char* why = refusal(call.n, call.d)) return why;
  if (call.form < SmallBatch::views || call.form > SmallBatch::both) return "unknown form";
  Call c{};
  lay_out(c, call.n, call.d, call.form, call.workspace);
  const double losers = call.form == SmallBatch::views ? 2.0 * call.n : (double)call.n;
  c.share = (float)(1.0 / (call.mean ? losers : 1.0) / (call.form == SmallBatch::both ? 2.0 : 1.0));
  c.eps = call.eps, c.scale = call.scale, c.loss = call.loss, c.grad_scale = call.grad_scale;
  switch (call.precision) {
    case Type::f32: return launch_precision<float>(call, c, stream);
    case Type::bf16: return launch_precision<bf16>(call, c, stream);
    case Type::f16: return launch_precision<f16>(call, c, stream);
  }
  return "unknown precision";
}

}  // namespace fastcl::cuda
