// Which pixels the tiles can read or write where they are.
#pragma once

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Pixels as the rows of a matrix [batch * height * width, channels].
struct Rows {
  char* data;
  int64_t pitch;  // elements
};

// The pixels (n, h0 + q * h_step, w0 + p * w_step) of an image; no data where they are not evenly spaced.
inline Rows evenly_spaced(const Image& image, int64_t batch, int64_t h0, int64_t h_step, int64_t height, int64_t w0,
                          int64_t w_step, int64_t width) {
  const int64_t pitch = width > 1 ? w_step * image.w : height > 1 ? h_step * image.h : image.n;
  const bool rows = width == 1 || height == 1 || h_step * image.h == width * pitch;
  const bool images = batch == 1 || image.n == height * width * pitch;
  return {rows && images ? const_cast<char*>(image.at(0, h0, w0)) : nullptr, pitch};
}

// What the first tap reads of x.
inline Rows inputs_in_place(const Image& x, int64_t batch, const GatherAxis& h, const GatherAxis& w) {
  return evenly_spaced(x, batch, h.offset[0], h.step, h.outputs, w.offset[0], w.step, w.outputs);
}

inline Rows outputs_in_place(const Image& y, int64_t batch, const GatherAxis& h, const GatherAxis& w) {
  return evenly_spaced(y, batch, h.first, h.spacing, h.outputs, w.first, w.spacing, w.outputs);
}

// Whether there is one tap, which never leaves the image.
inline bool is_pointwise(const GatherAxis& h, const GatherAxis& w) {
  for (const GatherAxis* axis : {&h, &w}) {
    if (axis->offset.size() != 1) return false;
    const int64_t first = axis->offset[0], last = axis->step * (axis->outputs - 1) + first;
    if (first < 0 || last >= axis->inputs) return false;
  }
  return true;
}

// Whether the pixels of x are whole units already.
inline bool holds_units(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                        int64_t depth) {
  if (kernels.pair == 1) return x.dtype == Dtype::f32;
  const auto even = [](int64_t stride, int64_t count) { return count == 1 || stride % 2 == 0; };
  return x.dtype == Dtype::bf16 && depth % 2 == 0 && even(x.n, batch) && even(x.h, h.outputs) && even(x.w, w.outputs);
}

}  // namespace gradaug::cpu
