// Weight gradient by Winograd's algorithm (winograd.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/conv/paths.h"
#include "cpu/conv/winograd.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kSumUnits = 160 * 1024;        // sums of a group of channels: most of a second-level cache
constexpr int64_t kGradientUnits = 1024 * 1024;  // both operands of a block of tiles
constexpr int64_t kOuterTiles = 128;             // tiles whose panel of inputs stays in the first-level cache

// The weight gradient, step by step for all threads:
// 1. a block of tiles is transformed, inputs in panels of 32 channels and output gradients in groups of channels;
// 2. a task takes a place and a group of output channels and adds their products over the block's tiles to the sums
//    [place, out, in];
// 3. after the last block the sums are transformed back and added to the gradient.
// Where one block holds all tiles, a task takes all places of a group of output and of input channels instead: their
// sums stay in the second-level cache and are transformed back at once.
class WinogradWeightGrad {
 public:
  WinogradWeightGrad(const WeightGradProblem& problem, const WinogradKernels& winograd)
      : kernels_(*problem.float_kernels),
        winograd_(winograd),
        tiles_{winograd.outputs, problem.batch, problem.h.outputs, problem.w.outputs},
        h_(problem.h),
        w_(problem.w),
        dy_(problem.dy),
        x_(problem.x),
        out_(problem.out),
        in_(problem.in),
        dweight_(problem.dweight),
        places_(winograd.inputs * winograd.inputs),
        zeros_(std::max(problem.in, problem.out) * size_of(problem.x.dtype)) {
    // A group of output and input channels is about a square. Its rows of output gradients have nothing between them,
    // as what is transformed should stay in the third-level cache.
    const int64_t panel = kernels_.panel, square = kSumUnits / places_;
    panels_ = ceil_div(in_, panel);
    const int64_t in_side = std::clamp<int64_t>(std::sqrt(square) / panel, 1, panels_);
    in_group_ = ceil_div(panels_, ceil_div(panels_, in_side)) * panel;
    const int64_t out_side = std::clamp<int64_t>(square / in_group_, std::min<int64_t>(out_, kernels_.max_rows), out_);
    out_pitch_ = round_up(ceil_div(out_, ceil_div(out_, out_side)), kernels_.lanes);
    out_group_ = std::min(out_, out_pitch_);
    // One block of all tiles spares the sums the way to memory and back: worth twice a block's size, or that of all
    // sums.
    const int64_t tile_units = places_ * (panels_ * panel + out_groups() * out_pitch_);
    block_ = tiles_.count();
    if (block_ * tile_units > std::max(2 * kGradientUnits, places_ * out_ * in_)) {
      block_ = std::clamp<int64_t>(kGradientUnits / tile_units, 128, 512);
    }
    block_ = ceil_div(tiles_.count(), ceil_div(tiles_.count(), block_));
    x_panel_ = block_ * panel, x_place_ = panels_ * x_panel_ + kernels_.lanes;
    dy_group_ = block_ * out_pitch_, dy_place_ = out_groups() * dy_group_ + kernels_.lanes;
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
        const void* pixels[kMaxTileInputs];
        pixels_of(x_, image, row - h_.padding, column - w_.padding, h_.inputs, w_.inputs, winograd_.inputs, outside_,
                  pixels);
        winograd_.input_tile(to.inputs + i * kernels_.panel, x_place_, kernels_.panel, x_panel_, pixels, x_.dtype, in_);
        pixels_of(dy_, image, row, column, h_.outputs, w_.outputs, m, outside_, pixels);
        for (int64_t og = 0; og < out_groups(); og++) {
          const void* of_group[kMaxTileOutputs];
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
        tile.images = tile.rows = 1, tile.pixels = std::min(step, tiles - t), tile.chunk = chunk(x_.dtype);
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
  const ConvAxis h_, w_;
  const Images dy_, x_;
  const int64_t out_, in_;
  const WeightGrad dweight_;
  const int64_t places_;
  const std::vector<char> zeros_;
  const void* const outside_ = zeros_.data();  // a pixel that is outside of the image
  int64_t panels_, in_group_, out_group_, out_pitch_;
  int64_t block_, x_panel_, x_place_, dy_group_, dy_place_;  // tiles; strides
};

}  // namespace

void winograd_weight_grad(const WeightGradProblem& problem, const WinogradKernels& winograd) {
  WinogradWeightGrad(problem, winograd).add();
}

}  // namespace gradaug::cpu
