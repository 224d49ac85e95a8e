// A whole loss in one launch: plain C++ between the kernel and its binding.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace fastcl::cuda {

// Each row of aligned batches a and b finds its partner among negatives (fastcl/ops/fused.py).
// Pointers are to device memory; nothing but the call itself is read on the host, so a captured
// launch follows its inputs and its scale.
struct SmallBatch {
  const void* a;  // [n, d]
  const void* b;
  Type a_type, b_type;
  int64_t a_stride, b_stride;  // of rows, in elements; a row's own entries are adjacent
  int64_t n, d;
  Type precision;  // in which products are formed
  enum Form { views, rows, both } form;
  bool mean;
  float eps;  // rows are divided by max(length, eps)
  const float* scale;
  float *loss, *grad_a, *grad_b, *grad_scale;  // gradients contiguous, null where not wanted
  void* workspace;  // of small_batch_workspace bytes, aligned to 16; need not be initialised
};

// The largest batch and width that are taken.
constexpr int64_t kSmallBatch = 2048, kSmallWidth = 256;

// Of the current device, on which the call must follow.
size_t small_batch_workspace(int64_t n, int64_t d, SmallBatch::Form form);

// Null, or why it was not launched.
const char* small_batch(const SmallBatch& call, void* stream);

}  // namespace fastcl::cuda
