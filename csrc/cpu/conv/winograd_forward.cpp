// Forward and input gradient by Winograd's algorithm (winograd.h), the latter as one of a flipped kernel.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv/packed_panels.h"
#include "cpu/conv/paths.h"
#include "cpu/conv/winograd.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kInputUnits = 160 * 1024;    // transformed inputs of a block: most of a second-level cache
constexpr int64_t kSharedUnits = 4096 * 1024;  // what may be transformed at once: most of a third-level cache
constexpr int64_t kPackedDepth = 64;           // channels of the weight that are transformed at a time

// A convolution as matrix products [tiles, depth] x [depth, columns], one for each place, in three steps.
class Conv {
 public:
  Conv(const GatherProblem& problem, const Phase& phase, const WinogradKernels& winograd, const Tiles& tiles)
      : pixel(round_up(problem.depth(), problem.float_kernels->lanes) + problem.float_kernels->lanes),
        places(winograd.inputs * winograd.inputs),
        panels{places, problem.depth(), problem.channels(), problem.float_kernels->panel, problem.float_kernels->lanes},
        kernels_(*problem.float_kernels),
        winograd_(winograd),
        tiles_(tiles),
        h_(phase.h),
        w_(phase.w),
        x_(problem.x),
        weight_(problem.matrices()),
        y_(problem.y),
        zeros_(problem.depth() * size_of(problem.x.dtype)),
        bias_(padded_bias(problem.bias, panels)) {}

  const int64_t pixel, places;  // units from a tile's inputs to the next tile's
  const Panels panels;

  // From place to place. Places a multiple of 4 KiB apart would share one set of the first-level cache, and often one
  // of the second.
  int64_t place_of_inputs(int64_t count) const { return count * pixel + kernels_.lanes; }
  int64_t place_of_outputs(int64_t count) const { return count * panels.panel + kernels_.lanes; }
  int64_t place_of_weight(int64_t p) const { return panels.units * panels.stored(p) + kernels_.lanes; }
  int64_t panel_of_weight() const { return places * place_of_weight(0); }

  // dst [place, channels, panel] of panel p: channels from k on
  void transform_weight(float* dst, int64_t p, int64_t k, int64_t channels) const {
    const int64_t stored = panels.stored(p);
    const Buffer taps(9 * kPackedDepth * stored);
    for (const int64_t end = k + channels; k < end; k += kPackedDepth) {
      const int64_t some = std::min(kPackedDepth, end - k);
      for (int64_t t = 0; t < 9; t++) {
        kernels_.pack_panel(taps.data() + t * some * stored, stored,
                            weight_.at(h_.tap[t / 3], w_.tap[t % 3], k, p * panels.panel), weight_.dtype, some,
                            panels.valid(p), weight_.depth, weight_.column);
      }
      winograd_.weight(dst + k * stored, place_of_weight(p), taps.data(), some * stored, some * stored);
    }
  }

  // dst [place, tile, depth]: tile t
  void transform_inputs(float* dst, int64_t place, int64_t t) const {
    const void* pixels[kMaxTileInputs];
    pixels_of(x_, tiles_.image(t), tiles_.row(t) + h_.offset[0], tiles_.column(t) + w_.offset[0], h_.inputs, w_.inputs,
              winograd_.inputs, outside_, pixels);
    winograd_.input_tile(dst, place, kernels_.lanes, kernels_.lanes, pixels, x_.dtype, panels.units);
  }

  // The outputs of `count` tiles from `first` on, panel p. inputs: of the first of them; outputs: memory for the sums.
  void multiply(const float* weight, int64_t p, const float* inputs, int64_t place, float* outputs, int64_t first,
                int64_t count) const {
    const int64_t output_place = place_of_outputs(count), stored = panels.stored(p), no_tap = 0;
    for (int64_t e = 0; e < places; e++) {
      GemmTile tile{};
      tile.a = inputs + e * place;
      tile.a_row = pixel;
      tile.tap_offset = &no_tap;
      tile.taps = 1;
      tile.b = weight + e * place_of_weight(p);
      tile.depth = panels.units;
      if (winograd_.outputs > 2) tile.chunk = chunk(x_.dtype);
      tile.c = outputs + e * output_place;
      tile.c_row = panels.panel;
      tile.rows = count;
      tile.columns = stored;
      kernels_.gemm(tile, Dtype::f32);
    }
    const int m = winograd_.outputs;
    for (int64_t t = first; t < first + count; t++, outputs += panels.panel) {
      void *pixels[kMaxTileOutputs], *none = nullptr;
      pixels_of(y_, tiles_.image(t), tiles_.row(t), tiles_.column(t), h_.outputs, w_.outputs, m, none, pixels);
      for (int i = 0; i < m * m; i++) {
        if (pixels[i]) pixels[i] = static_cast<char*>(pixels[i]) + p * panels.panel * size_of(y_.dtype);
      }
      winograd_.output_tile(pixels, y_.dtype, outputs, output_place, bias_.empty() ? nullptr : &bias_[p * panels.panel],
                            panels.valid(p));
    }
  }

