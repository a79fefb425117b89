// Depthwise convolutions and those in small groups, for any vector type S (simd/). One call of a tile reads columns of
// float32 pixels once for each run of taps, keeps the sums of its pixels (or of its taps, for the weight gradient) in
// registers, and writes (or adds) them once.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/microkernels/depthwise_table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Lane of rotation j: index[j][c] = the lane that lane c takes its value from.
template <int kLanes, int kGroup>
struct Rotations {
  alignas(64) int32_t index[kGroup][kLanes];

  constexpr Rotations() : index() {
    for (int j = 0; j < kGroup; j++) {
      for (int c = 0; c < kLanes; c++) index[j][c] = c - c % kGroup + (c % kGroup + j) % kGroup;
    }
  }
};

template <class S>
struct Depthwise {
  using V = typename S::V;

  // PyTorch multiplies pairs of bfloat16 in groups of 8, and fills its registers in groups of 16, which is faster.
  static constexpr int max_group = S::pair == 2 ? 4 : 8;

  template <int kGroup>
  static constexpr Rotations<S::lanes, kGroup> rotations{};

  // Pixels of a tile: its sums, its inputs and one weight share the registers.
  static constexpr int max_pixels(int group) {
    constexpr int free = S::registers - 2;
    return group == 1 ? (S::registers == 32 ? 14 : 12) : free / (group + 1) > 0 ? free / (group + 1) : 1;
  }
  // Rotations that an outer tile multiplies with one load of x.
  static constexpr int outer_rotations(int group) {
    constexpr int most = S::registers == 32 ? 4 : 2;
    return group < most ? group : most;
  }
  // Rows of the kernel in an outer tile: depthwise sums fill the registers, those of groups fill them with one row.
  static constexpr int max_outer_rows(int columns, int group) {
    constexpr int sums = S::registers == 32 ? 25 : 12;
    return group > 1 ? 1 : sums / columns < 5 ? sums / columns : 5;
  }
  static constexpr int max_outer_columns = 5;

  template <Dtype kOutput, int kPixels>
  static inline __attribute__((always_inline)) void store(char* y, int64_t y_pixel, const V (&sum)[kPixels],
                                                          int64_t channels) {
    y_pixel *= size_of(kOutput);
    if (channels >= S::lanes) {
      GRADAUG_UNROLL
      for (int p = 0; p < kPixels; p++) S::store_floats(y + p * y_pixel, sum[p], kOutput, S::lanes);
    } else {
      GRADAUG_UNROLL
      for (int p = 0; p < kPixels; p++) S::store_floats(y + p * y_pixel, sum[p], kOutput, channels);
    }
  }

  // Reads x once for each run of kRun taps that are adjacent in it, and each weight once; keeps the sums of kPixels
  // pixels, a register for each rotation, and writes them once, in the output's dtype.
  template <int kGroup, int kRun, int kPixels>
  static void tile(const DepthwiseRow& row, const float* x, const float* weight, const float* bias, char* y,
                   Dtype output, int64_t channels) {
    V sum[kGroup][kPixels];
    GRADAUG_UNROLL
    for (int j = 0; j < kGroup; j++) {
      GRADAUG_UNROLL
      for (int p = 0; p < kPixels; p++) sum[j][p] = S::zero();
    }
    for (int64_t t = 0; t < row.taps; t += kRun) {
      const float* from = x + row.x_offset[t];
      if constexpr (kGroup == 1) {
        V factor[kRun];
        GRADAUG_UNROLL
        for (int i = 0; i < kRun; i++) factor[i] = S::load(weight + row.weight_offset[t + i]);
        GRADAUG_UNROLL
        for (int column = 0; column < kPixels + kRun - 1; column++) {
          V value = S::load(from + column * S::lanes);
          if constexpr (kRun > 1) asm volatile("" : "+v"(value));  // loaded once, not with each product
          GRADAUG_UNROLL
          for (int i = 0; i < kRun; i++) {
            const int p = column - i;
            if (p >= 0 && p < kPixels) sum[0][p] = S::fma(value, factor[i], sum[0][p]);
          }
        }
      } else {
        V value[kPixels];
        GRADAUG_UNROLL
        for (int p = 0; p < kPixels; p++) value[p] = S::load(from + p * S::lanes);
        GRADAUG_UNROLL
        for (int j = 0; j < kGroup; j++) {
          V factor = S::load(weight + row.weight_offset[t] + j * S::lanes);
          asm volatile("" : "+v"(factor));  // loaded once, not with each product
          GRADAUG_UNROLL
          for (int p = 0; p < kPixels; p++) sum[j][p] = S::fma(value[p], factor, sum[j][p]);
        }
      }
    }
    GRADAUG_UNROLL
    for (int j = 1; j < kGroup; j++) {
      GRADAUG_UNROLL
      for (int p = 0; p < kPixels; p++) {
        sum[0][p] = S::add(sum[0][p], S::permute(sum[j][p], rotations<kGroup>.index[j]));
      }
    }
    if (bias) {
      const V b = S::load(bias);
      GRADAUG_UNROLL
      for (int p = 0; p < kPixels; p++) sum[0][p] = S::add(sum[0][p], b);
    }
    switch (output) {
      case Dtype::f32:
        return store<Dtype::f32, kPixels>(y, row.y_pixel, sum[0], channels);
      case Dtype::bf16:
        return store<Dtype::bf16, kPixels>(y, row.y_pixel, sum[0], channels);
      case Dtype::f16:
        return store<Dtype::f16, kPixels>(y, row.y_pixel, sum[0], channels);
    }
  }

