// The geometry of a convolution, one axis at a time, free of torch.
//
// Forward and input gradient are both *gathers*: output q sums, over taps t, input step * q + offset[t] times the
// weight at kernel index tap[t], and is stored at coordinate first + spacing * q; inputs outside [0, inputs) are zero.
//
//   forward          y[q]  = sum_t x[stride * q + dilation * t - padding] w[t]
//   input gradient   dx[h] = sum_t dy[(h + padding - dilation * t) / stride] w[t], where that is an integer.
//                    The h with (h + padding) mod stride = phase share their taps: one gather for each phase.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gradaug {

// One axis of a convolution; inputs are x, outputs are y.
struct ConvAxis {
  int64_t inputs, outputs, kernel, stride, padding, dilation;
};

struct GatherAxis {
  int64_t inputs;   // size of what is read
  int64_t outputs;  // number of q
  int64_t step;
  int64_t first, spacing;       // where outputs are stored
  std::vector<int64_t> offset;  // ascending
  std::vector<int64_t> tap;
};

inline GatherAxis forward_gather(const ConvAxis& axis) {
  GatherAxis gather{axis.inputs, axis.outputs, axis.stride, 0, 1, {}, {}};
  for (int64_t t = 0; t < axis.kernel; t++) {
    gather.offset.push_back(axis.dilation * t - axis.padding);
    gather.tap.push_back(t);
  }
  return gather;
}

// phase in [0, stride)
inline GatherAxis input_grad_gather(const ConvAxis& axis, int64_t phase) {
  // The first h >= 0 with (h + padding) mod stride = phase, and its q = (h + padding) / stride.
  const int64_t first = (((phase - axis.padding) % axis.stride) + axis.stride) % axis.stride;
  const int64_t q = (first + axis.padding) / axis.stride;
  const int64_t outputs = first < axis.inputs ? (axis.inputs - 1 - first) / axis.stride + 1 : 0;
  GatherAxis gather{axis.outputs, outputs, 1, first, axis.stride, {}, {}};
  for (int64_t t = axis.kernel - 1; t >= 0; t--) {
    if ((axis.dilation * t - phase) % axis.stride != 0) continue;
    gather.offset.push_back(q - (axis.dilation * t - phase) / axis.stride);
    gather.tap.push_back(t);
  }
  return gather;
}

// Those of all phases that have a pixel, of which a long stride leaves some without.
inline std::vector<GatherAxis> input_grad_gathers(const ConvAxis& axis) {
  std::vector<GatherAxis> gathers;
  for (int64_t first = 0; first < std::min(axis.stride, axis.inputs); first++) {
    gathers.push_back(input_grad_gather(axis, (first + axis.padding) % axis.stride));
  }
  return gathers;
}

}  // namespace gradaug
