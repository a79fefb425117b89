// __half on the CPU: the type and its conversions, rounding to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half& operator=(const __half& other) {  // see cuda_runtime.h
    bits = other.bits;
    return *this;
  }
};
GRADAUG_VECTOR2(__half2, __half, 4);

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  }
  return h.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float magnitude = std::fabs(f);
  if (std::isnan(f)) return {static_cast<uint16_t>(sign | 0x7fff)};
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);                 // magnitude in [2^(exponent - 1), 2^exponent)
  const int lowest = std::max(exponent - 11, -24);  // the last bit's weight
  const int units = int(std::nearbyint(std::ldexp(magnitude, -lowest)));
  // units carries its hidden bit into the exponent field, and so does rounding up to the next power of two.
  return {static_cast<uint16_t>(sign | ((lowest + 24) * 1024 + units))};
}
inline __half __float2half(float f) { return __float2half_rn(f); }

inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
