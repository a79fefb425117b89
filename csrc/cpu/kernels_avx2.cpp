// The kernels of kernels.h and depthwise_kernels.h for AVX2 (with FMA and F16C).
#include "depthwise_kernels.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <array>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif

#include "depthwise_impl.h"
#include "kernels_impl.h"
#include "simd_avx2.h"  // after it: uses GRADAUG_UNROLL

const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return &Impl<Avx2>::table; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return &DepthwiseImpl<Avx2>::table; }

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const gradaug::cpu::Kernels* gradaug::cpu::avx2_kernels() { return nullptr; }
const gradaug::cpu::DepthwiseKernels* gradaug::cpu::avx2_depthwise_kernels() { return nullptr; }
#endif
