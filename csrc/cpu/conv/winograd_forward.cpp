// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(m x m, 3 x 3), as in Lavin & Gray, "Fast algorithms
// for convolutional neural networks", CVPR 2016. For a tile d of n x n inputs, n = m + 2, which overlaps its neighbours
// by two pixels, and its m x m outputs Y:
//
//   Y  = A^T [(G g G^T) . (B^T d B)] A                forward; the input gradient is one of a flipped kernel
//   dg = G^T [sum of (A dY A^T) . (B^T d B)] G        weight gradient
//
// The products at the n x n places of a tile are matrix products over channels, or over tiles for the gradient, on the
// tiles of microkernels/table.h: 16 multiplications instead of 36 for m = 2, 36 instead of 144 for m = 4. They are
// float32, for 16-bit images too: the transformed values would not stand another rounding to 8 bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/conv/packed_panels.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kInputUnits = 160 * 1024;      // transformed inputs of a block: most of a second-level cache
constexpr int64_t kSharedUnits = 4096 * 1024;    // what may be transformed at once: most of a third-level cache
constexpr int64_t kGradientUnits = 1024 * 1024;  // both operands of a block of the weight gradient
constexpr int64_t kOuterTiles = 128;             // tiles whose panel of inputs stays in the first-level cache
constexpr int64_t kPackedDepth = 64;             // channels of the weight that are transformed at a time
constexpr int64_t kShortChunk = 32;              // most of the large tiles' error is that of sums in float32
constexpr int64_t kMinDepth = 58;                // channels for large tiles: up to 1.9 times PyTorch's error
// Times, in float32 multiplications of the matrix products:
constexpr double kOnce = 30;        // of transforming one place of a weight
constexpr double kInput = 4;        // of transforming one place of a tile of one channel of the inputs,
constexpr double kOutput = 20;      // and of the outputs
constexpr double kOfGradient = 18;  // and of either for the weight gradient
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
  double least = 0.95 * 9 * batch * height * width / pairs;
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
      tile.b = weight + e * place_of_weight(p);
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

// The weight gradient, step by step for all threads:
// 1. a block of tiles is transformed, inputs in panels of 32 channels and output gradients in groups of channels;
// 2. a task takes a place and a group of output channels and adds their products over the block's tiles to the sums
//    [place, out, in];
// 3. after the last block the sums are transformed back and added to the gradient.
// Where one block holds all tiles, a task takes all places of a group of output and of input channels instead: their
// sums stay in the second-level cache and are transformed back at once.
class WinogradWeightGrad {
 public:
  WinogradWeightGrad(const Kernels& kernels, const WinogradKernels& winograd, const Tiles& tiles, const ConvAxis& h,
                     const ConvAxis& w, const Image& dy, int64_t out, const Image& x, int64_t in,
                     const WeightGrad& dweight)
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
        zeros_(std::max(in, out)) {
    // A group of output and input channels is about a square. Its rows of output gradients have nothing between them,
    // as what is transformed should stay in the third-level cache.
    const int64_t panel = kernels.panel, square = kInputUnits / places_;
    panels_ = ceil_div(in, panel);
    const int64_t in_side = std::clamp<int64_t>(std::sqrt(square) / panel, 1, panels_);
    in_group_ = ceil_div(panels_, ceil_div(panels_, in_side)) * panel;
    const int64_t out_side = std::clamp<int64_t>(square / in_group_, std::min<int64_t>(out, kernels.max_rows), out);
    out_pitch_ = round_up(ceil_div(out, ceil_div(out, out_side)), kernels.lanes);
    out_group_ = std::min(out, out_pitch_);
    // One block of all tiles spares the sums the way to memory and back: worth twice a block's size, or that of all
    // sums.
    const int64_t tile_units = places_ * (panels_ * panel + out_groups() * out_pitch_);
    block_ = tiles.count();
    if (block_ * tile_units > std::max(2 * kGradientUnits, places_ * out * in)) {
      block_ = std::clamp<int64_t>(kGradientUnits / tile_units, 128, 512);
    }
    block_ = ceil_div(tiles.count(), ceil_div(tiles.count(), block_));
    x_panel_ = block_ * panel, x_place_ = panels_ * x_panel_ + kernels.lanes;
    dy_group_ = block_ * out_pitch_, dy_place_ = out_groups() * dy_group_ + kernels.lanes;
  }

