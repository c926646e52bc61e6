// What only Hopper has, as small functions: barriers that count bytes, copies of boxes of a tensor (TMA), and products
// of a warpgroup, whose operands lie in shared memory. For sm_90a; from tests/emulator without a CUDA compiler.
#pragma once

#include "instructions.h"

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace ffattr::cuda {

using TensorMap = CUtensorMap;

// How TMA sees a tensor of three axes, the last one first: sizes, bytes from one row (and one matrix) to the next, and
// the box of a copy, whose rows have 128 bytes and are swizzled. Beyond the sizes it reads zeros.
inline TensorMap tensor_map(const void* base, int element_bytes, const uint64_t (&sizes)[3],
                            const uint64_t (&strides)[2], const uint32_t (&box)[3]) {
  // Asked of the driver, so that the binary loads where there is none.
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "TMA");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), "TMA");
#endif
  if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("TMA: the driver is older than CUDA 12");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const cuuint64_t size[3] = {sizes[0], sizes[1], sizes[2]}, stride[2] = {strides[0], strides[1]};
  const cuuint32_t step[3] = {1, 1, 1};
  TensorMap map;
  const CUresult code =
      encode(&map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3,
             const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) throw std::runtime_error("TMA: the driver refused a tensor, error " + std::to_string(code));
  return map;
}

// Barriers in shared memory, by address.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and announces bytes.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// At the barrier in the same place of a block of the cluster.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// `threads` of a block that meet at barrier `id`, which some of them need not wait for.
__device__ __forceinline__ void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void meet_later(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// What threads have written to shared memory becomes visible to TMA and to products.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of each thread of a warpgroup from here on.
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// TMA: the box at (x, y, z), announced to `barrier`.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// To the same place of every block of the cluster that `blocks` has a bit for, and announced there.
__device__ __forceinline__ void load_box_to_all(uint32_t to, const TensorMap* map, uint32_t barrier, uint16_t blocks,
                                                int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// Four numbers of float8, the first in the lowest byte; what is too large becomes the largest.
__device__ __forceinline__ uint32_t pack_float8(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<uint32_t>(high) << 16;
}

// Products of a warpgroup, [64, Columns] += [64, depth] @ [depth, Columns], of 32 bytes of depth. They run by
// themselves: fence, multiply, commit, and wait before any register they name is touched.

__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// After the wait: nobody reads a sum before.
template <int Count>
__device__ __forceinline__ void finished(float (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i]));
}

// An operand in shared memory, in rows of 128 swizzled bytes. If a row is of the operand's depth, 8 rows on are
// `stride` bytes on. If it is of its columns, 8 rows deeper are `stride` bytes on, and 64 columns on are `leading`
// bytes on.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

#define FFATTR_R8(c, i)                                                                                       \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define FFATTR_R16(c, i) FFATTR_R8(c, i), FFATTR_R8(c, i + 8)
#define FFATTR_R32(c, i) FFATTR_R16(c, i), FFATTR_R16(c, i + 16)
#define FFATTR_R64(c, i) FFATTR_R32(c, i), FFATTR_R32(c, i + 32)
#define FFATTR_R96(c, i) FFATTR_R64(c, i), FFATTR_R32(c, i + 64)
#define FFATTR_R128(c, i) FFATTR_R64(c, i), FFATTR_R64(c, i + 64)
#define FFATTR_N16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FFATTR_N32 FFATTR_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FFATTR_N64                                                                                              \
  FFATTR_N32                                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FFATTR_N96                                                                     \
  FFATTR_N64                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FFATTR_N128                                                                                \
  FFATTR_N96                                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Both operands in shared memory, the left one in rows of its depth, the right one in rows of its columns.
#define FFATTR_MULTIPLY_SHARED(TYPE, NAME, COLUMNS, REGISTERS, LEFT, RIGHT, ADD)                               \
  __device__ __forceinline__ void multiply_shared(TYPE, float (&c)[REGISTERS], uint64_t left, uint64_t right,  \
                                                  int add) {                                                   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                   \
                 ", 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " " FFATTR_N##REGISTERS \
                 "}, " LEFT ", " RIGHT ", add, 1, 1, 0, 1;\n}\n"                                               \
                 : FFATTR_R##REGISTERS(c, 0)                                                                   \
                 : "l"(left), "l"(right), "r"(add));                                                           \
  }
FFATTR_MULTIPLY_SHARED(Bfloat16, "bf16", 64, 32, "%32", "%33", "%34")
FFATTR_MULTIPLY_SHARED(Bfloat16, "bf16", 128, 64, "%64", "%65", "%66")
FFATTR_MULTIPLY_SHARED(Bfloat16, "bf16", 192, 96, "%96", "%97", "%98")
FFATTR_MULTIPLY_SHARED(Bfloat16, "bf16", 256, 128, "%128", "%129", "%130")
FFATTR_MULTIPLY_SHARED(Half, "f16", 64, 32, "%32", "%33", "%34")
FFATTR_MULTIPLY_SHARED(Half, "f16", 192, 96, "%96", "%97", "%98")
FFATTR_MULTIPLY_SHARED(Half, "f16", 256, 128, "%128", "%129", "%130")
#undef FFATTR_MULTIPLY_SHARED

// The left operand in registers; the right one in rows of its columns, of float8 in rows of its depth.
#define FFATTR_MULTIPLY_REGISTERS(TYPE, NAMES, REGISTERS, LEFT, RIGHT, ADD, FLAGS)                          \
  __device__ __forceinline__ void multiply_registers(TYPE, float (&c)[REGISTERS], const uint32_t* left,     \
                                                     uint64_t right, int add) {                             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                \
                 ", 0;\n"                                                                                   \
                 "wgmma.mma_async.sync.aligned." NAMES " " FFATTR_N##REGISTERS "}, {" LEFT "}, " RIGHT      \
                                                                               ", add, 1, 1" FLAGS ";\n}\n" \
                 : FFATTR_R##REGISTERS(c, 0)                                                                \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(add));           \
  }
FFATTR_MULTIPLY_REGISTERS(Bfloat16, "m64n64k16.f32.bf16.bf16", 32, "%32, %33, %34, %35", "%36", "%37", ", 1")
FFATTR_MULTIPLY_REGISTERS(Half, "m64n64k16.f32.f16.f16", 32, "%32, %33, %34, %35", "%36", "%37", ", 1")
FFATTR_MULTIPLY_REGISTERS(Bfloat16, "m64n192k16.f32.bf16.bf16", 96, "%96, %97, %98, %99", "%100", "%101", ", 1")
FFATTR_MULTIPLY_REGISTERS(Half, "m64n192k16.f32.f16.f16", 96, "%96, %97, %98, %99", "%100", "%101", ", 1")
FFATTR_MULTIPLY_REGISTERS(Bfloat16, "m64n256k16.f32.bf16.bf16", 128, "%128, %129, %130, %131", "%132", "%133", ", 1")
FFATTR_MULTIPLY_REGISTERS(Half, "m64n256k16.f32.f16.f16", 128, "%128, %129, %130, %131", "%132", "%133", ", 1")
FFATTR_MULTIPLY_REGISTERS(Float8, "m64n128k32.f32.e4m3.e4m3", 64, "%64, %65, %66, %67", "%68", "%69", "")
#undef FFATTR_MULTIPLY_REGISTERS

}  // namespace ffattr::cuda

#endif
