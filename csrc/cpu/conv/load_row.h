// Rows of images as the units of weight gradients.
#pragma once

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// The width of the panels that few channels are copied into.
inline int64_t stored_panel(const Kernels& kernels, int64_t channels) {
  return channels <= kernels.lanes ? kernels.lanes : kernels.panel;
}

// `pixels` of a row of image n, or of images 2n and 2n + 1 where units are pairs of them, from channel `begin` on, in
// panels of `width` channels.
inline void load_row(const Kernels& kernels, int64_t batch, float* to, int64_t to_pixel, int64_t width,
                     int64_t to_panel, const Images& images, int64_t n, int64_t h, int64_t w, int64_t step,
                     int64_t pixels, int64_t begin, int64_t channels) {
  const auto at = [&](int64_t i) { return images.at(i, h, w) + begin * size_of(images.dtype); };
  if (kernels.pair == 2) {
    const char* second = 2 * n + 1 < batch ? at(2 * n + 1) : nullptr;
    kernels.zip_panels(to, to_pixel, width, to_panel, reinterpret_cast<const uint16_t*>(at(2 * n)),
                       reinterpret_cast<const uint16_t*>(second), images.w * step, pixels, channels);
  } else if (width == kernels.panel) {
    kernels.load_panels(to, to_panel, at(n), images.w * step, images.dtype, pixels, channels);
  } else {
    kernels.load_pixels(to, to_pixel, at(n), images.w * step, images.dtype, pixels, channels);
  }
}

}  // namespace gradaug::cpu
