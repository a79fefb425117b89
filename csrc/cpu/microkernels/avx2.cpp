// The kernels of microkernels/table.h and microkernels/depthwise_table.h for AVX2 (with FMA and F16C).
#include "cpu/microkernels/depthwise_table.h"
#include "cpu/microkernels/table.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif

#include "cpu/microkernels/instantiate.h"
#include "cpu/simd/avx2.h"

const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return &gemm_table<Avx2>; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return &Depthwise<Avx2>::table; }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return nullptr; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return nullptr; }
#endif
