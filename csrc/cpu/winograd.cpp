// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(m x m, 3 x 3), as in Lavin & Gray, "Fast algorithms
// for convolutional neural networks", CVPR 2016. For a tile d of n x n inputs, n = m + 2, which overlaps its neighbours
// by two pixels, and its m x m outputs Y:
//
//   Y  = A^T [(G g G^T) . (B^T d B)] A                forward; the input gradient is one of a flipped kernel
//   dg = G^T [sum of (A dY A^T) . (B^T d B)] G        weight gradient
//
// The products at the n x n places of a tile are matrix products over channels, or over tiles for the gradient, on the
// tiles of kernels.h: 16 multiplications instead of 36 for m = 2, 36 instead of 144 for m = 4. They are float32, for
// 16-bit images too: the transformed values would not stand another rounding to 8 bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "panels.h"
#include "partial_sums.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kInputUnits = 160 * 1024;      // transformed inputs of a block: most of a second-level cache
constexpr int64_t kSharedUnits = 4096 * 1024;    // what may be transformed at once: most of a third-level cache
constexpr int64_t kGradientUnits = 1024 * 1024;  // both operands of a block of the weight gradient, for all threads
constexpr int64_t kOuterTiles = 128;             // tiles whose panel of inputs stays in the first-level cache
constexpr int64_t kPackedDepth = 64;             // channels of the weight that are transformed at a time
constexpr int64_t kShortChunk = 32;              // most of the large tiles' error is that of sums in float32
// Times, in float32 multiplications of the matrix products:
constexpr double kOnce = 30;       // of transforming one place of a weight
constexpr double kInput = 4;       // of transforming one place of a tile of one channel of the inputs,
constexpr double kOutput = 20;     // and of the outputs
constexpr double kOfGradient = 8;  // and of either for the weight gradient
// bfloat16 products of the direct kernels in the time of one:
constexpr double kPairs = 2.3;  // 2.2 on Zen 4, 2.5 on Zen 5
constexpr double kPairsOfGradient = 2;

constexpr int kMaxInputs = 36, kMaxOutputs = 16;  // of a tile

// The length of a sum in registers: float32's error is nothing beside the rounding of 16-bit images.
int64_t chunk(const Image& image) { return image.dtype == Dtype::f32 ? kShortChunk : INT64_MAX; }

// Tiles of m x m outputs of a batch, in the order of images, rows and columns.
struct Tiles {
  int64_t m, batch, height, width;  // of the outputs
  int64_t down() const { return ceil_div(height, m); }
  int64_t across() const { return ceil_div(width, m); }
  int64_t count() const { return batch * down() * across(); }
  int64_t image(int64_t t) const { return t / (down() * across()); }
  int64_t row(int64_t t) const { return t / across() % down() * m; }
  int64_t column(int64_t t) const { return t % across() * m; }
};

// The size x size pixels from (row, column) of image n; `outside` for those that are none.
void pixels_of(const Image& image, int64_t n, int64_t row, int64_t column, int64_t height, int64_t width, int size,
               const void* outside, const void** pixels) {
  for (int i = 0; i < size; i++) {
    for (int j = 0; j < size; j++, pixels++) {
      const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
      *pixels = inside ? image.at(n, row + i, column + j) : outside;
    }
  }
}

// The kernels that multiply floats, where `direct` may multiply pairs.
const Kernels& of_floats(const Kernels& direct) { return direct.pair == 1 ? direct : *avx512_kernels(); }

// Whether three taps read three neighbours, for adjacent outputs.
bool is_dense(const GatherAxis& axis) {
  return axis.tap.size() == 3 && axis.step == 1 && axis.first == 0 && axis.spacing == 1 &&
         axis.offset[1] == axis.offset[0] + 1 && axis.offset[2] == axis.offset[0] + 2;
}

