// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(m x m, 3 x 3), as in Lavin & Gray, "Fast algorithms
// for convolutional neural networks", CVPR 2016. For a tile d of n x n inputs, n = m + 2, which overlaps its neighbours
// by two pixels, and its m x m outputs Y:
//
//   Y  = A^T [(G g G^T) . (B^T d B)] A                forward; the input gradient is one of a flipped kernel
//   dg = G^T [sum of (A dY A^T) . (B^T d B)] G        weight gradient
//
// The products at the n x n places of a tile are matrix products over channels, or over tiles for the gradient, on the
// tiles of microkernels/table.h: 16 multiplications instead of 36 for m = 2, 36 instead of 144 for m = 4. They are
// float32, for 16-bit images too: the transformed values would not stand another rounding to 8 bits.
#pragma once

#include <cstdint>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

constexpr int64_t kShortChunk = 32;                       // most of the large tiles' error is that of sums in float32
constexpr int kMaxTileInputs = 36, kMaxTileOutputs = 16;  // n * n, m * m

// The length of a sum in registers: float32's error is nothing beside the rounding of 16-bit images.
inline int64_t chunk(Dtype dtype) { return dtype == Dtype::f32 ? kShortChunk : INT64_MAX; }

// Tiles of m x m outputs of a batch, in the order of images, rows and columns.
struct Tiles {
  int64_t m, batch, height, width;  // of the outputs
  int64_t down() const { return ceil_div(height, m); }
  int64_t across() const { return ceil_div(width, m); }
  int64_t count() const { return batch * down() * across(); }
  int64_t image(int64_t t) const { return t / (down() * across()); }
  int64_t row(int64_t t) const { return t / across() % down() * m; }
  int64_t column(int64_t t) const { return t % across() * m; }
};

// The size x size pixels from (row, column) of image n; `outside` for those that are none.
template <class ImagesType, class Pointer>
void pixels_of(const ImagesType& images, int64_t n, int64_t row, int64_t column, int64_t height, int64_t width,
               int size, Pointer outside, Pointer* pixels) {
  for (int i = 0; i < size; i++) {
    for (int j = 0; j < size; j++, pixels++) {
      const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
      *pixels = inside ? images.at(n, row + i, column + j) : outside;
    }
  }
}

}  // namespace gradaug::cpu
