// The kernels of microkernels/table.h, written once for any vector type S (simd/).
// Included only in translation units that are compiled for one instruction set.
#pragma once

#include <array>
#include <utility>

#include "cpu/microkernels/table.h"
#include "cpu/microkernels/winograd.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Sums of float32 units are added to a total every so often: PyTorch's kernels sum in blocks too, and one long sum in
// one accumulator would be several times less precise. Pairs of bfloat16 have lost more than that before.
constexpr int64_t kMinChunk = 64, kMaxChunk = 256;

// A weight that is packed comes from memory, in more rows than the processor fetches ahead by itself: bytes of a row,
// or units of four bytes along the depth, that are asked for before they are read.
constexpr int64_t kBytesAhead = 128, kUnitsAhead = 16;

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

// Matrix product of a tile, accumulators in registers throughout:
// 1. the lines of c are asked for, which arrive while the sums are computed;
// 2. each unit k loads kVectors vectors of b and multiplies them with one unit of each row of a, broadcast;
// 3. the bias is added, and the sums are rounded to the output's dtype and stored once.
// Rows are addressed from every third one, which x86 addressing reaches without a register of its own.
template <class S, int kRows, int kVectors>
void gemm_tile(const GemmTile& tile, Dtype output) {
  using V = typename S::V;
  constexpr int kBases = (kRows + 2) / 3;
  Accumulators<S, kRows, kVectors> sum;
  clear<S, kRows, kVectors>(sum);
  alignas(64) float total[kRows * kVectors * S::lanes];
  bool chunked = false;
  const bool two_lines = kVectors * S::lanes * size_of(output) > 64;
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    const char* c = static_cast<const char*>(tile.c) + r * tile.c_row * size_of(output);
    S::prefetch_to_write(c);
    if (two_lines) S::prefetch_to_write(c + 64);
  }
  const float* b = tile.b;
  const int64_t row = tile.a_row;
  int64_t limit = tile.taps * tile.depth / 4, chunk = 0;
  limit = S::pair == 2 ? INT64_MAX : limit < kMinChunk ? kMinChunk : limit > kMaxChunk ? kMaxChunk : limit;
  if (tile.chunk > 0) limit = tile.chunk;
  for (int64_t t = 0; t < tile.taps; t++) {
    for (int64_t begin = 0, end; begin < tile.depth; begin = end) {
      end = tile.depth - begin > limit ? begin + limit : tile.depth;
      const float* base[kBases];
      GRADAUG_UNROLL
      for (int i = 0; i < kBases; i++) {
        base[i] = tile.a + tile.tap_offset[t] + begin + 3 * i * row;
        asm volatile("" : "+r"(base[i]));  // a register each, not one sum for each row
      }
      for (int64_t k = begin; k < end; k++) {
        V weight[kVectors];
        GRADAUG_UNROLL
        for (int v = 0; v < kVectors; v++) weight[v] = S::load(b + v * S::lanes);
        b += kVectors * S::lanes;
        GRADAUG_UNROLL
        for (int r = 0; r < kRows; r++) {
          const V unit = S::broadcast(base[r / 3] + (r % 3) * row);
          GRADAUG_UNROLL
          for (int v = 0; v < kVectors; v++) sum[r][v] = S::unit_fma(unit, weight[v], sum[r][v]);
        }
        GRADAUG_UNROLL
        for (int i = 0; i < kBases; i++) base[i]++;
      }
      chunk += end - begin;
      if (chunk >= limit) {
        add<S, kRows, kVectors>(total, sum, chunked);
        clear<S, kRows, kVectors>(sum);
        chunked = true;
        chunk = 0;
      }
    }
  }
  if (chunked) add<S, kRows, kVectors>(sum, total);
  if (tile.bias) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const V bias = S::load(tile.bias + v * S::lanes);
      GRADAUG_UNROLL
      for (int r = 0; r < kRows; r++) sum[r][v] = S::add(sum[r][v], bias);
    }
  }
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    char* c = static_cast<char*>(tile.c) + r * tile.c_row * size_of(output);
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      S::store_floats(c + v * S::lanes * size_of(output), sum[r][v], output, tile.columns - v * S::lanes);
    }
  }
}

