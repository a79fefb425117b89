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
#include "cpu/conv/paths.h"
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

// The pixels of one phase: read from x, written to y.
struct Pixels {
  int64_t batch;
  GatherAxis h, w;
  Images x;
  MutableImages y;

  // One row of all pixels, where one tap reads and writes pixels that are evenly spaced in memory.
  void flatten() {
    if (!is_pointwise(h, w)) return;
    const auto inputs = inputs_in_place(x, batch, h, w);
    const auto outputs = outputs_in_place(y, batch, h, w);
    if (!inputs.data || !outputs.data) return;
    x = {inputs.data, x.dtype, 0, 0, inputs.pitch};
    y = {outputs.data, y.dtype, 0, 0, outputs.pitch};
    w.inputs = w.outputs = batch * h.outputs * w.outputs;
    h.inputs = h.outputs = batch = 1;
    for (GatherAxis* axis : {&h, &w}) axis->offset = {0}, axis->step = axis->spacing = 1, axis->first = 0;
  }
};

// Where a task finds the inputs of its block: in x, or in its copy of the band of rows and columns under the block.
struct Source {
  bool in_place;
  int64_t step_h, step_w;  // from the input of an output to that of the next, in pixels of the band
  int64_t pixel;           // units from a pixel of the band to the next
  Band band;               // of the first block of the image, as high and wide as any

  Source(const Kernels& kernels, const Pixels& pixels, int64_t depth)
      : in_place(is_pointwise(pixels.h, pixels.w) &&
                 holds_units(kernels, pixels.batch, pixels.h, pixels.w, pixels.x, depth)) {
    // A single tap needs only every step-th pixel; several taps need all.
    const int64_t copy_h = pixels.h.tap.size() == 1 ? pixels.h.step : 1;
    const int64_t copy_w = pixels.w.tap.size() == 1 ? pixels.w.step : 1;
    step_h = pixels.h.step / copy_h, step_w = pixels.w.step / copy_w;
    // Rows of a tile that are multiples of 4 KiB apart would share one set of the first-level cache.
    const int64_t units = ceil_div(depth, kernels.pair);
    pixel = units % 256 == 0 ? units + 16 : units;
    band = {0, copy_h, 0, 0, copy_w, 0, pixel};
  }

  int64_t rows_under(const GatherAxis& h, int64_t rows) const { return (rows - 1) * step_h + span(h) + 1; }
  int64_t columns_under(const GatherAxis& w, int64_t columns) const { return (columns - 1) * step_w + span(w) + 1; }
};

struct Block {
  int64_t image;
  Range rows, columns;  // of outputs
};

// Blocks of `rows` rows of outputs and a part of their columns. Where there are fewer blocks than threads, `shares` of
// them take a block each, and panels of it.
struct Blocks {
  int64_t batch, height, width;
  int64_t rows, columns, down, across, multiple;
  int64_t shares;

  Blocks(const Kernels& kernels, const Pixels& pixels, const Source& source, const Panels& panels)
      : batch(pixels.batch), height(pixels.h.outputs), width(pixels.w.outputs) {
    const int64_t threads = at::get_num_threads(), pixel = source.pixel;
    const int64_t band_rows = span(pixels.h) + 1, span_w = span(pixels.w);
    const int64_t output_pixel = panels.columns * size_of(pixels.y.dtype) / 4;
    const int64_t fits = (kBandUnits - band_rows * span_w * pixel) / (band_rows * source.step_w * pixel + output_pixel);
    across = ceil_div(width, std::min(std::max(fits, kMinPixels), width));
    if (height == 1 && batch == 1) {  // nothing else to share: as many blocks for each thread
      across = std::max(across, std::min(threads * 2, width / kMinPixels));
      if (across > threads) across = round_up(across, threads);
    }
    multiple = across > 1 ? kernels.max_rows : 1;
    across = std::min(across, ceil_div(width, multiple));
    columns = ceil_div(ceil_div(width, multiple), across) * multiple;
    const int64_t band_width = source.columns_under(pixels.w, columns);
    rows = (kBandUnits - (band_rows - 1) * band_width * pixel) /
           (source.step_h * band_width * pixel + columns * output_pixel);
    rows = std::clamp<int64_t>(rows, 1, height);
    rows = std::clamp<int64_t>(batch * across * height / (2 * threads), 1, rows);
    down = ceil_div(height, rows);
    rows = ceil_div(height, down);
    shares = std::clamp<int64_t>(threads / count(), 1, panels.count());
  }

