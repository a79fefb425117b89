// Elements for norm/: two vectors hold the values of consecutive channels in A (float; double for double), one or two
// hold them in memory. Written in the compilers' vector extensions, so that it serves every architecture; what an
// instruction set does better, its header overrides in a derived class. Included only in translation units that are
// compiled for one instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <utility>

#include "cpu/norm/table.h"
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/unroll.h"
#include "slim_batch_norm.h"

#define GRADAUG_INLINED __attribute__((always_inline))  // of a lambda

namespace gradaug::batch_norm {
namespace {

template <typename Element, int kBytes>
struct Elements {
  using T = Element;
  using A = Acc<T>;
  typedef A V __attribute__((vector_size(kBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  typedef uint16_t Shorts __attribute__((vector_size(kBytes)));
  static constexpr int lanes = kBytes / sizeof(A);
  static constexpr int width = 2 * lanes;  // elements
  static constexpr int raw_vectors = width * sizeof(T) / kBytes;
  static constexpr bool interleaved = std::is_same_v<T, c10::BFloat16>;  // v[0] has the even elements, v[1] the odd

  struct Raw {  // as in memory
    Bits bits[raw_vectors];
  };
  struct Wide {  // as numbers
    V v[2];
  };

  static GRADAUG_INLINE V set(A value) { return V{} + value; }
  static GRADAUG_INLINE Wide wide(A value) { return {set(value), set(value)}; }

  static GRADAUG_INLINE Raw read(const T* p) {
    Raw raw;
    GRADAUG_UNROLL
    for (int i = 0; i < raw_vectors; i++) raw.bits[i] = load<Bits>(p + i * (width / raw_vectors));
    return raw;
  }
  static GRADAUG_INLINE void write(T* p, Raw raw) {
    GRADAUG_UNROLL
    for (int i = 0; i < raw_vectors; i++) store(p + i * (width / raw_vectors), raw.bits[i]);
  }

  // n < width elements, those of `fill` beyond.
  static GRADAUG_INLINE Raw read(const T* p, int n, Raw fill) {
    copy(&fill, p, n);
    return fill;
  }
  static GRADAUG_INLINE void write(T* p, Raw raw, int n) { copy(p, &raw, n); }

  // All bits set from element n on.
  static GRADAUG_INLINE Raw mask_from(int n) {
    uint8_t bytes[sizeof(Raw)];
    for (int i = 0; i < static_cast<int>(sizeof bytes); i++) bytes[i] = i >= n * static_cast<int>(sizeof(T)) ? 0xff : 0;
    Raw mask;
    __builtin_memcpy(&mask, bytes, sizeof mask);
    return mask;
  }
  static GRADAUG_INLINE Raw select(Raw mask, Raw a, Raw b) {
    for (int i = 0; i < raw_vectors; i++) a.bits[i] = (mask.bits[i] & a.bits[i]) | (~mask.bits[i] & b.bits[i]);
    return a;
  }

  // dy where y > 0, else 0: `masked`.
  static GRADAUG_INLINE Raw positive(Raw dy, Raw y) {
    for (int i = 0; i < raw_vectors; i++) {
      if constexpr (sizeof(T) == 2) {  // from the smallest number to infinity; neither zero, nor NaN, nor negative
        constexpr uint16_t infinity = std::is_same_v<T, c10::Half> ? 0x7c00 : 0x7f80;
        dy.bits[i] &= (Bits)((Shorts)y.bits[i] - uint16_t(1) < infinity);
      } else {
        dy.bits[i] &= (Bits)((V)y.bits[i] > A(0));
      }
    }
    return dy;
  }

  static GRADAUG_INLINE Wide widen(Raw raw) {
    if constexpr (sizeof(T) == sizeof(A)) {
      return {(V)raw.bits[0], (V)raw.bits[1]};
    } else if constexpr (interleaved) {
      return {(V)(raw.bits[0] << 16), (V)(raw.bits[0] & 0xffff0000u)};
    } else {
      T in[width];
      A out[width];
      __builtin_memcpy(in, &raw, sizeof in);
      for (int i = 0; i < width; i++) out[i] = static_cast<A>(in[i]);
      Wide w;
      __builtin_memcpy(&w, out, sizeof w);
      return w;
    }
  }

  static GRADAUG_INLINE Raw narrow(Wide w) {
    if constexpr (sizeof(T) == sizeof(A)) {
      return {(Bits)w.v[0], (Bits)w.v[1]};
    } else if constexpr (interleaved) {
      const Bits even = cpu::rounded_to_bfloat16<Bits>(w.v[0]), odd = cpu::rounded_to_bfloat16<Bits>(w.v[1]);
      return {(even >> 16) | (odd & 0xffff0000u)};
    } else {
      A in[width];
      T out[width];
      __builtin_memcpy(in, &w, sizeof in);
      for (int i = 0; i < width; i++) out[i] = static_cast<T>(in[i]);
      Raw raw;
      __builtin_memcpy(&raw, out, sizeof raw);
      return raw;
    }
  }

  static GRADAUG_INLINE V relu(V z) { return z < A(0) ? V{} : z; }

  // `width` numbers in memory, in the order of widen.
  static GRADAUG_INLINE Wide kept(const A* p) { return {load<V>(p), load<V>(p + lanes)}; }
  static GRADAUG_INLINE void keep(A* p, Wide w) {
    store(p, w.v[0]);
    store(p + lanes, w.v[1]);
  }

  // The same in the order of the elements.
  static GRADAUG_INLINE Wide arrange(const A* p) {
    if constexpr (interleaved) return deinterleave(kept(p), std::make_index_sequence<lanes>());
    return kept(p);
  }
  static GRADAUG_INLINE void restore(A* p, Wide w) {
    if constexpr (interleaved) w = interleave(w, std::make_index_sequence<lanes>());
    keep(p, w);
  }

  // total[i] += the number of channel i
  static GRADAUG_INLINE void add_to(double* total, Wide w) {
    A values[width];
    restore(values, w);
    for (int i = 0; i < width; i++) total[i] += values[i];
  }

  static GRADAUG_INLINE double sum(Wide w) {
    A values[width];
    keep(values, w);
    double sums[lanes];
    for (int i = 0; i < lanes; i++) sums[i] = static_cast<double>(values[i]) + static_cast<double>(values[i + lanes]);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    }
    return sums[0];
  }

 private:
  template <class Any>
  static GRADAUG_INLINE Any load(const void* p) {
    typedef Any Unaligned __attribute__((aligned(1), may_alias));
    return *static_cast<const Unaligned*>(p);
  }
  template <class Any>
  static GRADAUG_INLINE void store(void* p, Any v) {
    typedef Any Unaligned __attribute__((aligned(1), may_alias));
    *static_cast<Unaligned*>(p) = v;
  }

  // n < width elements, in powers of two.
  static GRADAUG_INLINE void copy(void* to, const void* from, int n) {
    auto* t = static_cast<char*>(to);
    auto* f = static_cast<const char*>(from);
    const int bytes = n * static_cast<int>(sizeof(T));
    if constexpr (sizeof(Raw) > 64) {
      if (bytes & 64) __builtin_memcpy(t, f, 64), t += 64, f += 64;
    }
    if constexpr (sizeof(Raw) > 32) {
      if (bytes & 32) __builtin_memcpy(t, f, 32), t += 32, f += 32;
    }
    if constexpr (sizeof(Raw) > 16) {
      if (bytes & 16) __builtin_memcpy(t, f, 16), t += 16, f += 16;
    }
    if (bytes & 8) __builtin_memcpy(t, f, 8), t += 8, f += 8;
    if (bytes & 4) __builtin_memcpy(t, f, 4), t += 4, f += 4;
    if (bytes & 2) __builtin_memcpy(t, f, 2);
  }

  template <size_t... i>
  static GRADAUG_INLINE Wide deinterleave(Wide w, std::index_sequence<i...>) {
    return {__builtin_shufflevector(w.v[0], w.v[1], 2 * i...), __builtin_shufflevector(w.v[0], w.v[1], 2 * i + 1 ...)};
  }
  template <size_t... i>
  static GRADAUG_INLINE Wide interleave(Wide w, std::index_sequence<i...>) {
    return {__builtin_shufflevector(w.v[0], w.v[1], (i % 2 * lanes + i / 2)...),
            __builtin_shufflevector(w.v[0], w.v[1], (i % 2 * lanes + (lanes + i) / 2)...)};
  }
};

template <typename T>
using PortableElements = Elements<T, 16>;

}  // namespace
}  // namespace gradaug::batch_norm
