// The step of a queue of keys in one launch: plain C++ between the kernel and its binding.
#pragma once
#include <cstdint>

#include "types.h"

namespace fastcl::cuda {

// Rows [n, d] enter a ring of `size` keys at *pointer as if stored one by one: past the end they go
// on at the beginning, and of more than `size` the last ones stay. Pointers are to device memory;
// the head is read and moved there, so a captured launch goes on where the last replay ended.
struct Enqueue {
  const void* rows;
  Type rows_type;
  int64_t n, d;
  int64_t stride;      // of rows, in elements; a row's own entries are adjacent
  float eps;           // rows are divided by max(length, eps); 0 stores them as they come
  const int64_t* ids;  // [n], or null
  int64_t no_id;       // what keys without an id get
  void* keys;          // [size, d], contiguous
  Type keys_type;
  int64_t size;
  int64_t* key_ids;  // [size]
  int64_t* pointer;  // the slot of the next key, in [0, size)
  int64_t* fill;     // how many slots are taken
};

// Null, or why the launch failed.
const char* enqueue(const Enqueue& call, void* stream);

}  // namespace fastcl::cuda
