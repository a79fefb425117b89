// Forward and input gradient of a convolution as one implicit matrix product:
// 1. the weight slice is packed once into panels [tap, depth, 32 columns], read through its strides;
// 2. a task takes a block of output pixels and copies the input band under it, padding included (nothing is copied
//    where there is neither padding nor conversion);
// 3. for each panel, which stays in the second-level cache, tiles of up to 14 pixels of a row sum over all taps in
//    registers, but for rows of taps above or below the image, and are stored once, with bias, in the output's dtype.
#include <algorithm>
#include <vector>

#include "cpu/conv/input_band.h"
#include "cpu/conv/packed_panels.h"
#include "cpu/conv/strided_rows.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kBandUnits = 48 * 1024;  // 192 KiB: a band and a panel share a cache of 1 MiB or more
constexpr int64_t kMinPixels = 48;         // a panel that comes from the third level is used for this many pixels

int64_t span(const GatherAxis& axis) { return axis.offset.back() - axis.offset.front(); }

// Those taps that are inside the image for output q.
Range inside(const GatherAxis& axis, int64_t q) {
  const auto outside = [&](int64_t tap) {
    const int64_t input = axis.step * q + axis.offset[tap];
    return input < 0 || input >= axis.inputs;
  };
  Range taps{0, static_cast<int64_t>(axis.offset.size())};
  while (taps.begin < taps.end && outside(taps.begin)) taps.begin++;
  while (taps.begin < taps.end && outside(taps.end - 1)) taps.end--;
  return taps;
}

// One row of all pixels, where one tap reads and writes pixels that are evenly spaced in memory.
void flatten(int64_t& batch, GatherAxis& h, GatherAxis& w, Image& x, Image& y) {
  if (!is_pointwise(h, w)) return;
  const Rows inputs = inputs_in_place(x, batch, h, w), outputs = outputs_in_place(y, batch, h, w);
  if (!inputs.data || !outputs.data) return;
  x = {inputs.data, x.dtype, 0, 0, inputs.pitch};
  y = {outputs.data, y.dtype, 0, 0, outputs.pitch};
  w.inputs = w.outputs = batch * h.outputs * w.outputs;
  h.inputs = h.outputs = batch = 1;
  for (GatherAxis* axis : {&h, &w}) axis->offset = {0}, axis->step = axis->spacing = 1, axis->first = 0;
}

void pack(const Kernels& kernels, float* packed, const Panels& panels, const GatherAxis& h, const GatherAxis& w,
          const Weight& weight, int64_t depth) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (panels.units * panels.panel));
  at::parallel_for(0, panels.count() * panels.taps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t p = i / panels.taps, t = i % panels.taps;
      pack_tap(kernels, packed + panels.offset(p), panels, p, t, h, w, weight, depth);
    }
  });
}

}  // namespace

