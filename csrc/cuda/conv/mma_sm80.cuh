// The warp-wide instructions of a tensor-core kernel (sm_80 and newer): asynchronous copies into shared memory, matrix
// loads, and m16n8k16 / m16n8k8 products. Everything is called by all 32 lanes of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__

namespace gradaug {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of kBytes to shared memory: the first `valid` bytes come from source, the rest are zero.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* source, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(source),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(source),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending groups of this thread are unfinished.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ldmatrix: lane l names the 16-byte row l % 8 of matrix l / 8; register j gets 4 bytes of matrix j, lane l those at
// row l / 4, byte 4 * (l % 4). Transposed, for 16-bit elements, it gets rows 2 * (l % 4) and + 1 of column l / 4.
template <bool kTransposed, int kCount>
__device__ inline void load_matrices(uint32_t (&registers)[kCount][4], const void* const (&rows)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint32_t (&r)[4] = registers[i];
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(shared_address(rows[i]))
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(shared_address(rows[i]))
                   : "memory");
    }
  }
}

// The bits of a float32 rounded to the 10-bit mantissa of TF32.
__device__ inline uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// sums[i][j] += a[i] @ b[j]: [16, K] @ [K, 8], K = 16 for __half and __nv_bfloat16, 8 for float (TF32).
// Register layout of a, b and sums: PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".
template <typename T, int kM, int kN>
__device__ inline void multiply_accumulate(float (&sums)[kM][kN][4], const uint32_t (&a)[kM][4],
                                           const uint32_t (&b)[kN][2]) {
#define GRADAUG_MMA(shape_and_types)                                                                \
  asm volatile("mma.sync.aligned." shape_and_types                                                  \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                    \
               "{%0, %1, %2, %3};\n"                                                                \
               : "+f"(sums[i][j][0]), "+f"(sums[i][j][1]), "+f"(sums[i][j][2]), "+f"(sums[i][j][3]) \
               : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]))
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if constexpr (std::is_same_v<T, __half>) {
        GRADAUG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        GRADAUG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
      } else {
        static_assert(std::is_same_v<T, float>);
        GRADAUG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
      }
    }
  }
#undef GRADAUG_MMA
}

}  // namespace gradaug

#else

#include "host_mma.h"

#endif
