// From partial sums to results: launches that the kernels of similarities end with.
#pragma once
#include "device.h"
#include "pairing.h"
#include "schedule.h"

namespace fastcl::cuda {

constexpr int kSlotPerMeeting = -1;

struct Finish {
  Pairing pairing;    // own rows are those whose sums are finished
  float room;         // see exponent_offset
  Schedule schedule;  // of the sweep, over blocks of `width` rows
  int width;
  const float* own_sums;    // [most parts, N], or null: sums by block and worker
  const float* other_sums;  // [other_slots, N], or null: sums that all count, or kSlotPerMeeting
  int other_slots;
  float* logsum;       // [N]
  float* offset;       // [], set to NaN where a sum left the offset's range
  float* mean;         // [N, d] or null: the first part of exponentials times other rows, which
  const float* parts;  // [most parts - 1, N, d] continue; it becomes the softmax-weighted mean
};

// Null, or why it could not be launched.
const char* finish_sums(const Finish& call, Stream stream);

// out [rows, d] += parts [most parts - 1, rows, d], for blocks of `width` rows in several parts.
const char* add_parts(const Schedule& schedule, int width, float* out, const float* parts, i64 rows,
                      i64 d, Stream stream);

}  // namespace fastcl::cuda
