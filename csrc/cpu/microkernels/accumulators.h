// The sums of a tile, kRows x kVectors vectors of any type S (simd/) that stay in registers, for microkernels/gemm.h
// and microkernels/outer.h.
#pragma once

#include "cpu/microkernels/table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

template <class S, int kRows, int kVectors>
using Accumulators = typename S::V[kRows][kVectors];

template <class S, int kRows, int kVectors>
inline __attribute__((always_inline)) void clear(Accumulators<S, kRows, kVectors>& sum) {
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) sum[r][v] = S::zero();
  }
}

// total = sum, or total += sum. The total stays in memory: in registers, it would drive the operands of the inner loop
// out of them.
template <class S, int kRows, int kVectors>
inline __attribute__((always_inline)) void add(float* total, const Accumulators<S, kRows, kVectors>& sum, bool to_it) {
  asm volatile("" : "+r"(total) : : "memory");
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* to = total + (r * kVectors + v) * S::lanes;
      S::store(to, to_it ? S::add(S::load(to), sum[r][v]) : sum[r][v]);
    }
  }
  asm volatile("" : "+r"(total) : : "memory");
}

// sum += total
template <class S, int kRows, int kVectors>
inline __attribute__((always_inline)) void add(Accumulators<S, kRows, kVectors>& sum, const float* total) {
  asm volatile("" : "+r"(total) : : "memory");
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) sum[r][v] = S::add(sum[r][v], S::load(total + (r * kVectors + v) * S::lanes));
  }
}

}  // namespace
}  // namespace gradaug::cpu
