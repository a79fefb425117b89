// Convolutions of fewer pixels than their weight has elements, as in the last layers of a network: one matrix product
// [pixels, taps * depth] x [taps * depth, columns].
// 1. What each pixel reads is copied side by side, unless it is in memory like that;
// 2. a task packs a panel of 32 columns of the weight, which nobody else needs and which stays in the second-level
//    cache, and multiplies all pixels with it, which come from the third level;
// 3. results whose pixels are not evenly spaced are copied there at the end.
// gather_conv, which packs the weight for all tasks and has each read all of it, takes up to 1.6 times as long.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv/packed_panels.h"
#include "cpu/conv/strided_rows.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kMaxUnits = 1024 * 1024;      // inputs of all pixels, 4 MiB: they stay in the third-level cache
constexpr int64_t kMaxPanelUnits = 160 * 1024;  // and a panel of the weight in the second
// Pixels for each column, where the images are read in place and where they are copied. Fitted to Zen 5.
constexpr double kMaxPixels = 4, kMaxCopied = 1, kMaxCopiedTaps = 0.5;
constexpr double kMaxIdle = 1.12;  // time of all tasks to that of as many columns in full panels

}  // namespace

bool few_pixels_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                     int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns) {
  const int64_t pixels = batch * h.outputs * w.outputs, taps_w = w.tap.size();
  const Panels panels{static_cast<int64_t>(h.tap.size()) * taps_w, ceil_div(depth, kernels.pair), columns,
                      kernels.panel, kernels.lanes};
  const int64_t units = panels.taps * panels.units, threads = at::get_num_threads();
  const int64_t rounds = ceil_div(panels.count(), threads);
  if (pixels * units > kMaxUnits || panels.panel * units > kMaxPanelUnits) return false;
  if (rounds * threads * panels.panel > kMaxIdle * columns) return false;

  Rows inputs{};
  if (is_pointwise(h, w) && holds_units(kernels, batch, h, w, x, depth)) {
    inputs = inputs_in_place(x, batch, h, w);
    inputs.pitch /= kernels.pair;
  }
  const double most = inputs.data ? kMaxPixels : panels.taps == 1 ? kMaxCopied : kMaxCopiedTaps;
  if (pixels > most * columns) return false;
  // Rows of a tile that are multiples of 4 KiB apart would share one set of the first-level cache.
  const int64_t pitch = units % 256 == 0 ? units + 16 : units;
  const Buffer input_memory(inputs.data ? 0 : pixels * pitch);
  if (!inputs.data) {
    inputs = {reinterpret_cast<char*>(input_memory.data()), pitch};
    at::parallel_for(0, pixels, std::max<int64_t>(1, 16384 / units), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / (h.outputs * w.outputs), q = i / w.outputs % h.outputs, p = i % w.outputs;
        float* to = input_memory.data() + i * pitch;
        for (int64_t t = 0; t < panels.taps; t++, to += panels.units) {
          const int64_t row = h.step * q + h.offset[t / taps_w], column = w.step * p + w.offset[t % taps_w];
          if (row >= 0 && row < h.inputs && column >= 0 && column < w.inputs) {
            kernels.load_pixels(to, panels.units, x.at(n, row, column), x.w, x.dtype, 1, depth);
          } else {
            std::memset(to, 0, panels.units * sizeof(float));
          }
        }
      }
    });
  }

  const int64_t size = size_of(y.dtype);
  Rows outputs = outputs_in_place(y, batch, h, w);
  const bool apart = !outputs.data;
  const Buffer output_memory(apart ? ceil_div(pixels * columns * size, sizeof(float)) : 0);
  if (apart) outputs = {reinterpret_cast<char*>(output_memory.data()), columns};

  std::vector<float> padded_bias(bias ? panels.count() * panels.panel : 0);
  if (bias) std::copy(bias, bias + columns, padded_bias.begin());
  at::parallel_for(0, panels.count(), 1, [&](int64_t begin, int64_t end) {
    const Buffer panel(units * panels.panel);
    const int64_t no_tap = 0;
    for (int64_t p = begin; p < end; p++) {
      for (int64_t t = 0; t < panels.taps; t++) pack_tap(kernels, panel.data(), panels, p, t, h, w, weight, depth);
      GemmTile tile{};
      tile.a = reinterpret_cast<const float*>(inputs.data);
      tile.a_row = inputs.pitch;
      tile.tap_offset = &no_tap;
      tile.taps = 1;
      tile.b = panel.data();
      tile.depth = units;
      tile.bias = bias ? padded_bias.data() + p * panels.panel : nullptr;
      tile.c = outputs.data + p * panels.panel * size;
      tile.c_row = outputs.pitch;
      tile.rows = pixels;
      tile.columns = panels.valid(p);
      kernels.gemm(tile, y.dtype);
    }
  });
  if (!apart) return true;
  at::parallel_for(0, pixels, std::max<int64_t>(1, 16384 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / (h.outputs * w.outputs), q = i / w.outputs % h.outputs, p = i % w.outputs;
      std::memcpy(y.at(n, h.first + q * h.spacing, w.first + p * w.spacing), outputs.data + i * columns * size,
                  columns * size);
    }
  });
  return true;
}

}  // namespace gradaug::cpu
