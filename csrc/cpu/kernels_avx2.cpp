// The kernels of depthwise_kernels.h for AVX2 with FMA and F16C. Those of kernels.h have no AVX2 version.
#include "depthwise_kernels.h"
#include "kernels.h"

const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return nullptr; }

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "depthwise_impl.h"
#include "simd_avx2.h"

const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return &DepthwiseImpl<Avx2>::table; }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return nullptr; }
#endif
