// What kernels ask of the device, one name per instruction, and the launch of a kernel.
//
// Kernels are written against this header alone, in plain C++ apart from the __global__ and
// __device__ words: with FASTCL_EMULATED defined the same sources compile for the host, where
// tests/cuda/emulation.h runs every thread of a grid (fibers, in random order) and executes each
// instruction by its documented meaning. So indices, layouts, synchronisation and launch
// parameters are tested without a GPU; what is left to one is the instructions themselves.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastcl::cuda {

using i64 = int64_t;
using u32 = uint32_t;

// 16-bit numbers as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastcl::cuda

#ifdef FASTCL_EMULATED
#include "emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace fastcl::cuda {

using Stream = cudaStream_t;

#define FASTCL_DEVICE __device__ __forceinline__

FASTCL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

FASTCL_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 2^x, about 2 units in the last place; subnormal results are zero.
FASTCL_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same bits.
FASTCL_DEVICE float as_float(u32 x) { return __uint_as_float(x); }
FASTCL_DEVICE u32 as_bits(float x) { return __float_as_uint(x); }

// Conversions round to nearest even; a packed pair has `low` in the lower half.
FASTCL_DEVICE u32 pack(bf16, float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FASTCL_DEVICE u32 pack(f16, float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FASTCL_DEVICE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
FASTCL_DEVICE float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// The nearest TF32 number, ties away from zero, as an fp32 bit pattern.
FASTCL_DEVICE u32 round_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

FASTCL_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FASTCL_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }

// Two numbers into memory, at an address that is a multiple of 8.
FASTCL_DEVICE void store_pair(float* to, float first, float second) {
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

FASTCL_DEVICE void sync_threads() { __syncthreads(); }
FASTCL_DEVICE void sync_warp() { __syncwarp(); }
// `threads` of the block (a multiple of 32) meet at barrier `id`, 1 to 15.
FASTCL_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Every thread of a cooperative launch; global memory written before is seen after.
FASTCL_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// 16 bytes from global to shared memory, zeros instead where `valid` is false; done for the thread
// that copies after cp_async_wait, for others after a barrier that follows it.
FASTCL_DEVICE void cp_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
FASTCL_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` of this thread's latest groups are under way.
template <int left>
FASTCL_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8 i to 8 i + 7 give the rows of matrix i (16 bytes,
// aligned), and lane l receives the pair at row l / 4, columns 2 (l % 4) and next, of each; with
// `transposed`, rows and columns change roles.
template <bool transposed>
FASTCL_DEVICE void load_matrices(u32 (&x)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] of a warp. With g = lane / 4, t = 2 (lane % 4), a holds the
// pairs (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8); b the pairs of rows t and t + 8 in column
// g; c the numbers (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
FASTCL_DEVICE void multiply(bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTCL_DEVICE void multiply(f16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c [16, 8] += a [16, 8] b [8, 8] in TF32. With g = lane / 4, t = lane % 4, a holds (g, t),
// (g + 8, t), (g, t + 4), (g + 8, t + 4); b rows t and t + 4 of column g; c as above.
FASTCL_DEVICE void multiply_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Number of multiprocessors of the current device, or 0.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Let a kernel's blocks have `shared` bytes, which must be asked for beyond 48 KiB; null, or why not.
// It is always as much as the device gives, lest threads that launch one kernel in two sizes take it
// from each other. Looking a kernel up also makes the device's context this thread's, if it has none.
template <class... P>
const char* allow_shared(void (*kernel)(P...), size_t shared) {
  if (shared <= 48 * 1024) return nullptr;
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// How many blocks of `threads` threads with `shared` bytes one multiprocessor holds at a time.
template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), int threads, size_t shared) {
  int count = 0;
  if (allow_shared(kernel, shared)) return 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared);
  return count;
}

// Queue a kernel; null, or why it could not be. A cooperative one may sync_grid(): all its blocks
// must fit on the device at a time.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, Stream stream,
                   bool cooperative, A... arguments) {
  if (const char* error = allow_shared(kernel, shared)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastcl::cuda
#endif