 private:
  const Kernels& kernels_;
  const WinogradKernels& winograd_;
  const Tiles tiles_;
  const GatherAxis &h_, &w_;
  const Images x_;
  const WeightMatrices weight_;
  const MutableImages y_;
  const std::vector<char> zeros_;
  const void* const outside_ = zeros_.data();  // a pixel that is outside of the image
  const std::vector<float> bias_;
};

// 1. the weight is transformed once;
// 2. a task takes a block of tiles and transforms their inputs, which stay in the second-level cache;
// 3. panel by panel it multiplies and transforms the outputs.
void tiles_by_blocks(const Conv& conv, const Tiles& tiles) {
  const Panels& panels = conv.panels;
  const Buffer packed(panels.count() * conv.panel_of_weight());
  const int64_t chunks = ceil_div(panels.units, kPackedDepth);
  at::parallel_for(0, panels.count() * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t p = i / chunks, k = i % chunks * kPackedDepth;
      conv.transform_weight(packed.data() + p * conv.panel_of_weight(), p, k, std::min(kPackedDepth, panels.units - k));
    }
  });
  const int64_t threads = at::get_num_threads();
  int64_t block = std::clamp<int64_t>(kInputUnits / (conv.places * conv.pixel), 24, 128);
  block = std::min(block, ceil_div(tiles.count(), 2 * threads));
  block = ceil_div(tiles.count(), ceil_div(tiles.count(), block));
  const int64_t blocks = ceil_div(tiles.count(), block), place = conv.place_of_inputs(block);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer inputs(conv.places * place), outputs(conv.places * conv.place_of_outputs(block));
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * block, count = std::min(block, tiles.count() - first);
      for (int64_t t = 0; t < count; t++) conv.transform_inputs(inputs.data() + t * conv.pixel, place, first + t);
      for (int64_t p = 0; p < panels.count(); p++) {
        conv.multiply(packed.data() + p * conv.panel_of_weight(), p, inputs.data(), place, outputs.data(), first,
                      count);
      }
    }
  });
}

// For a weight larger than the inputs, which leaves the caches when it is transformed as a whole:
// 1. all inputs are transformed;
// 2. a task takes a panel of the weight, transforms it, multiplies all tiles with it and transforms the outputs.
void tiles_by_panels(const Conv& conv, const Tiles& tiles) {
  const Panels& panels = conv.panels;
  const int64_t place = conv.place_of_inputs(tiles.count());
  const Buffer inputs(conv.places * place);
  at::parallel_for(0, tiles.count(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) conv.transform_inputs(inputs.data() + t * conv.pixel, place, t);
  });
  const int64_t block = ceil_div(tiles.count(), ceil_div(tiles.count(), 64));
  at::parallel_for(0, panels.count(), 1, [&](int64_t begin, int64_t end) {
    const Buffer weight(conv.panel_of_weight());
    const Buffer outputs(conv.places * conv.place_of_outputs(block));
    for (int64_t p = begin; p < end; p++) {
      conv.transform_weight(weight.data(), p, 0, panels.units);
      for (int64_t first = 0; first < tiles.count(); first += block) {
        conv.multiply(weight.data(), p, inputs.data() + first * conv.pixel, place, outputs.data(), first,
                      std::min(block, tiles.count() - first));
      }
    }
  });
}

}  // namespace

void winograd_forward(const GatherProblem& problem, const Phase& phase, const WinogradKernels& winograd) {
  const Tiles tiles{winograd.outputs, problem.batch, phase.h.outputs, phase.w.outputs};
  const Conv conv(problem, phase, winograd, tiles);
  const bool by_panels =
      tiles.count() < conv.panels.columns && conv.places * tiles.count() * conv.pixel <= kSharedUnits;
  (by_panels ? tiles_by_panels : tiles_by_blocks)(conv, tiles);
}

}  // namespace gradaug::cpu
