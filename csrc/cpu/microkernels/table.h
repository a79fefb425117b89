// The inner loops of the convolutions, one table of them for each instruction set, chosen at run time.
//
// All of them work on *units* of four bytes along the dimension that is summed over: one float32, or, where the
// processor multiplies pairs of bfloat16 (AVX512_BF16), one such pair. float16, and bfloat16 elsewhere, become float32
// on the way into a unit. Sums are float32.
#pragma once

#include <cstdint>

namespace gradaug::cpu {

enum class Dtype { f32, bf16, f16 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// c[r][j] = bias[j] + sum over taps t and units k of a[tap_offset[t] + r * a_row + k] * b[t][k][j]
struct GemmTile {
  const float* a;             // units
  int64_t a_row;              // units
  const int64_t* tap_offset;  // [taps], units
  int64_t taps;
  const float* b;     // [taps, depth, vectors * lanes], units, zero beyond the columns
  int64_t depth;      // units in a tap
  int64_t chunk = 0;  // float32 units after which a sum is added to a total; 0: a quarter of all, within limits
  const float* bias;  // [vectors * lanes] or null
  void* c;            // elements of the output's dtype
  int64_t c_row;      // elements
  int64_t rows;
  int columns;  // 1 to panel
};

// c[r][j] += sum over images, rows and pixels of a[.., r] * b[.., j], for j < columns; b holds whole vectors.
struct OuterTile {
  const float* a;  // units
  const float* b;
  int64_t images, rows, pixels;
  int64_t a_image, a_row, a_pixel;  // strides in units
  int64_t b_image, b_row, b_pixel;
  int64_t chunk = 64;  // pixels after which a sum of float32 units is added to a total
  float* c;
  int64_t c_row;
  int64_t channels;  // of a
  int columns;       // of b: 1 to panel
};

// The transforms of conv/winograd.h, for tiles of m x m outputs and n x n inputs. Places of a tile and taps of a
// kernel are `tap` floats apart, row by row; whole vectors are read and written but where n elements are named.
struct WinogradKernels {
  int outputs, inputs;  // m, n = m + 2

  // dst[place][k / panel][k % panel] = B^T d B of n x n pixels; panels are dst_panel apart.
  void (*input_tile)(float* dst, int64_t dst_tap, int64_t panel, int64_t dst_panel, const void* const* pixels,
                     Dtype dtype, int64_t channels);
  // dst[place][k] = A dY A^T of m x m pixels.
  void (*gradient_tile)(float* dst, int64_t dst_tap, const void* const* pixels, Dtype dtype, int64_t channels);
  // dst[place][k] = G g G^T of 3 x 3 taps src[tap][k].
  void (*weight)(float* dst, int64_t dst_tap, const float* src, int64_t src_tap, int64_t count);
  // m x m pixels = A^T m A + bias of src[place][j], for j < columns; a null pixel is not stored.
  void (*output_tile)(void* const* pixels, Dtype dtype, const float* src, int64_t src_tap, const float* bias,
                      int64_t columns);
  // taps[tap][k] += G^T u G of src[place][k], for k < count.
  void (*add_weight_grad)(float* const taps[9], const float* src, int64_t src_tap, int64_t count);
};

struct Kernels {
  int pair;      // channels in a unit: 1 or 2
  int lanes;     // floats in a vector
  int panel;     // columns of a tile: 2 vectors
  int max_rows;  // that a tile keeps in registers

  void (*gemm)(const GemmTile& tile, Dtype output);
  void (*outer)(const OuterTile& tile);

  // dst[p][k] for p < pixels: `channels` elements from src + p * src_pixel, as units, zeros up to dst_pixel.
  void (*load_pixels)(float* dst, int64_t dst_pixel, const void* src, int64_t src_pixel, Dtype dtype, int64_t pixels,
                      int64_t channels);
  // One panel of one tap: dst[k][j], the elements src[2k * k_stride + j * n_stride] and (2k + 1), or one where pair
  // is 1.
  void (*pack_panel)(float* dst, int64_t dst_columns, const void* src, Dtype dtype, int64_t depth, int64_t columns,
                     int64_t k_stride, int64_t n_stride);
  // dst[k / panel][p][k % panel]: as load_pixels, in panels that are dst_panel apart, zeros up to whole panels.
  void (*load_panels)(float* dst, int64_t dst_panel, const void* src, int64_t src_pixel, Dtype dtype, int64_t pixels,
                      int64_t channels);
  // Pairs of bfloat16 pixels: dst[p][k / width][k % width] = channels k of the p-th pixels of `first` and of `second`,
  // zeros where that is null, for p < pixels; pairs are dst_pixel and panels dst_panel apart. Zeros up to whole panels.
  // For pair = 2 only.
  void (*zip_panels)(float* dst, int64_t dst_pixel, int64_t width, int64_t dst_panel, const uint16_t* first,
                     const uint16_t* second, int64_t src_pixel, int64_t pixels, int64_t channels);
  const WinogradKernels* winograd[2];  // m = 2, 4
};

// The best kernels this processor (and ATEN_CPU_CAPABILITY) allows for a dtype; null where PyTorch's own are better.
const Kernels* select_kernels(Dtype dtype);

}  // namespace gradaug::cpu