// Product of a transposed with b, for weight gradients: each pixel adds the outer product of kRows channels of a with
// kVectors vectors of b to accumulators in registers, which are added to c at the end. The lines of c, which are as
// many bytes as the accumulators and seldom in a cache, are asked for at the start.
template <class S, int kRows, int kVectors>
void outer_tile(const OuterTile& tile) {
  using V = typename S::V;
  Accumulators<S, kRows, kVectors> sum;
  clear<S, kRows, kVectors>(sum);
  alignas(64) float total[kRows * kVectors * S::lanes];
  bool chunked = false;
  int64_t chunk = 0;
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) S::prefetch_to_write(tile.c + r * tile.c_row + v * S::lanes);
  }
  for (int64_t n = 0; n < tile.images; n++) {
    for (int64_t h = 0; h < tile.rows; h++) {
      const float* a = tile.a + n * tile.a_image + h * tile.a_row;
      const float* b = tile.b + n * tile.b_image + h * tile.b_row;
      for (int64_t begin = 0, end; begin < tile.pixels; begin = end) {
        end = S::pair == 1 && tile.pixels - begin > tile.chunk ? begin + tile.chunk : tile.pixels;
        for (int64_t p = begin; p < end; p++, a += tile.a_pixel, b += tile.b_pixel) {
          V x[kVectors];
          GRADAUG_UNROLL
          for (int v = 0; v < kVectors; v++) x[v] = S::load(b + v * S::lanes);
          GRADAUG_UNROLL
          for (int r = 0; r < kRows; r++) {
            const V unit = S::broadcast(a + r);
            GRADAUG_UNROLL
            for (int v = 0; v < kVectors; v++) sum[r][v] = S::unit_fma(unit, x[v], sum[r][v]);
          }
        }
        chunk += end - begin;
        if (S::pair == 1 && chunk >= tile.chunk) {
          add<S, kRows, kVectors>(total, sum, chunked);
          clear<S, kRows, kVectors>(sum);
          chunked = true;
          chunk = 0;
        }
      }
    }
  }
  if (chunked) add<S, kRows, kVectors>(sum, total);
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* c = tile.c + r * tile.c_row + v * S::lanes;
      const int64_t n = tile.columns - v * S::lanes;
      S::store(c, S::add(S::load(c, n), sum[r][v]), n);
    }
  }
}

// Rows in nearly equal tiles of up to max_rows.
template <class S, size_t... kRows>
void gemm(const GemmTile& all, Dtype output, std::index_sequence<kRows...>) {
  using Tile = void (*)(const GemmTile&, Dtype);
  static constexpr Tile tiles[2][sizeof...(kRows)] = {{gemm_tile<S, kRows + 1, 1>...}, {gemm_tile<S, kRows + 1, 2>...}};
  const Tile* of_rows = tiles[all.columns > S::lanes];
  GemmTile tile = all;
  const int64_t count = (all.rows + S::max_rows - 1) / S::max_rows, c_row = all.c_row * size_of(output);
  const int64_t least = all.rows / count, more = all.rows % count;
  for (int64_t i = 0; i < count; i++) {
    tile.rows = least + (i < more);
    of_rows[tile.rows - 1](tile, output);
    tile.a += tile.rows * all.a_row;
    tile.c = static_cast<char*>(tile.c) + tile.rows * c_row;
  }
}

template <class S, size_t... kRows>
void outer(const OuterTile& all, std::index_sequence<kRows...>) {
  using Tile = void (*)(const OuterTile&);
  static constexpr Tile tiles[2][sizeof...(kRows)] = {{outer_tile<S, kRows + 1, 1>...},
                                                      {outer_tile<S, kRows + 1, 2>...}};
  const Tile* of_rows = tiles[all.columns > S::lanes];
  OuterTile tile = all;
  const int64_t count = (all.channels + S::max_rows - 1) / S::max_rows;
  for (int64_t i = 0, row = 0, end; i < count; i++, row = end) {
    end = all.channels * (i + 1) / count;
    tile.channels = end - row;
    of_rows[tile.channels - 1](tile);
    tile.a += tile.channels;
    tile.c += tile.channels * all.c_row;
  }
}

template <class S>
struct Impl {
  using V = typename S::V;

  static void gemm(const GemmTile& tile, Dtype output) {
    cpu::gemm<S>(tile, output, std::make_index_sequence<S::max_rows>());
  }

  static void outer(const OuterTile& tile) { cpu::outer<S>(tile, std::make_index_sequence<S::max_rows>()); }

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
    for (int64_t p = 0; p < pixels; p++, dst += table.panel, from += src_pixel * size) {
      float* to = dst;
      for (int64_t k = 0; k < channels; k += table.panel * S::pair, to += dst_panel) {
        for (int64_t j = 0; j < table.panel; j += S::lanes) {
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

  static constexpr Kernels table = {
      S::pair,
      S::lanes,
      2 * S::lanes,
      S::max_rows,
      gemm,
      outer,
      load_pixels,
      pack_panel,
      load_panels,
      zip_panels,
      {&Winograd<S, F2<S>>::table, &Winograd<S, F4<S>>::table},
  };
};

}  // namespace
}  // namespace gradaug::cpu
