// A band: some rows of an image, copied with their padding into thread-local memory that stays in the second-level
// cache.
#pragma once

#include <cstring>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Rows first_row + r * row_step and columns first_column + c * column_step of one image, zeros outside of it.
struct Band {
  int64_t first_row, row_step, rows;
  int64_t first_column, column_step, columns;
  int64_t pixel;  // units from a pixel to the next; at least those of `channels`

  int64_t row() const { return columns * pixel; }  // units from a row to the next
  int64_t units() const { return rows * row(); }
};

// dst [rows, columns, pixel] in units: load(to, h, w, count) those of pixels (h, w + i * column_step) of the image,
// i < count, which is height x width.
template <class Load>
void fill_band(float* dst, const Band& band, int64_t height, int64_t width, const Load& load) {
  // The columns of the band that are inside the image: [left, right).
  const auto column_at_least = [&](int64_t c) {
    const int64_t steps = (c - band.first_column + band.column_step - 1) / band.column_step;
    return c <= band.first_column ? 0 : steps < band.columns ? steps : band.columns;
  };
  const int64_t left = column_at_least(0), right = column_at_least(width);
  for (int64_t r = 0; r < band.rows; r++, dst += band.row()) {
    const int64_t h = band.first_row + r * band.row_step;
    if (h < 0 || h >= height || left >= right) {
      std::memset(dst, 0, band.row() * sizeof(float));
      continue;
    }
    std::memset(dst, 0, left * band.pixel * sizeof(float));
    load(dst + left * band.pixel, h, band.first_column + left * band.column_step, right - left);
    std::memset(dst + right * band.pixel, 0, (band.columns - right) * band.pixel * sizeof(float));
  }
}

// The pixels of image n.
inline void load_band(const Kernels& kernels, float* dst, const Band& band, const Images& x, int64_t n, int64_t height,
                      int64_t width, int64_t channels) {
  fill_band(dst, band, height, width, [&](float* to, int64_t h, int64_t w, int64_t count) {
    kernels.load_pixels(to, band.pixel, x.at(n, h, w), x.w * band.column_step, x.dtype, count, channels);
  });
}

}  // namespace gradaug::cpu