  int64_t count() const { return batch * down * across; }
  Block operator[](int64_t i) const {
    const int64_t first = i / across % down * rows;
    return {i / (down * across),
            {first, std::min(height, first + rows)},
            Range{0, width}.part(i % across, across, multiple)};
  }
};

class Product {
 public:
  Product(const GatherProblem& problem, const Phase& phase, const Pixels& pixels)
      : kernels_(*problem.kernels),
        pixels_(pixels),
        depth_(problem.depth()),
        panels_{static_cast<int64_t>(phase.h.tap.size() * phase.w.tap.size()), ceil_div(depth_, kernels_.pair),
                problem.channels(), kernels_.panel, kernels_.lanes},
        source_(kernels_, pixels, depth_),
        blocks_(kernels_, pixels, source_, panels_),
        bias_(padded_bias(problem.bias, panels_)),
        weight_(panels_.size()) {
    pack(phase, problem.matrices());
    source_.band.rows = source_.rows_under(pixels.h, blocks_.rows);
    source_.band.columns = source_.columns_under(pixels.w, blocks_.columns);
    // Adjacent taps of a row whose pixels are adjacent in the band are one run of units.
    const int64_t taps_w = pixels.w.tap.size();
    const bool adjacent = span(pixels.w) + 1 == taps_w && source_.pixel == panels_.units && !source_.in_place;
    runs_ = adjacent ? 1 : taps_w;
    for (const int64_t dh : pixels.h.offset) {
      for (int64_t run = 0; run < runs_; run++) {
        const int64_t dw = pixels.w.offset[run] - pixels.w.offset[0];
        tap_offset_.push_back((dh - pixels.h.offset[0]) * source_.band.row() + dw * source_.pixel);
      }
    }
    // More where there is little to sum for each.
    strip_ = kernels_.max_rows * std::clamp<int64_t>(512 / (panels_.taps * panels_.units), 4, 32);
  }

  void compute() const {
    at::parallel_for(0, blocks_.count() * blocks_.shares, 1, [&](int64_t begin, int64_t end) {
      const Buffer memory(source_.in_place ? 0 : source_.band.units());
      for (int64_t task = begin; task < end; task++) {
        const Block block = blocks_[task / blocks_.shares];
        Prefetch next = task + 1 < end && blocks_.shares == 1 ? fetching(blocks_[task + 1]) : Prefetch();
        multiply(block, inputs(block, memory.data()), task % blocks_.shares, next);
      }
    });
  }

