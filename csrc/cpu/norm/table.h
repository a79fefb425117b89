// The loops of batch norm over an activation and of the max pooling after it, one table of them for each element type
// and instruction set, chosen at run time. Arithmetic is in A: float; double for double.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace gradaug::batch_norm {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// channels_last: [rows, cols], one row per pixel, or per `fold` pixels.
template <typename T>
struct Rows {
  T* data;
  int64_t pitch;  // elements from one row to the next

  T* at(int64_t row, int64_t col) const { return data + row * pitch + col; }
  Rows from_column(int64_t col) const { return {data ? data + col : nullptr, pitch}; }
};

// contiguous: [N, C] planes of adjacent values.
template <typename T>
struct Planes {
  T* data;
  int64_t stride_n, stride_c;  // elements

  T* at(int64_t n, int64_t c) const { return data + n * stride_n + c * stride_c; }
};

// y = relu?((x - center) * scale + offset + residual?)
template <typename T>
struct RowsForward {
  Rows<const T> x, residual;
  Rows<T> y;
  const Acc<T>*center, *scale, *offset;  // [cols]

  RowsForward from_column(int64_t col) const {
    return {x.from_column(col), residual.from_column(col), y.from_column(col), center + col, scale + col, offset + col};
  }
};

// dz = dy or, where y is given, dy * (y > 0).
// dx = (dz - offset - (x - center) * slope) * scale
template <typename T>
struct RowsBackward {
  Rows<const T> dy, x, y;
  Rows<T> dz, dx;
  const Acc<T>*center, *scale, *slope, *offset;  // [cols]

  RowsBackward from_column(int64_t col) const {
    return {dy.from_column(col), x.from_column(col), y.from_column(col), dz.from_column(col), dx.from_column(col),
            center + col,        scale + col,        slope + col,        offset + col};
  }
};

// The same for planes; coefficients are [C].
template <typename T>
struct PlanesForward {
  Planes<const T> x, residual;
  Planes<T> y;
  const Acc<T>*center, *scale, *offset;
};

template <typename T>
struct PlanesBackward {
  Planes<const T> dy, x, y;
  Planes<T> dz, dx;
  const Acc<T>*center, *scale, *slope, *offset;
};

// Of a channel: sum(x - center), sum((x - center)^2).
struct PlaneMoments {
  double center, sum, sum_of_squares;
};

// Of a channel: sum(dz), sum(dz * (x - center)).
struct GradientSums {
  double dz, dz_x;
};

inline int64_t scratch_size(int64_t cols, int64_t width) { return 4 * (cols + width); }

// Arrays that have an element for every column must have room for `width` of them.
template <typename T>
struct NormKernels {
  using A = Acc<T>;

  int width;  // elements of a vector step

  // A number near the mean of every column, exact in T.
  void (*row_centers)(Rows<const T> x, int64_t rows, int64_t cols, A* center);
  // Adds the sums of every column. scratch: of scratch_size(cols, width), here and below.
  void (*row_moments)(Rows<const T> x, int64_t rows, int64_t cols, const A* center, double* sum, double* sum_of_squares,
                      A* scratch);
  void (*row_apply)(const RowsForward<T>& rows, int64_t begin, int64_t end, int64_t cols, bool relu, A* scratch);
  // Adds the sums of every column, and writes dz where it has memory.
  void (*row_gradient_sums)(const RowsBackward<T>& rows, int64_t begin, int64_t end, int64_t cols, double* sum_dz,
                            double* sum_dz_x, A* scratch);
  void (*row_input_gradients)(const RowsBackward<T>& rows, int64_t begin, int64_t end, int64_t cols, A* scratch);

  // Of channels [c, c_end) and images [n, n_end). Results are [channels].
  void (*plane_moments)(Planes<const T> x, int64_t n, int64_t n_end, int64_t c, int64_t c_end, int64_t pixels,
                        PlaneMoments* result);
  void (*plane_apply)(const PlanesForward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                      int64_t pixels, bool relu);
  void (*plane_gradient_sums)(const PlanesBackward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                              int64_t pixels, GradientSums* result);
  void (*plane_input_gradients)(const PlanesBackward<T>& planes, int64_t n, int64_t n_end, int64_t c, int64_t c_end,
                                int64_t pixels);

  // Of the max pooling that follows, slim_max_pool2d.cpp. One output pixel: y, the largest of the pixels, or a NaN
  // among them; offset, its tap, the first one of several.
  void (*largest)(const T* const* pixels, const uint8_t* tap, int64_t taps, int64_t channels, T* y, uint8_t* offset);
  // One input pixel: dx = sum over windows of dy where the window's maximum is at its tap and, where y is given,
  // positive.
  void (*sum_of_windows)(const T* const* dy, const T* const* y, const uint8_t* const* offset, const uint8_t* tap,
                         int64_t windows, int64_t channels, T* dx);
};

// Those that serve T in this process (microkernels/kernel_tables.cpp).
template <typename T>
const NormKernels<T>& norm_kernels();

}  // namespace gradaug::batch_norm