  void add() const {
    const Buffer inputs(places_ * x_place_), gradients(places_ * dy_place_);
    const Operands operands{inputs.data(), gradients.data()};
    if (block_ == tiles_.count() && out_groups() * in_groups() >= 2 * at::get_num_threads()) {
      return add_groups(operands);
    }
    const int64_t place = place_of_sums(out_ * in_);
    const Buffer memory(places_ * place);
    const Sums sums{memory.data(), place, in_};
    for (int64_t first = 0; first < tiles_.count(); first += block_) {
      const int64_t count = std::min(block_, tiles_.count() - first);
      transform({first, first + count}, operands);
      at::parallel_for(0, places_ * out_groups(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t place = i / out_groups(), og = i % out_groups();
          float* sum = sums.data + place * sums.place + og * out_group_ * sums.row;
          if (first == 0) std::memset(sum, 0, outs(og).size() * in_ * sizeof(float));
          multiply(sum, sums.row, place, count, operands, og, {0, in_});
        }
      });
    }
    at::parallel_for(0, out_, 4, [&](int64_t begin, int64_t end) {
      transform_back({sums.data + begin * in_, sums.place, sums.row}, {begin, end}, {0, in_});
    });
  }

 private:
  struct Operands {
    float *inputs, *gradients;  // [place, panel, tile, channel], [place, group, tile, channel]
  };
  struct Sums {
    float* data;  // [place, out, in]
    int64_t place, row;
  };

  int64_t place_of_sums(int64_t channels) const { return round_up(channels, kernels_.lanes) + kernels_.lanes; }
  int64_t out_groups() const { return ceil_div(out_, out_group_); }
  int64_t in_groups() const { return ceil_div(in_, in_group_); }
  Range outs(int64_t og) const { return {og * out_group_, std::min(out_, (og + 1) * out_group_)}; }
  Range ins(int64_t ig) const { return {ig * in_group_, std::min(in_, (ig + 1) * in_group_)}; }

  void add_groups(const Operands& operands) const {
    transform({0, tiles_.count()}, operands);
    at::parallel_for(0, out_groups() * in_groups(), 1, [&](int64_t begin, int64_t end) {
      const int64_t place = place_of_sums(out_group_ * in_group_);
      const Buffer memory(places_ * place);
      const Sums sums{memory.data(), place, in_group_};
      for (int64_t i = begin; i < end; i++) {
        const int64_t og = i / in_groups();
        const Range of_group = ins(i % in_groups());
        std::memset(sums.data, 0, places_ * place * sizeof(float));
        for (int64_t p = 0; p < places_; p++) {
          multiply(sums.data + p * place, sums.row, p, tiles_.count(), operands, og, of_group);
        }
        transform_back(sums, outs(og), of_group);
      }
    });
  }

  void transform(Range tiles, const Operands& to) const {
    at::parallel_for(0, tiles.size(), 4, [&](int64_t begin, int64_t end) {
      const int m = winograd_.outputs;
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = tiles.begin + i, image = tiles_.image(t), row = tiles_.row(t), column = tiles_.column(t);
        const void* pixels[kMaxInputs];
        pixels_of(x_, image, row - h_.padding, column - w_.padding, h_.inputs, w_.inputs, winograd_.inputs,
                  zeros_.data(), pixels);
        winograd_.input_tile(to.inputs + i * kernels_.panel, x_place_, kernels_.panel, x_panel_, pixels, x_.dtype, in_);
        pixels_of(dy_, image, row, column, h_.outputs, w_.outputs, m, zeros_.data(), pixels);
        for (int64_t og = 0; og < out_groups(); og++) {
          const void* of_group[kMaxOutputs];
          for (int j = 0; j < m * m; j++) {
            of_group[j] = static_cast<const char*>(pixels[j]) + outs(og).begin * size_of(dy_.dtype);
          }
          winograd_.gradient_tile(to.gradients + og * dy_group_ + i * out_pitch_, dy_place_, of_group, dy_.dtype,
                                  outs(og).size());
        }
      }
    });
  }

  // sum [out, in] of a group of output channels and some input channels, from the first `tiles` of the operands
  void multiply(float* sum, int64_t row, int64_t place, int64_t tiles, const Operands& operands, int64_t og,
                Range in) const {
    const int64_t panel = kernels_.panel, step = ceil_div(tiles, ceil_div(tiles, kOuterTiles));
    for (int64_t i = in.begin; i < in.end; i += panel) {
      for (int64_t t = 0; t < tiles; t += step) {
        OuterTile tile{};
        tile.a = operands.gradients + place * dy_place_ + og * dy_group_ + t * out_pitch_;
        tile.b = operands.inputs + place * x_place_ + i / panel * x_panel_ + t * panel;
        tile.images = tile.rows = 1, tile.pixels = std::min(step, tiles - t), tile.chunk = chunk(x_);
        tile.a_pixel = out_pitch_, tile.b_pixel = panel;
        tile.c = sum + i - in.begin;
        tile.c_row = row;
        tile.channels = outs(og).size();
        tile.columns = std::min(panel, in.end - i);
        kernels_.outer(tile);
      }
    }
  }

  // Sums of some output and input channels.
  void transform_back(const Sums& sums, Range out, Range in) const {
    for (int64_t o = out.begin; o < out.end; o++) {
      float* taps[9];
      for (int t = 0; t < 9; t++) {
        taps[t] = dweight_.data + o * dweight_.out + t / 3 * dweight_.h + t % 3 * dweight_.w + in.begin;
      }
      winograd_.add_weight_grad(taps, sums.data + (o - out.begin) * sums.row, sums.place, in.size());
    }
  }

  const Kernels& kernels_;
  const WinogradKernels& winograd_;
  const Tiles tiles_;
  const ConvAxis &h_, &w_;
  const Image dy_, x_;
  const int64_t out_, in_;
  const WeightGrad dweight_;
  const int64_t places_;
  const std::vector<float> zeros_;
  int64_t panels_, in_group_, out_group_, out_pitch_;
  int64_t block_, x_panel_, x_place_, dy_group_, dy_place_;  // tiles; strides
};

}  // namespace

bool winograd_conv(const Kernels& direct, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                   int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns) {
  const Kernels& kernels = of_floats(direct);
  if (!is_dense(h) || !is_dense(w) || std::min(depth, columns) < kernels.lanes) return false;
  // The large tiles lose two bits, which shorter sums win back where there is enough to sum.
  const bool large_tiles = x.dtype != Dtype::f32 || depth >= kMinDepth;
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
  WinogradWeightGrad(kernels, *winograd, tiles, h, w, dy, out, x, in, dweight).add();
  return true;
}

}  // namespace gradaug::cpu