 private:
  void pack(const Phase& phase, const WeightMatrices& weight) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / (panels_.units * panels_.panel));
    at::parallel_for(0, panels_.count() * panels_.taps, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t p = i / panels_.taps, t = i % panels_.taps;
        pack_tap(kernels_, weight_.data() + panels_.offset(p), panels_, p, t, phase, weight, depth_);
      }
    });
  }

  // The input of the block's first output and first tap.
  const float* inputs(const Block& block, float* memory) const {
    const int64_t row = block.rows.begin * pixels_.h.step + pixels_.h.offset[0];
    const int64_t column = block.columns.begin * pixels_.w.step + pixels_.w.offset[0];
    if (source_.in_place) return reinterpret_cast<const float*>(pixels_.x.at(block.image, row, column));
    Band band = source_.band;
    band.first_row = row, band.first_column = column;
    band.rows = source_.rows_under(pixels_.h, block.rows.size());
    load_band(kernels_, memory, band, pixels_.x, block.image, pixels_.h.inputs, pixels_.w.inputs, depth_);
    return memory;
  }

  // What a block reads of x, row by row: fetched during the task before it, as many lines in each call of a tile.
  Prefetch fetching(const Block& block) const {
    const auto under = [](const GatherAxis& axis, Range outputs) {
      return Range{std::max<int64_t>(0, outputs.begin * axis.step + axis.offset[0]),
                   std::min(axis.inputs, (outputs.end - 1) * axis.step + axis.offset[0] + span(axis) + 1)};
    };
    const Images& x = pixels_.x;
    const Range rows = under(pixels_.h, {block.rows.begin, block.rows.begin + blocks_.rows});
    const Range columns = under(pixels_.w, block.columns);
    return Prefetch(x.at(block.image, rows.begin, columns.begin), rows.size(), x.h * size_of(x.dtype),
                    ((columns.size() - 1) * x.w + depth_) * size_of(x.dtype));
  }

  // share: which panels.
  void multiply(const Block& block, const float* a, int64_t share, Prefetch& next) const {
    const int64_t calls = blocks_.rows * ceil_div(blocks_.columns, strip_) * panels_.count();
    const int64_t next_lines = ceil_div(next.lines(), calls), strips = ceil_div(block.columns.size(), strip_);
    const int64_t first = panels_.count() * share / blocks_.shares;
    const int64_t last = panels_.count() * (share + 1) / blocks_.shares;
    for (int64_t p = first; p < last; p++) {
      for (int64_t q = block.rows.begin; q < block.rows.end; q++) {
        for (int64_t i = 0; i < strips; i++) {
          next.fetch(next_lines);
          multiply_strip(block, a, p, q, Range{0, block.columns.size()}.part(i, strips));
        }
      }
    }
  }

  // Row q of outputs, the strip's columns of the block, panel p.
  void multiply_strip(const Block& block, const float* a, int64_t p, int64_t q, Range strip) const {
    const GatherAxis &h = pixels_.h, &w = pixels_.w;
    const MutableImages& y = pixels_.y;
    const int64_t taps_w = w.tap.size();
    const int64_t a_row = source_.in_place ? h.step * pixels_.x.h / kernels_.pair : source_.band.row() * source_.step_h;
    const int64_t a_pixel = source_.in_place ? w.step * pixels_.x.w / kernels_.pair : source_.pixel * source_.step_w;
    const Range taps = inside(h, q);
    GemmTile tile{};
    tile.a = a + (q - block.rows.begin) * a_row + strip.begin * a_pixel;
    tile.a_row = a_pixel;
    tile.tap_offset = tap_offset_.data() + taps.begin * runs_;
    tile.taps = taps.size() * runs_;
    tile.b = weight_.data() + panels_.offset(p) + taps.begin * taps_w * panels_.units * panels_.stored(p);
    tile.depth = panels_.units * taps_w / runs_;
    tile.bias = bias_.empty() ? nullptr : bias_.data() + p * panels_.panel;
    tile.c = y.at(block.image, h.first + q * h.spacing, w.first + (block.columns.begin + strip.begin) * w.spacing) +
             p * panels_.panel * size_of(y.dtype);
    tile.c_row = y.w * w.spacing;
    tile.rows = strip.size();
    tile.columns = panels_.valid(p);
    kernels_.gemm(tile, y.dtype);
  }

  const Kernels& kernels_;
  const Pixels& pixels_;
  const int64_t depth_;
  const Panels panels_;
  Source source_;
  const Blocks blocks_;
  const std::vector<float> bias_;
  const Buffer weight_;
  int64_t runs_, strip_;             // runs of adjacent taps in a row of them; pixels of one call of a tile
  std::vector<int64_t> tap_offset_;  // [taps_h, runs]
};

}  // namespace

void implicit_gemm(const GatherProblem& problem, const Phase& phase) {
  Pixels pixels{problem.batch, phase.h, phase.w, problem.x, problem.y};
  pixels.flatten();
  Product(problem, phase, pixels).compute();
}

}  // namespace gradaug::cpu
