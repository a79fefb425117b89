// Convolutions of NHWC images on the kernels of microkernels/table.h. Pointers, sizes and strides; no tensors.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "conv_axis.h"
#include "cpu/conv/scratch.h"
#include "cpu/microkernels/table.h"

namespace gradaug::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// [N, H, W, C] with any strides of N, H and W, counted in elements; channels are adjacent.
struct Image {
  const void* data;
  Dtype dtype;
  int64_t n, h, w;  // strides

  const char* at(int64_t in, int64_t ih, int64_t iw) const {
    return static_cast<const char*>(data) + (in * n + ih * h + iw * w) * size_of(dtype);
  }
  char* at(int64_t in, int64_t ih, int64_t iw) { return const_cast<char*>(std::as_const(*this).at(in, ih, iw)); }
};

// [KH, KW, depth, columns] with any strides: depth is summed over, columns are the channels of the result.
struct Weight {
  const void* data;
  Dtype dtype;
  int64_t h, w, depth, column;  // strides

  const char* at(int64_t ih, int64_t iw, int64_t k, int64_t j) const {
    return static_cast<const char*>(data) + (ih * h + iw * w + k * depth + j * column) * size_of(dtype);
  }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // The i-th of `parts` nearly equal parts, whose borders are multiples of `unit`.
  Range part(int64_t i, int64_t parts, int64_t unit = 1) const {
    const int64_t units = ceil_div(size(), unit);
    return {std::min(end, begin + units * i / parts * unit), std::min(end, begin + units * (i + 1) / parts * unit)};
  }
};

// Rows of memory that are brought to the second-level cache a few lines at a time, while something else is computed.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const char* rows, int64_t count, int64_t stride, int64_t bytes)
      : row_(rows), rows_(count), stride_(stride), bytes_(bytes) {}

  int64_t lines() const { return rows_ * ceil_div(bytes_, 64); }
  void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; lines--) {
      __builtin_prefetch(row_ + done_, 0, 2);
      if ((done_ += 64) < bytes_) continue;
      done_ = 0;
      row_ += stride_;
      rows_--;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t rows_ = 0, stride_ = 0, bytes_ = 0, done_ = 0;
};

// y[n, q] = bias + sum over taps of x[n, step * q + offset[tap]] weight[tap], along both axes.
//   x [batch, h.inputs, w.inputs, depth], weight [KH, KW, depth, columns], bias [columns] or null,
//   y [batch, H, W, columns]: only the pixels that the two axes name are written.
void gather_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, Image x,
                 int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns);

// The same where the weight is larger than the images; false, and nothing done, where it is not.
bool few_pixels_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                     int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns);

// dweight[o, h, w, i] += sum over images and pixels q of dy[n, q, o] x[n, stride * q + dilation * (h, w) - padding, i].
//   dy [batch, OH, OW, out], x [batch, H, W, in]; dweight float32 with any strides.
struct WeightGrad {
  float* data;
  int64_t out, h, w, in;  // strides
};
void conv_weight_grad(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                      int64_t out, const Image& x, int64_t in, const WeightGrad& dweight);

// The same by Winograd's algorithm; false, and nothing done, where it does not apply or does not pay.
bool winograd_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                   int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns);
bool winograd_weight_grad(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                          int64_t out, const Image& x, int64_t in, const WeightGrad& dweight);

}  // namespace gradaug::cpu
