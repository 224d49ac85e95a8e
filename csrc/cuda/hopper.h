// Hopper's own instructions (sm_90a), one name each, beside those of device.h: barriers that count
// arriving bytes, copies by the tensor memory accelerator (TMA), products of a warpgroup (wgmma).
//
// With FASTCL_EMULATED defined, tests/cuda/emulation_hopper.h gives the same names their documented
// meaning on the host.
#pragma once
#include "device.h"

namespace fastcl::cuda {

using u64 = uint64_t;

// Matrices of 16-bit numbers lie in shared memory as panels of 64 columns: row r of a panel is its
// bytes 128 r to 128 r + 127, whose eight pieces of 16 bytes are permuted, piece p standing at
// p ^ (r % 8) (the 128-byte swizzle). A panel begins at a multiple of 1024 bytes.
constexpr int kPanel = 64;
__host__ __device__ constexpr int panel_bytes(int rows) { return 128 * rows; }

}  // namespace fastcl::cuda

#ifdef FASTCL_EMULATED
#include "emulation_hopper.h"
#else
#include <cuda.h>  // types only: the driver's function is found at run time

namespace fastcl::cuda {

using TensorMap = CUtensorMap;

// A barrier in shared memory for phases of `arrivals` arrivals and as many bytes as these expect.
// Other threads and the copy engine see it after barrier_fence() and a barrier of the block.
FASTCL_DEVICE void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
FASTCL_DEVICE void barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTCL_DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrive, and let the phase wait for `bytes` of copies too.
FASTCL_DEVICE void barrier_expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; that of parity 1 counts as over at the start.
FASTCL_DEVICE void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A panel's rows from `row` on and its 64 columns from `column` on, into shared memory; zeros where
// the matrix ends. All bytes of the panel count for the barrier. One thread asks.
FASTCL_DEVICE void copy_panel(void* to, const TensorMap* map, int column, int row, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// `bytes`, a multiple of 16 like both addresses, from global to shared memory; one thread asks.
FASTCL_DEVICE void copy_bytes(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
FASTCL_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Every thread of a warpgroup: registers per thread from here on, a multiple of 8. Warpgroups that
// take more wait until others have given theirs up.
template <int registers>
FASTCL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
FASTCL_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Products are asynchronous. Before the first, and whenever their registers were touched:
// product_fence. product_commit ends a group; after product_wait<left> at most the `left` latest
// groups are under way, and until then nobody may touch what they read or write: their registers
// here, and the shared memory, which the waiting thread may then give back.
FASTCL_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTCL_DEVICE void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int left>
FASTCL_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// The compiler keeps the order of other uses of these registers to the calls around.
template <int count>
FASTCL_DEVICE void hold(float (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int count>
FASTCL_DEVICE void hold(u32 (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// c [64, N] = a [64, 16] b [N, 16]^T, added to c if `accumulate`, over a warpgroup: warp w % 4 has
// rows 16 (w % 4) on. With g = lane / 4, t = 2 (lane % 4), c[4 n + 2 h + e] is the number in row
// g + 8 h, column 8 n + t + e. a and b are by_rows() of panels.
#define FASTCL_C8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define FASTCL_C32(i) FASTCL_C8(i), FASTCL_C8(i + 8), FASTCL_C8(i + 16), FASTCL_C8(i + 24)
#define FASTCL_NAMES32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTCL_NAMES64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTCL_NAMES128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTCL_ALL32 FASTCL_C32(0)
#define FASTCL_ALL64 FASTCL_ALL32, FASTCL_C32(32)
#define FASTCL_ALL128 FASTCL_ALL64, FASTCL_C32(64), FASTCL_C32(96)

// Arguments: the type's name, N, numbers per thread, and the operands' places after these.
#define FASTCL_MULTIPLY_SHARED(type, n, count, a_, b_, p_)                                       \
  FASTCL_DEVICE void multiply_panels(type, float (&c)[count], u64 a, u64 b, bool accumulate) {   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p_ ", 0;\n"                           \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {"          \
                 FASTCL_NAMES##count "}, %" #a_ ", %" #b_ ", add, 1, 1, 0, 0;\n}"                \
                 : FASTCL_ALL##count                                                             \
                 : "l"(a), "l"(b), "r"((int)accumulate));                                        \
  }
FASTCL_MULTIPLY_SHARED(bf16, 64, 32, 32, 33, 34)
FASTCL_MULTIPLY_SHARED(f16, 64, 32, 32, 33, 34)
FASTCL_MULTIPLY_SHARED(bf16, 128, 64, 64, 65, 66)
FASTCL_MULTIPLY_SHARED(f16, 128, 64, 64, 65, 66)

// c [64, N] = a [64, 16] b [16, N], added to c if `accumulate`, with c as above and b by_columns().
// a is a[first] to a[first + 3]: the pairs in rows g, g + 8, g, g + 8 and columns t, t, t + 8,
// t + 8, so that c's numbers of 16 columns, packed in order, are an a.
#define FASTCL_MULTIPLY_HELD(type, n, count, a0, a1, a2, a3, b_, p_)                             \
  template <int first, int size>                                                                 \
  FASTCL_DEVICE void multiply_held(type, float (&c)[count], const u32 (&a)[size], u64 b,         \
                                   bool accumulate) {                                            \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p_ ", 0;\n"                           \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {"          \
                 FASTCL_NAMES##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_        \
                 ", add, 1, 1, 1;\n}"                                                            \
                 : FASTCL_ALL##count                                                             \
                 : "r"(a[first]), "r"(a[first + 1]), "r"(a[first + 2]), "r"(a[first + 3]),       \
                   "l"(b), "r"((int)accumulate));                                                \
  }
FASTCL_MULTIPLY_HELD(bf16, 64, 32, 32, 33, 34, 35, 36, 37)
FASTCL_MULTIPLY_HELD(f16, 64, 32, 32, 33, 34, 35, 36, 37)
FASTCL_MULTIPLY_HELD(bf16, 128, 64, 64, 65, 66, 67, 68, 69)
FASTCL_MULTIPLY_HELD(f16, 128, 64, 64, 65, 66, 67, 68, 69)
FASTCL_MULTIPLY_HELD(bf16, 256, 128, 128, 129, 130, 131, 132, 133)
FASTCL_MULTIPLY_HELD(f16, 256, 128, 128, 129, 130, 131, 132, 133)

#undef FASTCL_MULTIPLY_SHARED
#undef FASTCL_MULTIPLY_HELD
#undef FASTCL_NAMES32
#undef FASTCL_ALL32
#undef FASTCL_NAMES64
#undef FASTCL_ALL64
#undef FASTCL_NAMES128
#undef FASTCL_ALL128
#undef FASTCL_C8
#undef FASTCL_C32

// What copy_panel needs to know of a matrix [rows, columns] of 16-bit numbers, rows `stride` numbers
// apart: the address and the stride in bytes are multiples of 16. Null, or why not. The driver wants
// a context, which a thread that has launched nothing yet, such as autograd's, gets by allow_shared.
inline const char* describe(TensorMap* map, bool is_bf16, const void* matrix, i64 rows, i64 columns,
                            i64 stride, int panel_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) return "the driver does not know tensor maps";
  const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
  const cuuint64_t strides[1] = {(cuuint64_t)stride * 2};
  const cuuint32_t box[2] = {kPanel, (cuuint32_t)panel_rows}, step[2] = {1, 1};
  const CUresult answer = encode(
      map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(matrix), sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return answer == CUDA_SUCCESS ? nullptr : "the driver refuses the matrix's tensor map";
}

}  // namespace fastcl::cuda
#endif

namespace fastcl::cuda {

// What a product reads of shared memory: 16 columns of a panel from `start` on, rows along M or N
// (the columns are contracted); eight rows are 1024 bytes apart from the next eight.
FASTCL_DEVICE u64 by_rows(const void* start) {
  return (u64)(shared_address(start) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
// Likewise 16 rows from `start` on, columns along N (the rows are contracted); the next 64 columns
// are `panel` bytes on.
FASTCL_DEVICE u64 by_columns(const void* start, u32 panel) {
  return (u64)(shared_address(start) >> 4) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 |
         1ull << 62;
}
// The same some bytes on: the address is the lowest part, and does not overflow.
FASTCL_DEVICE u64 ahead(u64 descriptor, int bytes) {
  return (descriptor & ~0xffffffffull) | (u32)((u32)descriptor + (bytes >> 4));
}

}  // namespace fastcl::cuda