// The tiles that take the least time, estimated in multiplications; null where the definition takes less.
// transforms: what the transforms of a tile take beside its products, which take 1; pairs: products that the definition
// makes in that time.
const WinogradKernels* choose(const Kernels& kernels, double pairs, int64_t batch, int64_t height, int64_t width,
                              double transforms, bool large_tiles) {
  const WinogradKernels* best = nullptr;
  double least = 0.9 * 9 * batch * height * width / pairs;
  for (const WinogradKernels* tile : kernels.winograd) {
    if (tile->outputs > 2 && !large_tiles) continue;
    const Tiles tiles{tile->outputs, batch, height, width};
    const double time = tile->inputs * tile->inputs * (tiles.count() * (1 + transforms) + kOnce);
    if (time < least) least = time, best = tile;
  }
  return best;
}

// A convolution as matrix products [tiles, depth] x [depth, columns], one for each place, in three steps.
class Conv {
 public:
  Conv(const Kernels& kernels, const WinogradKernels& winograd, const Tiles& tiles, const GatherAxis& h,
       const GatherAxis& w, const Image& x, int64_t depth, const Weight& weight, const float* bias, const Image& y,
       int64_t columns)
      : pixel(round_up(depth, kernels.lanes) + kernels.lanes),
        places(winograd.inputs * winograd.inputs),
        panels{places, depth, columns, kernels.panel, kernels.lanes},
        kernels_(kernels),
        winograd_(winograd),
        tiles_(tiles),
        h_(h),
        w_(w),
        x_(x),
        weight_(weight),
        y_(y),
        zeros_(depth),
        bias_(bias ? panels.count() * panels.panel : 0) {
    if (bias) std::copy(bias, bias + columns, bias_.begin());
  }

  const int64_t pixel, places;  // units from a tile's inputs to the next tile's
  const Panels panels;

  // The places of a tile, a multiple of 4 KiB apart, would share one set of the first-level cache.
  int64_t place_of_inputs(int64_t count) const { return count * pixel + kernels_.lanes; }
  int64_t place_of_outputs(int64_t count) const { return count * panels.panel + kernels_.lanes; }

  // dst [place, channels, panel] of panel p, whose places are panels.units apart: channels from k on
  void transform_weight(float* dst, int64_t p, int64_t k, int64_t channels) const {
    const int64_t stored = panels.stored(p);
    std::vector<float> taps(9 * kPackedDepth * stored);
    for (const int64_t end = k + channels; k < end; k += kPackedDepth) {
      const int64_t some = std::min(kPackedDepth, end - k);
      for (int64_t t = 0; t < 9; t++) {
        kernels_.pack_panel(taps.data() + t * some * stored, stored,
                            weight_.at(h_.tap[t / 3], w_.tap[t % 3], k, p * panels.panel), weight_.dtype, some,
                            panels.valid(p), weight_.depth, weight_.column);
      }
      winograd_.weight(dst + k * stored, panels.units * stored, taps.data(), some * stored, some * stored);
    }
  }

  // dst [place, tile, depth]: tile t
  void transform_inputs(float* dst, int64_t place, int64_t t) const {
    const void* pixels[kMaxInputs];
    pixels_of(x_, tiles_.image(t), tiles_.row(t) + h_.offset[0], tiles_.column(t) + w_.offset[0], h_.inputs, w_.inputs,
              winograd_.inputs, zeros_.data(), pixels);
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
      tile.b = weight + e * panels.units * stored;
      tile.depth = panels.units;
      if (winograd_.outputs > 2) tile.chunk = chunk(x_);
      tile.c = outputs + e * output_place;
      tile.c_row = panels.panel;
      tile.rows = count;
      tile.columns = stored;
      kernels_.gemm(tile, Dtype::f32);
    }
    const int m = winograd_.outputs;
    for (int64_t t = first; t < first + count; t++, outputs += panels.panel) {
      const void* pixels[kMaxOutputs];
      pixels_of(y_, tiles_.image(t), tiles_.row(t), tiles_.column(t), h_.outputs, w_.outputs, m, nullptr, pixels);
      void* to[kMaxOutputs];
      for (int i = 0; i < m * m; i++) {
        char* pixel = static_cast<char*>(const_cast<void*>(pixels[i]));
        to[i] = pixel ? pixel + p * panels.panel * size_of(y_.dtype) : nullptr;
      }
      winograd_.output_tile(to, y_.dtype, outputs, output_place, bias_.empty() ? nullptr : &bias_[p * panels.panel],
                            panels.valid(p));
    }
  }

 private:
  const Kernels& kernels_;
  const WinogradKernels& winograd_;
  const Tiles tiles_;
  const GatherAxis &h_, &w_;
  const Image x_;
  const Weight weight_;
  const Image y_;
  std::vector<float> zeros_, bias_;
};

