// Buffers that a producer fills and consumers empty in turn.
#pragma once
#include "hopper.h"

namespace fastcl::cuda {

// One side's place in a ring of `stages` buffers, and the parity of its present round.
template <int stages>
struct Turn {
  int stage = 0;
  u32 round = 0;
  FASTCL_DEVICE void next() {
    if (++stage == stages) stage = 0, round ^= 1;
  }
};

// full: the producer's one arrival and the bytes it expects; empty: `consumers` arrivals.
template <int stages>
struct Ring {
  u64 full[stages], empty[stages];

  FASTCL_DEVICE void init(int consumers) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], consumers);
    }
  }
  FASTCL_DEVICE void wait_empty(const Turn<stages>& t) {
    barrier_wait(&empty[t.stage], t.round ^ 1);
  }
  FASTCL_DEVICE void wait_full(const Turn<stages>& t) { barrier_wait(&full[t.stage], t.round); }
  // One thread of a warp, after all of them have read.
  FASTCL_DEVICE void release(const Turn<stages>& t) { barrier_arrive(&empty[t.stage]); }
};

}  // namespace fastcl::cuda