  template <int kGroup, int kRun, size_t... kPixels>
  static void tiles(const DepthwiseRow& row, Dtype output, std::index_sequence<kPixels...>) {
    using Tile =
        void (*)(const DepthwiseRow&, const float*, const float*, const float*, char*, Dtype, int64_t channels);
    static constexpr Tile table[] = {tile<kGroup, kRun, kPixels + 1>...};
    constexpr int64_t most = sizeof...(kPixels);
    const int64_t count = (row.pixels + most - 1) / most, size = size_of(output);
    for (int64_t v = 0; v * S::lanes < row.channels; v++) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t first = row.pixels * i / count, last = row.pixels * (i + 1) / count;
        table[last - first - 1](row, row.x + v * row.x_vector + first * S::lanes, row.weight + v * row.weight_vector,
                                row.bias ? row.bias + v * S::lanes : nullptr,
                                static_cast<char*>(row.y) + (first * row.y_pixel + v * S::lanes) * size, output,
                                row.channels - v * S::lanes);
      }
    }
  }

  static void row(const DepthwiseRow& row, int group, Dtype output) {
    switch (group) {
      case 1:
        if (row.run == 2) return tiles<1, 2>(row, output, std::make_index_sequence<max_pixels(1)>());
        if (row.run == 3) return tiles<1, 3>(row, output, std::make_index_sequence<max_pixels(1)>());
        if (row.run == 5) return tiles<1, 5>(row, output, std::make_index_sequence<max_pixels(1)>());
        return tiles<1, 1>(row, output, std::make_index_sequence<max_pixels(1)>());
      case 2:
        return tiles<2, 1>(row, output, std::make_index_sequence<max_pixels(2)>());
      case 4:
        return tiles<4, 1>(row, output, std::make_index_sequence<max_pixels(4)>());
      case 8:
        return tiles<8, 1>(row, output, std::make_index_sequence<max_pixels(8)>());
    }
  }

  // Pixels whose dy is in registers at once, beside the sums and one vector of x.
  static constexpr int outer_pixels(int sums, int rotations) {
    return sums + 4 * rotations < S::registers ? 4 : sums + 2 * rotations < S::registers ? 2 : 1;
  }

  // Multiplies kPixels pixels of dy in kRotations rotations with the inputs under kRows x kColumns taps, and adds to
  // sums in registers. Inputs under adjacent taps are loaded once for all pixels.
  template <int kRows, int kColumns, int kRotations, int kPixels>
  static inline __attribute__((always_inline)) void outer_pixels(V (&total)[kRows][kColumns][kRotations],
                                                                 const float* (&from)[kRows],
                                                                 const int64_t (&column)[kColumns], const float*& dy,
                                                                 const DepthwiseOuterRow& row) {
    V factor[kPixels][kRotations];
    GRADAUG_UNROLL
    for (int p = 0; p < kPixels; p++, dy += row.dy_pixel) {
      GRADAUG_UNROLL
      for (int j = 0; j < kRotations; j++) factor[p][j] = S::load(dy + j * row.dy_rotation);
    }
    GRADAUG_UNROLL
    for (int r = 0; r < kRows; r++) {
      if constexpr (kPixels > 1) {
        GRADAUG_UNROLL
        for (int i = 0; i < kPixels + kColumns - 1; i++) {
          V value = S::load(from[r] + column[0] + i * S::lanes);
          asm volatile("" : "+v"(value));  // loaded once, not with each product
          GRADAUG_UNROLL
          for (int c = 0; c < kColumns; c++) {
            const int p = i - c;
            if (p < 0 || p >= kPixels) continue;
            GRADAUG_UNROLL
            for (int j = 0; j < kRotations; j++) total[r][c][j] = S::fma(value, factor[p][j], total[r][c][j]);
          }
        }
      } else {
        GRADAUG_UNROLL
        for (int c = 0; c < kColumns; c++) {
          const V value = S::load(from[r] + column[c]);
          GRADAUG_UNROLL
          for (int j = 0; j < kRotations; j++) total[r][c][j] = S::fma(value, factor[0][j], total[r][c][j]);
        }
      }
      from[r] += kPixels * S::lanes;
    }
  }

  // Sums the products of all pixels of a row with kRows x kColumns taps in registers, which are added to memory at the
  // end.
  template <int kRows, int kColumns, int kRotations>
  static void outer_tile(const DepthwiseOuterRow& row, const float* x, const int64_t* row_offset,
                         const int64_t* column_offset, const float* dy, float* sum, int64_t sum_row,
                         int64_t sum_column) {
    V total[kRows][kColumns][kRotations];
    const float* from[kRows];
    int64_t column[kColumns];
    GRADAUG_UNROLL
    for (int c = 0; c < kColumns; c++) column[c] = column_offset[c];
    GRADAUG_UNROLL
    for (int r = 0; r < kRows; r++) {
      from[r] = x + row_offset[r];
      GRADAUG_UNROLL
      for (int c = 0; c < kColumns; c++) {
        GRADAUG_UNROLL
        for (int j = 0; j < kRotations; j++) total[r][c][j] = S::zero();
      }
    }
    constexpr int block = outer_pixels(kRows * kColumns * kRotations, kRotations);
    int64_t p = 0;
    for (; row.adjacent && p + block <= row.pixels; p += block) {
      outer_pixels<kRows, kColumns, kRotations, block>(total, from, column, dy, row);
    }
    for (; p < row.pixels; p++) outer_pixels<kRows, kColumns, kRotations, 1>(total, from, column, dy, row);
    GRADAUG_UNROLL
    for (int r = 0; r < kRows; r++) {
      GRADAUG_UNROLL
      for (int c = 0; c < kColumns; c++) {
        GRADAUG_UNROLL
        for (int j = 0; j < kRotations; j++) {
          float* to = sum + r * sum_row + c * sum_column + j * S::lanes;
          S::store(to, S::add(S::load(to), total[r][c][j]));
        }
      }
    }
  }

  // All rows of kColumns columns of the kernel, from column `first`.
  template <int kGroup, int kColumns, size_t... kRows>
  static void outer_columns(const DepthwiseOuterRow& row, int64_t v, int64_t first, std::index_sequence<kRows...>) {
    using Tile = void (*)(const DepthwiseOuterRow&, const float*, const int64_t*, const int64_t*, const float*, float*,
                          int64_t, int64_t);
    constexpr int rotations = outer_rotations(kGroup);
    static constexpr Tile table[] = {outer_tile<kRows + 1, kColumns, rotations>...};
    constexpr int64_t most = sizeof...(kRows), column = kGroup * S::lanes;
    for (int64_t r = 0; r < row.rows; r += most) {
      const int64_t rows = row.rows - r < most ? row.rows - r : most;
      float* sum = row.sum + v * row.sum_vector + (r * row.columns + first) * column;
      for (int j = 0; j < kGroup; j += rotations) {
        table[rows - 1](row, row.x + v * row.x_vector, row.row_offset + r, row.column_offset + first,
                        row.dy + v * row.dy_vector + j * row.dy_rotation, sum + j * S::lanes, row.columns * column,
                        column);
      }
    }
  }

  template <int kGroup, int kColumns>
  static void outer_any_rows(const DepthwiseOuterRow& row, int64_t v, int64_t first) {
    outer_columns<kGroup, kColumns>(row, v, first, std::make_index_sequence<max_outer_rows(kColumns, kGroup)>());
  }

  template <int kGroup, size_t... kColumns>
  static void outer_group(const DepthwiseOuterRow& row, std::index_sequence<kColumns...>) {
    using Columns = void (*)(const DepthwiseOuterRow&, int64_t, int64_t);
    static constexpr Columns table[] = {outer_any_rows<kGroup, kColumns + 1>...};
    constexpr int64_t most = sizeof...(kColumns);
    for (int64_t v = 0; v < row.vectors; v++) {
      for (int64_t c = 0; c < row.columns; c += most) {
        table[(row.columns - c < most ? row.columns - c : most) - 1](row, v, c);
      }
    }
  }

  static void outer(const DepthwiseOuterRow& row, int group) {
    constexpr auto columns = std::make_index_sequence<max_outer_columns>();
    switch (group) {
      case 1:
        return outer_group<1>(row, columns);
      case 2:
        return outer_group<2>(row, columns);
      case 4:
        return outer_group<4>(row, columns);
      case 8:
        return outer_group<8>(row, columns);
    }
  }

  template <Dtype kDtype>
  static void load_as(float* dst, int64_t dst_vector, const void* src, int64_t src_pixel, int64_t src_next,
                      int64_t pixels, int64_t channels) {
    const char* from = static_cast<const char*>(src);
    src_pixel *= size_of(kDtype), src_next *= size_of(kDtype);
    for (; channels >= S::lanes; channels -= S::lanes, dst += dst_vector, from += S::lanes * size_of(kDtype)) {
      const char* pixel = from;
      for (int64_t p = 0; p < pixels; p++, pixel += src_pixel) {
        S::prefetch(pixel + src_next);
        S::store(dst + p * S::lanes, S::load_floats(pixel, kDtype, S::lanes));
      }
    }
    for (int64_t p = 0; channels > 0 && p < pixels; p++) {
      S::store(dst + p * S::lanes, S::load_floats(from + p * src_pixel, kDtype, channels));
    }
  }

  static void load(float* dst, int64_t dst_vector, const void* src, int64_t src_pixel, int64_t src_next, Dtype dtype,
                   int64_t pixels, int64_t channels) {
    switch (dtype) {
      case Dtype::f32:
        return load_as<Dtype::f32>(dst, dst_vector, src, src_pixel, src_next, pixels, channels);
      case Dtype::bf16:
        return load_as<Dtype::bf16>(dst, dst_vector, src, src_pixel, src_next, pixels, channels);
      case Dtype::f16:
        return load_as<Dtype::f16>(dst, dst_vector, src, src_pixel, src_next, pixels, channels);
    }
  }

  template <int kGroup>
  static void rotate_group(float* dst, int64_t dst_rotation, int64_t pixels) {
    for (int64_t p = 0; p < pixels; p++, dst += S::lanes) {
      const V value = S::load(dst);
      for (int j = 1; j < kGroup; j++) {
        S::store(dst + j * dst_rotation, S::permute(value, rotations<kGroup>.index[j]));
      }
    }
  }

  static void rotate(float* dst, int64_t dst_rotation, int64_t pixels, int group) {
    switch (group) {
      case 2:
        return rotate_group<2>(dst, dst_rotation, pixels);
      case 4:
        return rotate_group<4>(dst, dst_rotation, pixels);
      case 8:
        return rotate_group<8>(dst, dst_rotation, pixels);
    }
  }

  static constexpr DepthwiseKernels table = {
      .lanes = S::lanes,
      .max_group = max_group,
      .row = row,
      .outer = outer,
      .load = load,
      .rotate = rotate,
  };
};

}  // namespace
}  // namespace gradaug::cpu
