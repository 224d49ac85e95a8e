#include "binding.h"
#include "enqueue.h"

namespace {

using namespace fastcl::cuda;

void enqueue_rows(const Tensor& rows, const OptionalTensor& ids, double eps, int64_t no_id,
                  Tensor keys, Tensor key_ids, Tensor pointer, Tensor fill) {
  check_matrix(keys, "keys", keys);
  check_matrix(rows, "rows", keys);
  STD_TORCH_CHECK(rows.size(1) == keys.size(1), "rows have ", rows.size(1), " features, keys ",
                  keys.size(1));
  STD_TORCH_CHECK(keys.is_contiguous(), "keys must be contiguous");
  if (ids) check_integers(*ids, "ids", rows.size(0), keys);
  check_integers(key_ids, "key_ids", keys.size(0), keys);
  check_integers(pointer, "pointer", 1, keys);
  check_integers(fill, "fill", 1, keys);
  const OnDevice device(keys);
  const Tensor source = feature_contiguous(rows);
  Enqueue q{};
  q.rows = source.const_data_ptr(), q.rows_type = type_of(source, "rows");
  q.n = source.size(0), q.d = source.size(1), q.stride = source.stride(0);
  q.eps = (float)eps, q.no_id = no_id;
  q.ids = ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr;
  q.keys = keys.mutable_data_ptr(), q.keys_type = type_of(keys, "keys"), q.size = keys.size(0);
  q.key_ids = static_cast<int64_t*>(key_ids.mutable_data_ptr());
  q.pointer = static_cast<int64_t*>(pointer.mutable_data_ptr());
  q.fill = static_cast<int64_t*>(fill.mutable_data_ptr());
  check(enqueue(q, device.stream()), "enqueue");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcl, CUDA, m) { m.impl("_cuda_enqueue", TORCH_BOX(&enqueue_rows)); }
