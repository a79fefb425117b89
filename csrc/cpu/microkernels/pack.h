// Copies into the units and panels that the products read, for any vector type S (simd/): one call reads elements of
// any dtype once and writes each unit once, zeros where there is no element. Nothing is kept in between.
#pragma once

#include "cpu/microkernels/table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// A weight that is packed comes from memory, in more rows than the processor fetches ahead by itself: bytes of a row,
// or units of four bytes along the depth, that are asked for before they are read.
constexpr int64_t kBytesAhead = 128, kUnitsAhead = 16;

template <class S>
struct Pack {
  using V = typename S::V;
  static constexpr int64_t panel = 2 * S::lanes;

  static void load_pixels(float* dst, int64_t dst_pixel, const void* src, int64_t src_pixel, Dtype dtype,
                          int64_t pixels, int64_t channels) {
    const char* from = static_cast<const char*>(src);
    const int64_t size = size_of(dtype);
    if (dst_pixel * S::pair == channels && src_pixel == channels) {  // one run of memory
      dst_pixel *= pixels, channels *= pixels, pixels = 1;
    }
    if constexpr (S::pair == 2) {
      if (src_pixel == channels && dst_pixel * 2 <= S::lanes && S::lanes % dst_pixel == 0) {  // several in a vector
        const int64_t step = S::lanes / dst_pixel;
        const auto spread = S::spreading(channels, dst_pixel);
        for (; pixels >= step; pixels -= step, dst += S::lanes, from += step * channels * size) {
          S::store(dst, S::spread(from, step * channels, spread));
        }
      }
    }
    for (int64_t p = 0; p < pixels; p++, dst += dst_pixel, from += src_pixel * size) {
      for (int64_t k = 0; k < dst_pixel; k += S::lanes) {
        const int64_t left = channels - k * S::pair;
        const V units = S::load_units(from + k * S::pair * size, dtype, left < 0 ? 0 : left);
        S::store(dst + k, units, dst_pixel - k);
      }
    }
  }

  static void pack_panel(float* dst, int64_t dst_columns, const void* src, Dtype dtype, int64_t depth, int64_t columns,
                         int64_t k_stride, int64_t n_stride) {
    const char* from = static_cast<const char*>(src);
    const int64_t size = size_of(dtype), units = (depth + S::pair - 1) / S::pair;
    if (k_stride == 1) {
      for (int64_t k = 0; k < units; k += S::lanes) {
        for (int64_t j = 0; j < dst_columns; j += S::lanes) {
          V block[S::lanes];
          GRADAUG_UNROLL
          for (int64_t i = 0; i < S::lanes; i++) {
            const char* row = from + ((j + i) * n_stride + k * S::pair) * size;
            if (j + i < columns) __builtin_prefetch(row + kBytesAhead);
            block[i] = j + i < columns ? S::load_units(row, dtype, depth - k * S::pair) : S::zero();
          }
          S::transpose(block);
          GRADAUG_UNROLL
          for (int64_t i = 0; i < S::lanes; i++) {
            if (k + i < units) S::store(dst + (k + i) * dst_columns + j, block[i]);
          }
        }
      }
    } else if (n_stride == 1) {
      for (int64_t k = 0; k < units; k++) {
        const char* ahead = from + (k + kUnitsAhead) * S::pair * k_stride * size;
        for (int64_t i = 0; i < S::pair; i++, ahead += k_stride * size) {
          for (int64_t byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
        }
        for (int64_t j = 0; j < dst_columns; j += S::lanes) {
          const int64_t n = columns - j < 0 ? 0 : columns - j;
          const char* row = from + (k * S::pair * k_stride + j) * size;
          if constexpr (S::pair == 2) {
            const auto zip = [&](const auto* first) {
              S::store(dst + k * dst_columns + j, S::zip(first, 2 * k + 1 < depth ? first + k_stride : nullptr, n));
            };
            if (dtype == Dtype::f32) {
              zip(reinterpret_cast<const float*>(row));
            } else {
              zip(reinterpret_cast<const uint16_t*>(row));
            }
          } else {
            S::store(dst + k * dst_columns + j, S::load_floats(row, dtype, n));
          }
        }
      }
    } else {
      for (int64_t k = 0; k < units; k++) {
        for (int64_t j = 0; j < dst_columns; j++) {
          float raw[2 * S::lanes] = {};  // holds the unit's elements, of any dtype
          for (int64_t i = 0; i < S::pair && j < columns && S::pair * k + i < depth; i++) {
            const char* element = from + ((S::pair * k + i) * k_stride + j * n_stride) * size;
            for (int64_t byte = 0; byte < size; byte++) reinterpret_cast<char*>(raw)[i * size + byte] = element[byte];
          }
          S::store(dst + k * dst_columns + j, S::load_units(raw, dtype, S::pair), 1);
        }
      }
    }
  }

  static void load_panels(float* dst, int64_t dst_panel, const void* src, int64_t src_pixel, Dtype dtype,
                          int64_t pixels, int64_t channels) {
    const char* from = static_cast<const char*>(src);
    const int64_t size = size_of(dtype);
    for (int64_t p = 0; p < pixels; p++, dst += panel, from += src_pixel * size) {
      float* to = dst;
      for (int64_t k = 0; k < channels; k += panel * S::pair, to += dst_panel) {
        for (int64_t j = 0; j < panel; j += S::lanes) {
          const int64_t first = k + j * S::pair;
          const bool some = first < channels;
          S::store(to + j, some ? S::load_units(from + first * size, dtype, channels - first) : S::zero());
        }
      }
    }
  }

  static void zip_panels(float* dst, int64_t dst_pixel, int64_t width, int64_t dst_panel, const uint16_t* first,
                         const uint16_t* second, int64_t src_pixel, int64_t pixels, int64_t channels) {
    if constexpr (S::pair == 2) {
      for (int64_t p = 0; p < pixels; p++, dst += dst_pixel, first += src_pixel, second += second ? src_pixel : 0) {
        float* to = dst;
        for (int64_t k = 0; k < channels; k += width, to += dst_panel) {
          for (int64_t j = 0; j < width; j += S::lanes) {
            const int64_t c = k + j, left = channels - c;
            const V units = left >= S::lanes && second ? S::zip(first + c, second + c)
                            : left > 0                 ? S::zip(first + c, second ? second + c : nullptr, left)
                                                       : S::zero();
            S::store(to + j, units, width - j);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace gradaug::cpu
