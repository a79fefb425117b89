// The loops of max pooling over the channels of a pixel (norm/table.h) for any S: the elements of an instruction set,
// simd/. One call reads the pixels of a window (or the windows of a pixel) once, keeps one vector of channels, and
// writes each result once.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/norm/table.h"
#include "cpu/simd/portable.h"
#include "cpu/simd/unroll.h"

namespace gradaug::batch_norm {
namespace {

// The elements of an S::Raw as integers of their size, for masks and taps.
template <class S>
struct Integers {
  using T = typename S::T;
  using Raw = typename S::Raw;
  using V = typename S::V;
  using Int = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  typedef Int Lanes __attribute__((vector_size(sizeof(V))));
  static constexpr int count = S::raw_vectors, lanes = sizeof(V) / sizeof(T);
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));

  Lanes of[count];

  static GRADAUG_INLINE Integers all(Int value) {
    Integers v;
    GRADAUG_UNROLL
    for (int i = 0; i < count; i++) v.of[i] = Lanes{} + value;
    return v;
  }

  // n bytes as integers, zeros beyond.
  static GRADAUG_INLINE Integers load(const uint8_t* p, int n) {
    uint8_t some[S::width] = {};
    if (n < S::width) std::memcpy(some, p, n), p = some;
    Integers v;
    GRADAUG_UNROLL
    for (int i = 0; i < count; i++) {
      Bytes bytes;
      std::memcpy(&bytes, p + i * lanes, sizeof bytes);
      v.of[i] = converted<Lanes>(bytes);
    }
    return v;
  }
  static GRADAUG_INLINE void store(uint8_t* p, const Integers& v, int n) {
    uint8_t some[S::width];
    uint8_t* to = n < S::width ? some : p;
    GRADAUG_UNROLL
    for (int i = 0; i < count; i++) {
      const Bytes bytes = converted<Bytes>(v.of[i]);
      std::memcpy(to + i * lanes, &bytes, sizeof bytes);
    }
    if (n < S::width) std::memcpy(p, some, n);
  }

  // All bits set where value > best, or value is NaN.
  static GRADAUG_INLINE Integers larger(const Raw& value, const Raw& best) {
    Integers mask;
    GRADAUG_UNROLL
    for (int i = 0; i < count; i++) {
      if constexpr (sizeof(T) == 2) {
        const Lanes v = ordered((Lanes)value.bits[i]);
        mask.of[i] = (Lanes)(v > ordered((Lanes)best.bits[i])) | (Lanes)(v == nan);
      } else {
        const V v = (V)value.bits[i];
        mask.of[i] = (Lanes)(v > (V)best.bits[i]) | (Lanes)(v != v);
      }
    }
    return mask;
  }

 private:
  static constexpr Int nan = 0x7fff;

  typedef int16_t Two __attribute__((vector_size(2 * lanes)));
  typedef int32_t Four __attribute__((vector_size(4 * lanes)));

  template <typename To, typename From>
  static GRADAUG_INLINE To step(From v) {
    return __builtin_convertvector(v, To);
  }
  // As other integers, step by step: a processor's instructions double or halve their size.
  template <typename To, typename From>
  static GRADAUG_INLINE To converted(From v) {
    if constexpr (sizeof(Int) == 2) {
      return step<To>(v);
    } else if constexpr (sizeof(Int) == 4) {
      return step<To>(step<Two>(v));
    } else if constexpr (sizeof(From) < sizeof(To)) {
      return step<To>(step<Four>(step<Two>(v)));
    } else {
      return step<To>(step<Two>(step<Four>(v)));
    }
  }

  // Integers in the order of the 16-bit numbers they are the bits of: both zeros are 0, every NaN is the largest.
  static GRADAUG_INLINE Lanes ordered(Lanes bits) {
    constexpr Int infinity = std::is_same_v<T, c10::Half> ? 0x7c00 : 0x7f80;
    const Lanes magnitude = bits & Int(0x7fff), negative = bits >> 15;
    const Lanes number = (magnitude ^ negative) - negative;
    return magnitude > infinity ? Lanes{} + nan : number;
  }
};

// Calls f(first, n) for whole vectors of n = width channels, of which the last may begin in channels that are done;
// with n = channels where there is less than one vector.
template <int width, typename F>
GRADAUG_INLINE void for_vectors(int64_t channels, const F& f) {
  if (channels < width) return f(0, static_cast<int>(channels));
  for (int64_t c = 0; c < channels; c += width) f(std::min(c, channels - width), width);
}

template <class S>
GRADAUG_INLINE typename S::Raw read_channels(const typename S::T* p, int n) {
  return n < S::width ? S::read(p, n, typename S::Raw{}) : S::read(p);
}
template <class S>
GRADAUG_INLINE void write_channels(typename S::T* p, const typename S::Raw& raw, int n) {
  n < S::width ? S::write(p, raw, n) : S::write(p, raw);
}

template <class S, typename T = typename S::T>
void largest(const T* const* pixels, const uint8_t* tap, int64_t taps, int64_t channels, T* y, uint8_t* offset) {
  using Ints = Integers<S>;
  using Lanes = typename Ints::Lanes;
  for_vectors<S::width>(channels, [&](int64_t c, int n) GRADAUG_INLINED {
    auto best = read_channels<S>(pixels[0] + c, n);
    auto where = Ints::all(tap[0]);
    for (int64_t t = 1; t < taps; t++) {
      const auto value = read_channels<S>(pixels[t] + c, n);
      const auto mask = Ints::larger(value, best), here = Ints::all(tap[t]);
      GRADAUG_UNROLL
      for (int i = 0; i < Ints::count; i++) {
        best.bits[i] = (typename S::Bits)(mask.of[i] ? (Lanes)value.bits[i] : (Lanes)best.bits[i]);
        where.of[i] = mask.of[i] ? here.of[i] : where.of[i];
      }
    }
    write_channels<S>(y + c, best, n);
    Ints::store(offset + c, where, n);
  });
}

template <class S, typename T = typename S::T>
void sum_of_windows(const T* const* dy, const T* const* y, const uint8_t* const* offset, const uint8_t* tap,
                    int64_t windows, int64_t channels, T* dx) {
  using Ints = Integers<S>;
  for_vectors<S::width>(channels, [&](int64_t c, int n) GRADAUG_INLINED {
    auto sum = S::wide(0);
    for (int64_t w = 0; w < windows; w++) {
      auto gradient = read_channels<S>(dy[w] + c, n);
      const auto where = Ints::load(offset[w] + c, n), here = Ints::all(tap[w]);
      GRADAUG_UNROLL
      for (int i = 0; i < Ints::count; i++) {
        gradient.bits[i] &= (typename S::Bits)(where.of[i] == here.of[i]);
      }
      if (y[w]) gradient = S::positive(gradient, read_channels<S>(y[w] + c, n));
      const auto value = S::widen(gradient);
      sum.v[0] += value.v[0], sum.v[1] += value.v[1];
    }
    write_channels<S>(dx + c, S::narrow(sum), n);
  });
}

}  // namespace
}  // namespace gradaug::batch_norm
