// How the tiles of a sweep are dealt out to blocks of threads, in equal shares of one fixed order.
//
// Own rows are cut into blocks. All other rows pass by each of them in steps, block after block,
// and of that list of steps every worker (a block of threads, as many as the device holds) takes a
// stretch of equal length. So a worker may begin and end within a block, and parts() workers leave
// partial sums of it; who does what depends on sizes and the number of workers alone.
//
// A symmetric problem is a round robin: block b meets itself and the `reach` blocks after it,
// wrapping around, so that each pair of blocks meets once. With an even number of blocks the two
// that lie opposite would meet twice, and the later one leaves it out.
#pragma once
#include "device.h"

namespace fastcl::cuda {

struct Schedule {
  int blocks;   // of own rows
  int steps;    // of a block; of a meeting, where symmetric
  int reach;    // meetings of a block with later ones; -1 for two different sides
  int workers;

  static Schedule make(i64 own, int width, i64 other, int height, bool symmetric, int processors) {
    Schedule s{};
    s.blocks = (int)((own + width - 1) / width);
    s.steps = symmetric ? width / height : (int)((other + height - 1) / height);
    s.reach = symmetric ? s.blocks / 2 : -1;
    s.workers = 1;
    const i64 total = s.total();
    s.workers = (int)(total < processors ? total : processors);
    return s;
  }

  __host__ __device__ bool symmetric() const { return reach >= 0; }
  // Whether a block is the one of two opposite ones that leaves their meeting out.
  __host__ __device__ bool shorter(int block) const {
    return symmetric() && blocks % 2 == 0 && block >= blocks / 2;
  }
  __host__ __device__ int length(int block) const {
    return symmetric() ? steps * (1 + reach - shorter(block)) : steps;
  }
  __host__ __device__ i64 start(int block) const {
    if (!symmetric()) return (i64)block * steps;
    return ((i64)block * (reach + 1) - (shorter(block) ? block - blocks / 2 : 0)) * steps;
  }
  __host__ __device__ i64 total() const {
    const i64 last = blocks - 1;
    return start((int)last) + length((int)last);
  }
  __host__ __device__ i64 begin(int worker) const { return worker * total() / workers; }
  // Who does the step at a place of the list.
  __host__ __device__ int worker(i64 place) const {
    return (int)(((place + 1) * workers - 1) / total());
  }
  __host__ __device__ int first_worker(int block) const { return worker(start(block)); }
  __host__ __device__ int parts(int block) const {
    return worker(start(block) + length(block) - 1) - first_worker(block) + 1;
  }
  __host__ __device__ int block_at(i64 place) const {
    if (!symmetric()) return (int)(place / steps);
    const i64 meeting = place / steps, longer = (i64)(blocks / 2) * (reach + 1);
    if (blocks % 2 == 1 || meeting < longer) return (int)(meeting / (reach + 1));
    return blocks / 2 + (int)((meeting - longer) / reach);
  }
  // Symmetric: the block that `block` meets `apart` blocks later, and how often one is met itself.
  __host__ __device__ int met(int block, int apart) const {
    return block + apart < blocks ? block + apart : block + apart - blocks;
  }
  __host__ __device__ int times_met(int block) const {
    return reach - (blocks % 2 == 0 && block < blocks / 2);
  }

  int most_parts() const {
    int most = 1;
    for (int b = 0; b < blocks; ++b) most = parts(b) > most ? parts(b) : most;
    return most;
  }
};

}  // namespace fastcl::cuda
