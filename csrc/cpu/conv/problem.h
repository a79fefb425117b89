// Convolutions of NHWC images: what is asked for, and on which memory. Pointers, sizes and strides; no tensors.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "conv_axis.h"
#include "cpu/conv/scratch.h"
#include "cpu/microkernels/depthwise_table.h"
#include "cpu/microkernels/table.h"

namespace gradaug::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A batch [N, H, W, C] with any strides of N, H and W, counted in elements; channels are adjacent.
struct Images {
  const char* data;
  Dtype dtype;
  int64_t n, h, w;  // strides

  const char* at(int64_t in, int64_t ih, int64_t iw) const {
    return data + (in * n + ih * h + iw * w) * size_of(dtype);
  }
};

// The same where it is written.
struct MutableImages {
  char* data;
  Dtype dtype;
  int64_t n, h, w;  // strides

  char* at(int64_t in, int64_t ih, int64_t iw) const { return data + (in * n + ih * h + iw * w) * size_of(dtype); }
  operator Images() const { return {data, dtype, n, h, w}; }
};

// [O, I / G, KH, KW] with any strides.
struct Weight {
  const char* data;
  Dtype dtype;
  int64_t out, in, h, w;  // strides
};

// A weight of one group as a matrix for each tap, [KH, KW, depth, columns]: depth is summed over, columns are the
// channels of the result.
struct WeightMatrices {
  const char* data;
  Dtype dtype;
  int64_t h, w, depth, column;  // strides

  const char* at(int64_t ih, int64_t iw, int64_t k, int64_t j) const {
    return data + (ih * h + iw * w + k * depth + j * column) * size_of(dtype);
  }
};

// What weight gradients are added to: [O, I / G, KH, KW] with any strides.
struct WeightGrad {
  float* data;
  int64_t out, h, w, in;  // strides
};

// What the choice of a path looks at, whatever the direction.
struct ConvProblem {
  std::optional<Dtype> dtype;  // of the images; none: float64
  bool nhwc;                   // the result; of a weight gradient, dy or x
  bool linear = false;         // rows times a matrix, which PyTorch's own product multiplies in place
  int64_t batch, in, out, groups;
  ConvAxis h, w;
  // Of this processor for this dtype, and for products in float32; null where there are none.
  const Kernels *kernels = nullptr, *float_kernels = nullptr;
  const DepthwiseKernels* depthwise_kernels = nullptr;
};

// Forward and input gradient, both gathers (conv_axis.h):
//
//   y[n, first + spacing * q] = bias + sum over taps of x[n, step * q + offset[tap]] weight[tap], along both axes
//   x [batch, H, W, depth], weight [O, I / G, KH, KW], bias [channels] or null, y [batch, H, W, channels]
//
// For the input gradient x is dy and y is dx. The pixels of y are those of all pairs of phases: one forward, as many as
// the strides have residues for an input gradient.
struct GatherProblem : ConvProblem {
  bool input_grad;
  std::vector<GatherAxis> h_phases, w_phases;
  Images x;
  Weight weight;
  const float* bias = nullptr;
  MutableImages y;

  int64_t depth() const { return input_grad ? out : in; }
  int64_t channels() const { return input_grad ? in : out; }
  WeightMatrices matrices() const {
    return {weight.data,
            weight.dtype,
            weight.h,
            weight.w,
            input_grad ? weight.out : weight.in,
            input_grad ? weight.in : weight.out};
  }
};

// The one phase of a forward.
inline std::vector<GatherAxis> forward_gathers(const ConvAxis& axis) {
  std::vector<GatherAxis> gathers;
  gathers.push_back(forward_gather(axis));
  return gathers;
}

struct Phase {
  const GatherAxis &h, &w;
  bool empty() const { return h.tap.empty() || w.tap.empty(); }
};

// dweight[o, i, h, w] += sum over images and pixels q of dy[n, q, o] x[n, stride * q + dilation * (h, w) - padding, i].
//   dy [batch, OH, OW, out], x [batch, H, W, in]
struct WeightGradProblem : ConvProblem {
  std::optional<Dtype> dweight_dtype;  // other gradients than float32 take a float32 sum beside them
  bool is_new = false;                 // the gradient is a whole new tensor, of the dtype of x
  Images dy, x;
  WeightGrad dweight;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // The i-th of `parts` nearly equal parts, whose borders are multiples of `multiple`.
  Range part(int64_t i, int64_t parts, int64_t multiple = 1) const {
    const int64_t count = ceil_div(size(), multiple);
    return {std::min(end, begin + count * i / parts * multiple),
            std::min(end, begin + count * (i + 1) / parts * multiple)};
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

}  // namespace gradaug::cpu
