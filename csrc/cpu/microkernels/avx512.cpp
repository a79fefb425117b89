// The kernels of microkernels/table.h and microkernels/depthwise_table.h for AVX-512 (F, BW, DQ, VL).
#include "cpu/microkernels/depthwise_table.h"
#include "cpu/microkernels/table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"        // likewise
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "cpu/microkernels/instantiate.h"
#include "cpu/simd/avx512.h"

const gradaug::cpu::Kernels* gradaug::cpu::avx512_kernels() { return &gemm_table<Avx512<false>>; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx512_depthwise_kernels() {
  return &Depthwise<Avx512<false>>::table;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const gradaug::cpu::Kernels* gradaug::cpu::avx512_kernels() { return nullptr; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx512_depthwise_kernels() { return nullptr; }
#endif