// 1. the weight is transformed once;
// 2. a task takes a block of tiles and transforms their inputs, which stay in the second-level cache;
// 3. panel by panel it multiplies and transforms the outputs.
void tiles_by_blocks(const Conv& conv, const Tiles& tiles) {
  const Panels& panels = conv.panels;
  const Buffer packed(panels.size());
  const int64_t chunks = ceil_div(panels.units, kPackedDepth);
  at::parallel_for(0, panels.count() * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t p = i / chunks, k = i % chunks * kPackedDepth;
      conv.transform_weight(packed.data() + panels.offset(p), p, k, std::min(kPackedDepth, panels.units - k));
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
        conv.multiply(packed.data() + panels.offset(p), p, inputs.data(), place, outputs.data(), first, count);
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
    const Buffer weight(conv.places * panels.units * panels.panel);
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

// The weight gradient of some output channels and tiles, which one thread sums without the others:
// 1. it transforms a block of tiles, inputs in panels of 32 channels and output gradients in groups;
// 2. for some output and some input channels it adds, place by place, the products over the block's tiles to their sums
//    [place, out, in];
// 3. after the last block it transforms these back and adds them to the gradient.
class GradientSum {
 public:
  GradientSum(const Kernels& kernels, const WinogradKernels& winograd, const Tiles& tiles, const ConvAxis& h,
              const ConvAxis& w, const Image& dy, Range out, const Image& x, int64_t in, const WeightGrad& dweight)
      : kernels_(kernels),
        winograd_(winograd),
        tiles_(tiles),
        h_(h),
        w_(w),
        dy_(dy),
        x_(x),
        out_(out),
        in_(in),
        dweight_(dweight),
        places_(winograd.inputs * winograd.inputs),
        zeros_(std::max(in, out.end)) {
    // A group of channels is about a square, whose sums stay in the second-level cache while one block is added.
    const int64_t panel = kernels.panel, square = kInputUnits / places_, outs = out.size();
    panels_ = ceil_div(in, panel);
    const int64_t in_side = std::clamp<int64_t>(std::sqrt(square) / panel, 1, panels_);
    in_group_ = ceil_div(panels_, ceil_div(panels_, in_side)) * panel;
    const int64_t out_side = std::clamp<int64_t>(square / in_group_, std::min<int64_t>(outs, kernels.max_rows), outs);
    out_group_ = ceil_div(outs, ceil_div(outs, out_side));
    out_pitch_ = round_up(out_group_, kernels.lanes);
  }

  // parts: sums that are made at the same time and share the caches.
  void add(Range tiles, int64_t parts) {
    // One block of all tiles makes the sums small; where its operands are smaller than all sums would be, it is the
    // best.
    const int64_t tile_units = places_ * (panels_ * kernels_.panel + out_groups() * out_pitch_);
    int64_t block = tiles.size();
    if (block * tile_units > std::max(kSharedUnits / parts, places_ * out_.size() * in_)) {
      block = std::clamp<int64_t>(kGradientUnits / parts / tile_units, 128, 256);
    }
    block = ceil_div(tiles.size(), ceil_div(tiles.size(), block));
    x_panel_ = block * kernels_.panel, x_place_ = panels_ * x_panel_ + kernels_.lanes;
    dy_group_ = block * out_pitch_, dy_place_ = out_groups() * dy_group_ + kernels_.lanes;
    const Buffer inputs(places_ * x_place_), gradients(places_ * dy_place_);
    const bool one_block = block == tiles.size();
    const int64_t group_units = places_ * out_group_ * in_group_;
    const Buffer sums((one_block ? 1 : out_groups() * in_groups()) * group_units);
    for (int64_t first = tiles.begin; first < tiles.end; first += block) {
      const Range some{first, std::min(tiles.end, first + block)};
      transform(some, inputs.data(), gradients.data());
      float* sum = sums.data();
      for (int64_t og = 0; og < out_groups(); og++) {
        for (int64_t ig = 0; ig < in_groups(); ig++, sum += one_block ? 0 : group_units) {
          if (first == tiles.begin) std::memset(sum, 0, group_units * sizeof(float));
          multiply(sum, some.size(), inputs.data(), gradients.data(), og, ig);
          if (some.end == tiles.end) transform_back(sum, og, ig);
        }
      }
    }
  }

 private:
  int64_t out_groups() const { return ceil_div(out_.size(), out_group_); }
  int64_t in_groups() const { return ceil_div(in_, in_group_); }
  int64_t outs(int64_t og) const { return std::min(out_group_, out_.size() - og * out_group_); }
  int64_t ins(int64_t ig) const { return std::min(in_group_, in_ - ig * in_group_); }

  // inputs [place, panel, tile, channel], gradients [place, group, tile, channel]
  void transform(Range tiles, float* inputs, float* gradients) const {
    const int m = winograd_.outputs;
    for (int64_t t = tiles.begin; t < tiles.end; t++, inputs += kernels_.panel, gradients += out_pitch_) {
      const int64_t image = tiles_.image(t), row = tiles_.row(t), column = tiles_.column(t);
      const void* pixels[kMaxInputs];
      pixels_of(x_, image, row - h_.padding, column - w_.padding, h_.inputs, w_.inputs, winograd_.inputs, zeros_.data(),
                pixels);
      winograd_.input_tile(inputs, x_place_, kernels_.panel, x_panel_, pixels, x_.dtype, in_);
      pixels_of(dy_, image, row, column, h_.outputs, w_.outputs, m, zeros_.data(), pixels);
      for (int64_t og = 0; og < out_groups(); og++) {
        const int64_t skipped = (out_.begin + og * out_group_) * size_of(dy_.dtype);
        const void* of_group[kMaxOutputs];
        for (int i = 0; i < m * m; i++) of_group[i] = static_cast<const char*>(pixels[i]) + skipped;
        winograd_.gradient_tile(gradients + og * dy_group_, dy_place_, of_group, dy_.dtype, outs(og));
      }
    }
  }

  void multiply(float* sum, int64_t tiles, const float* inputs, const float* gradients, int64_t og, int64_t ig) const {
    const int64_t panel = kernels_.panel;
    for (int64_t place = 0; place < places_; place++) {
      for (int64_t i = 0; i < ins(ig); i += panel) {
        for (int64_t t = 0; t < tiles; t += kOuterTiles) {
          OuterTile tile{};
          tile.a = gradients + place * dy_place_ + og * dy_group_ + t * out_pitch_;
          tile.b = inputs + place * x_place_ + (ig * in_group_ + i) / panel * x_panel_ + t * panel;
          tile.images = tile.rows = 1, tile.pixels = std::min(kOuterTiles, tiles - t), tile.chunk = chunk(x_);
          tile.a_pixel = out_pitch_, tile.b_pixel = panel;
          tile.c = sum + place * out_group_ * in_group_ + i;
          tile.c_row = in_group_;
          tile.channels = outs(og);
          tile.columns = std::min(panel, ins(ig) - i);
          kernels_.outer(tile);
        }
      }
    }
  }

  void transform_back(const float* sum, int64_t og, int64_t ig) const {
    for (int64_t o = 0; o < outs(og); o++) {
      float* taps[9];
      for (int t = 0; t < 9; t++) {
        taps[t] = dweight_.data + (out_.begin + og * out_group_ + o) * dweight_.out + t / 3 * dweight_.h +
                  t % 3 * dweight_.w + ig * in_group_;
      }
      winograd_.add_weight_grad(taps, sum + o * in_group_, out_group_ * in_group_, ins(ig));
    }
  }

  const Kernels& kernels_;
  const WinogradKernels& winograd_;
  const Tiles tiles_;
  const ConvAxis &h_, &w_;
  const Image dy_, x_;
  const Range out_;
  const int64_t in_;
  const WeightGrad dweight_;
  const int64_t places_;
  const std::vector<float> zeros_;
  int64_t panels_, in_group_, out_group_, out_pitch_;
  int64_t x_panel_ = 0, x_place_ = 0, dy_group_ = 0, dy_place_ = 0;  // strides
};

// Into how many parts the threads divide the output channels and the tiles. Each part of the channels transforms all
// inputs, and each part of the tiles transforms all sums back.
std::pair<int64_t, int64_t> divide(int64_t tiles, int64_t out, int64_t max_rows) {
  const int64_t threads = at::get_num_threads();
  std::pair<int64_t, int64_t> best{1, 1};
  double least = 0;
  for (int64_t outs = 1; outs <= std::min(threads, ceil_div(out, 2 * max_rows)); outs++) {
    const int64_t parts = std::clamp<int64_t>(threads / outs, 1, ceil_div(tiles, kOuterTiles));
    const double time = (tiles * (1 + 8. * outs / out) + kOnce * parts) / (outs * parts);
    if (least == 0 || time < least) least = time, best = {outs, parts};
  }
  return best;
}

}  // namespace

bool winograd_conv(const Kernels& direct, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                   int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns) {
  const Kernels& kernels = of_floats(direct);
  if (!is_dense(h) || !is_dense(w) || std::min(depth, columns) < kernels.lanes) return false;
  // The large tiles lose two bits, which shorter sums win back from some hundred channels on.
  const bool large_tiles = x.dtype != Dtype::f32 || depth >= 96;
  const double transforms = kInput / columns + kOutput / depth, pairs = direct.pair == 1 ? 1 : kPairs;
  const WinogradKernels* winograd = choose(kernels, pairs, batch, h.outputs, w.outputs, transforms, large_tiles);
  if (!winograd) return false;
  const Tiles tiles{winograd->outputs, batch, h.outputs, w.outputs};
  const Conv conv(kernels, *winograd, tiles, h, w, x, depth, weight, bias, y, columns);
  const bool by_panels = tiles.count() < columns && conv.places * tiles.count() * conv.pixel <= kSharedUnits;
  (by_panels ? tiles_by_panels : tiles_by_blocks)(conv, tiles);
  return true;
}

bool winograd_weight_grad(const Kernels& direct, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                          int64_t out, const Image& x, int64_t in, const WeightGrad& dweight) {
  for (const ConvAxis* axis : {&h, &w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) return false;
  }
  const Kernels& kernels = of_floats(direct);
  if (dweight.in != 1 || std::min(in, out) < kernels.lanes) return false;
  const bool large_tiles = x.dtype != Dtype::f32;
  const double transforms = kOfGradient / in + kOfGradient / out, pairs = direct.pair == 1 ? 1 : kPairsOfGradient;
  const WinogradKernels* winograd = choose(kernels, pairs, batch, h.outputs, w.outputs, transforms, large_tiles);
  if (!winograd) return false;
  const Tiles tiles{winograd->outputs, batch, h.outputs, w.outputs};
  const auto [out_parts, tile_parts] = divide(tiles.count(), out, kernels.max_rows);
  const int64_t parts = out_parts * tile_parts;
  const PartialSums sums(tile_parts, h.kernel, w.kernel, out, in, dweight);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range channels = Range{0, out}.part(i % out_parts, out_parts);
      GradientSum sum(kernels, *winograd, tiles, h, w, dy, channels, x, in, sums.of(i / out_parts, channels));
      sum.add(Range{0, tiles.count()}.part(i / out_parts, tile_parts), parts);
    }
  });
  sums.add();
  return true;
}

}  // namespace gradaug::cpu
