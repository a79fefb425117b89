// Which pixels the tiles can read or write where they are.
#pragma once

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Pixels as the rows of a matrix [batch * height * width, channels].
template <class Byte>
struct Rows {
  Byte* data;
  int64_t pitch;  // elements
};

// Elements from one to the next of the pixels (n, h0 + q * h_step, w0 + p * w_step) of images; none where they are not
// evenly spaced.
inline std::optional<int64_t> even_pitch(const Images& images, int64_t batch, int64_t h_step, int64_t height,
                                         int64_t w_step, int64_t width) {
  const int64_t pitch = width > 1 ? w_step * images.w : height > 1 ? h_step * images.h : images.n;
  const bool rows = width == 1 || height == 1 || h_step * images.h == width * pitch;
  const bool whole = batch == 1 || images.n == height * width * pitch;
  return rows && whole ? std::optional(pitch) : std::nullopt;
}

// These pixels; no data where they are not evenly spaced.
template <class ImagesType>
auto evenly_spaced(const ImagesType& images, int64_t batch, int64_t h0, int64_t h_step, int64_t height, int64_t w0,
                   int64_t w_step, int64_t width) {
  const auto pitch = even_pitch(images, batch, h_step, height, w_step, width);
  return Rows{pitch ? images.at(0, h0, w0) : nullptr, pitch.value_or(0)};
}

// What the first tap reads of x.
inline Rows<const char> inputs_in_place(const Images& x, int64_t batch, const GatherAxis& h, const GatherAxis& w) {
  return evenly_spaced(x, batch, h.offset[0], h.step, h.outputs, w.offset[0], w.step, w.outputs);
}

inline Rows<char> outputs_in_place(const MutableImages& y, int64_t batch, const GatherAxis& h, const GatherAxis& w) {
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
inline bool holds_units(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w,
                        const Images& x, int64_t depth) {
  if (kernels.pair == 1) return x.dtype == Dtype::f32;
  const auto even = [](int64_t stride, int64_t count) { return count == 1 || stride % 2 == 0; };
  return x.dtype == Dtype::bf16 && depth % 2 == 0 && even(x.n, batch) && even(x.h, h.outputs) && even(x.w, w.outputs);
}

// Whether tiles can read the pixels of a phase where they are, all of them as one matrix.
inline bool reads_in_place(const GatherProblem& problem, const Phase& phase) {
  const GatherAxis &h = phase.h, &w = phase.w;
  return is_pointwise(h, w) && holds_units(*problem.kernels, problem.batch, h, w, problem.x, problem.depth()) &&
         even_pitch(problem.x, problem.batch, h.step, h.outputs, w.step, w.outputs);
}

}  // namespace gradaug::cpu