void gather_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h_axis, const GatherAxis& w_axis, Image x,
                 int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns) {
  if (winograd_conv(kernels, batch, h_axis, w_axis, x, depth, weight, bias, y, columns)) return;
  if (few_pixels_conv(kernels, batch, h_axis, w_axis, x, depth, weight, bias, y, columns)) return;
  GatherAxis h = h_axis, w = w_axis;
  flatten(batch, h, w, x, y);
  const int64_t units = ceil_div(depth, kernels.pair);  // of a tap
  const int64_t taps_h = h.tap.size(), taps_w = w.tap.size();
  const Panels panels{taps_h * taps_w, units, columns, kernels.panel, kernels.lanes};
  const Buffer packed(panels.size());
  pack(kernels, packed.data(), panels, h, w, weight, depth);

  std::vector<float> padded_bias(bias ? panels.count() * panels.panel : 0);
  if (bias) std::copy(bias, bias + columns, padded_bias.begin());

  // A single tap needs only every step-th pixel; several taps need all.
  const bool direct = is_pointwise(h, w) && holds_units(kernels, batch, h, w, x, depth);
  const int64_t copy_h = taps_h == 1 ? h.step : 1, copy_w = taps_w == 1 ? w.step : 1;
  const int64_t step_h = h.step / copy_h, step_w = w.step / copy_w;
  // Rows of a tile that are multiples of 4 KiB apart would share one set of the first-level cache.
  const int64_t pixel = units % 256 == 0 ? units + 16 : units;

  // Block of output pixels: rows x width.
  const int64_t band_rows = span(h) + 1, output_pixel = columns * size_of(y.dtype) / 4;
  const int64_t fits = (kBandUnits - band_rows * span(w) * pixel) / (band_rows * step_w * pixel + output_pixel);
  const int64_t threads = at::get_num_threads();
  int64_t across = ceil_div(w.outputs, std::min(std::max(fits, kMinPixels), w.outputs));
  if (h.outputs == 1 && batch == 1) {  // nothing else to share: as many blocks for each thread
    across = std::max(across, std::min(threads * 2, w.outputs / kMinPixels));
    if (across > threads) across = round_up(across, threads);
  }
  const int64_t unit = across > 1 ? kernels.max_rows : 1;
  across = std::min(across, ceil_div(w.outputs, unit));
  const int64_t width = ceil_div(ceil_div(w.outputs, unit), across) * unit;
  const int64_t band_width = (width - 1) * step_w + span(w) + 1;
  int64_t rows = (kBandUnits - span(h) * band_width * pixel) / (step_h * band_width * pixel + width * output_pixel);
  rows = std::clamp<int64_t>(rows, 1, h.outputs);
  rows = std::clamp<int64_t>(batch * across * h.outputs / (2 * threads), 1, rows);
  const int64_t down = ceil_div(h.outputs, rows);
  rows = ceil_div(h.outputs, down);
  const int64_t blocks = batch * down * across;
  // Few blocks: threads share one and take panels of it.
  const int64_t shares = std::clamp<int64_t>(threads / blocks, 1, panels.count());

  // Adjacent taps of a row whose pixels are adjacent in the band are one run of units.
  const bool adjacent = span(w) + 1 == taps_w && pixel == units && !direct;
  const int64_t offsets = adjacent ? 1 : taps_w;  // of a row of taps
  std::vector<int64_t> tap_offset;
  const Band shape{0, copy_h, (rows - 1) * step_h + band_rows, 0, copy_w, band_width, pixel};
  const int64_t a_row = direct ? h.step * x.h / kernels.pair : shape.row() * step_h;
  const int64_t a_pixel = direct ? w.step * x.w / kernels.pair : pixel * step_w;
  for (int64_t th = 0; th < taps_h; th++) {
    for (int64_t tw = 0; tw < offsets; tw++) {
      const int64_t dh = h.offset[th] - h.offset[0], dw = w.offset[tw] - w.offset[0];
      tap_offset.push_back(dh * shape.row() + dw * pixel);
    }
  }

  // Pixels of one call: more where there is little to sum for each.
  const int64_t strip = kernels.max_rows * std::clamp<int64_t>(512 / (panels.taps * units), 4, 32);

  // What a task reads of x, row by row, is fetched during the task before it: as many lines in each call.
  const auto source = [&](int64_t task) {
    const int64_t block = task / shares, n = block / (down * across);
    const int64_t q0 = block / across % down * rows;
    const Range columns = Range{0, w.outputs}.part(block % across, across, unit);
    const Range valid_h = {std::max<int64_t>(0, q0 * h.step + h.offset[0]),
                           std::min(h.inputs, (q0 + rows - 1) * h.step + h.offset[0] + span(h) + 1)};
    const Range valid_w = {std::max<int64_t>(0, columns.begin * w.step + w.offset[0]),
                           std::min(w.inputs, (columns.end - 1) * w.step + w.offset[0] + span(w) + 1)};
    return Prefetch(x.at(n, valid_h.begin, valid_w.begin), valid_h.size(), x.h * size_of(x.dtype),
                    ((valid_w.size() - 1) * x.w + depth) * size_of(x.dtype));
  };
  const int64_t calls_of_task = rows * ceil_div(width, strip) * panels.count();

  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    const Buffer memory(direct ? 0 : shape.units());
    for (int64_t task = begin; task < end; task++) {
      const int64_t share = task % shares, block = task / shares;
      const int64_t n = block / (down * across), q0 = block / across % down * rows;
      const Range columns = Range{0, w.outputs}.part(block % across, across, unit);
      const int64_t p0 = columns.begin, block_width = columns.size(), block_rows = std::min(rows, h.outputs - q0);
      const float* a;
      if (direct) {
        a = reinterpret_cast<const float*>(x.at(n, q0 * h.step + h.offset[0], p0 * w.step + w.offset[0]));
      } else {
        Band band = shape;
        band.first_row = q0 * h.step + h.offset[0];
        band.rows = (block_rows - 1) * step_h + band_rows;
        band.first_column = p0 * w.step + w.offset[0];
        load_band(kernels, memory.data(), band, x, n, h.inputs, w.inputs, depth);
        a = memory.data();
      }
      Prefetch next = task + 1 < end && shares == 1 ? source(task + 1) : Prefetch();
      const int64_t next_lines = ceil_div(next.lines(), calls_of_task);
      const int64_t first_panel = panels.count() * share / shares, last_panel = panels.count() * (share + 1) / shares;
      const int64_t strips = ceil_div(block_width, strip);
      const auto multiply = [&](int64_t p, int64_t q, int64_t i) {
        const Range pixels = Range{0, block_width}.part(i, strips);
        const Range taps = inside(h, q0 + q);
        GemmTile tile{};
        tile.a = a + q * a_row + pixels.begin * a_pixel;
        tile.a_row = a_pixel;
        tile.tap_offset = tap_offset.data() + taps.begin * offsets;
        tile.taps = taps.size() * offsets;
        tile.b = packed.data() + panels.offset(p) + taps.begin * taps_w * units * panels.stored(p);
        tile.depth = adjacent ? units * taps_w : units;
        tile.bias = bias ? padded_bias.data() + p * panels.panel : nullptr;
        tile.c = y.at(n, h.first + (q0 + q) * h.spacing, w.first + (p0 + pixels.begin) * w.spacing) +
                 p * panels.panel * size_of(y.dtype);
        tile.c_row = y.w * w.spacing;
        tile.rows = pixels.size();
        tile.columns = panels.valid(p);
        next.fetch(next_lines);
        kernels.gemm(tile, y.dtype);
      };
      for (int64_t p = first_panel; p < last_panel; p++) {
        for (int64_t q = 0; q < block_rows; q++) {
          for (int64_t i = 0; i < strips; i++) multiply(p, q, i);
        }
      }
    }
  });
}

}  // namespace gradaug::cpu
