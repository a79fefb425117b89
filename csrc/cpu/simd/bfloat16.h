// float32 to bfloat16 in a vector of any size, for processors without an instruction for it.
#pragma once

namespace gradaug::cpu {
namespace {

// In the upper half of every lane, the bits of v rounded to nearest even; what the lower halves hold is no part of the
// result. A NaN becomes a quiet NaN. Bits: a vector of uint32_t, of the size of V.
template <class Bits, class V>
inline __attribute__((always_inline)) Bits rounded_to_bfloat16(V v) {
  const Bits bits = (Bits)v;
  return v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : Bits{} + 0x7fc00000u;
}

}  // namespace
}  // namespace gradaug::cpu
