// From a problem as given to operands a block kernel takes, and the memory a call works in.
#pragma once
#include <cmath>
#include <cstddef>
#include <vector>

#include "ops.h"

namespace fastcl::cpu {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }
inline i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }

// Memory of one call: a slab that the calling thread keeps, because a fresh one costs page faults
// at every call, and plain allocations once it is full. Everything is given back at the end, so
// arenas nest.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  template <class T>
  T* get(i64 count) {
    return static_cast<T*>(bytes(count * (i64)sizeof(T)));
  }

 private:
  void* bytes(i64 size);
  i64 begin_;  // of this arena's part of the slab
  std::vector<void*> extra_;
};

// Memory of one task, kept by the worker thread; each call of reset() forgets what was handed out.
class Scratch {
 public:
  static Scratch& reset(i64 total);
  template <class T>
  T* get(i64 count) {
    char* p = base_ + used_;
    used_ += padded(count * (i64)sizeof(T));
    return reinterpret_cast<T*>(p);
  }
  static i64 padded(i64 bytes) { return round_up(bytes, 64) + 64; }
  ~Scratch();

 private:
  char* base_ = nullptr;
  i64 size_ = 0, used_ = 0;
};

// log(1 + e^x), and its derivative.
inline double softplus(double x, double& sigmoid) {
  const double t = std::exp(-std::fabs(x));
  sigmoid = (x < 0 ? t : 1.0) / (1.0 + t);
  return std::fmax(x, 0.0) + std::log1p(t);
}

enum class Units { log2, natural };

// A problem whose operands are packed. Arrays over rows and columns reach to the end of the last
// panel.
class Prepared {
 public:
  // Exponents are shifted by -offset (natural units). `whole_keys`: the keys' gradient is wanted,
  // so packing all of them does not change the order of the memory used. `scored` false: scores
  // are at hand, nothing is packed.
  Prepared(const Problem&, Arena&, Units, float offset, bool whole_keys, bool scored = true);

  // The operands of a block; packs its keys into `scratch` unless all are packed.
  ScoreBlock block(i64 row0, i64 rows, i64 col0, i64 cols, void* scratch) const;
  i64 key_scratch(i64 cols) const { return packs_blocks_ ? round_up(cols, k->panel) * depth : 0; }

  const Problem& problem;
  const Kernels* k;
  i64 n, m, dim, depth;

 private:
  const uint32_t *query_panels_ = nullptr, *key_panels_ = nullptr;
  bool packs_blocks_ = false;
  const int32_t *query_ids_, *key_ids_;
  const float* col_shift_;
  float scale_;
};

// Rows of features as the right operand of gradient products; in place where they already are.
class Values {
 public:
  // `whole` false: packed block by block into scratch.
  Values(const Problem&, const Matrix&, Arena&, bool whole);
  const void* block(i64 row0, i64 rows, void* scratch) const;
  i64 scratch(i64 rows) const { return ready_ ? 0 : round_up(rows, 2) * stride; }
  i64 stride;

 private:
  const Matrix& x_;
  const Kernels* k_;
  const uint32_t* ready_;
};

const uint32_t* pack_all(const Problem&, const Matrix&, Arena&);

// Largest |s_ij| by Cauchy-Schwarz.
double score_bound(const Problem&);

// n numbers and zeros up to the end of the last panel.
float* padded_floats(const Kernels*, Arena&, i64 n);

}  // namespace fastcl::cpu
