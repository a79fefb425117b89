// 3x3 convolutions of stride 1 with 16 multiplications where the definition has 36: Winograd's F(2 x 2, 3 x 3), as in
// Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016. For a tile d of 4 x 4 inputs, which
// overlaps its neighbours by two pixels, and its 2 x 2 outputs Y:
//
//   Y  = A^T [(G g G^T) . (B^T d B)] A                forward; the input gradient is one of a flipped kernel
//   dg = G^T [sum of (A dY A^T) . (B^T d B)] G        weight gradient
//
// The products at the 16 places of a tile are 16 matrix products over channels, or over tiles for the gradient, on the
// tiles of kernels.h. For float32 arithmetic only: where pairs of bfloat16 are multiplied, the transformed values would
// be rounded once more.
#include <algorithm>
#include <cstring>
#include <vector>

#include "panels.h"

namespace gradaug::cpu {
namespace {

constexpr int64_t kPlaces = 16;
constexpr int64_t kInputUnits = 160 * 1024;      // transformed inputs of a block: most of a second-level cache
constexpr int64_t kGradientUnits = 1024 * 1024;  // both operands of a block of the weight gradient, for all threads
constexpr int64_t kPackedDepth = 64;             // channels of the weight that are transformed at a time
// The time of transforming a weight, and of clearing and transforming the sums of its gradient, in multiplications.
constexpr int64_t kTransformed = 700, kSummed = 1500;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Tiles of 2 x 2 outputs of a batch, in the order of images, rows and columns.
struct Tiles {
  int64_t batch, height, width;  // of the outputs
  int64_t down() const { return ceil_div(height, 2); }
  int64_t across() const { return ceil_div(width, 2); }
  int64_t count() const { return batch * down() * across(); }
  int64_t image(int64_t t) const { return t / (down() * across()); }
  int64_t row(int64_t t) const { return t / across() % down() * 2; }
  int64_t column(int64_t t) const { return t % across() * 2; }
};

// The kSize x kSize pixels from (row, column) of image n; `outside` for those that are none.
template <int kSize>
void pixels_of(const Image& image, int64_t n, int64_t row, int64_t column, int64_t height, int64_t width,
               const void* outside, const void* pixels[kSize * kSize]) {
  for (int i = 0; i < kSize; i++) {
    for (int j = 0; j < kSize; j++) {
      const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
      pixels[kSize * i + j] = inside ? image.at(n, row + i, column + j) : outside;
    }
  }
}

// Whether three taps read three neighbours, for adjacent outputs.
bool is_dense(const GatherAxis& axis) {
  return axis.tap.size() == 3 && axis.step == 1 && axis.first == 0 && axis.spacing == 1 &&
         axis.offset[1] == axis.offset[0] + 1 && axis.offset[2] == axis.offset[0] + 2;
}

// Whether it takes less time than the definition. once: what is done once for each weight, in multiplications.
bool pays(const Kernels& kernels, const Tiles& tiles, int64_t in, int64_t out, int64_t once) {
  if (kernels.pair != 1 || std::min(in, out) < kernels.lanes) return false;
  const int64_t direct = 9 * tiles.batch * tiles.height * tiles.width;
  return 10 * (kPlaces * tiles.count() + once) < 9 * direct;
}

// G g G^T of the weight, in panels whose taps are the places of a tile.
void transform_weight(const Kernels& kernels, float* packed, const Panels& panels, const GatherAxis& h,
                      const GatherAxis& w, const Weight& weight) {
  const int64_t depth = panels.units, chunks = ceil_div(depth, kPackedDepth);
  at::parallel_for(0, panels.count() * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> taps(9 * kPackedDepth * panels.panel);
    for (int64_t i = begin; i < end; i++) {
      const int64_t p = i / chunks, k = i % chunks * kPackedDepth, stored = panels.stored(p);
      const int64_t channels = std::min(kPackedDepth, depth - k);
      for (int64_t t = 0; t < 9; t++) {
        kernels.pack_panel(taps.data() + t * channels * stored, stored,
                           weight.at(h.tap[t / 3], w.tap[t % 3], k, p * panels.panel), weight.dtype, channels,
                           panels.valid(p), weight.depth, weight.column);
      }
      kernels.winograd.weight(packed + panels.offset(p) + k * stored, depth * stored, taps.data(), channels * stored,
                              channels * stored);
    }
  });
}

}  // namespace

// 1. the weight slice is transformed once into panels [place, depth, 32 columns];
// 2. a task takes a block of tiles and transforms their inputs, which stay in the second-level cache;
// 3. for each panel, 16 matrix products, one for each place of the tiles, and the transform of their results, which is
//    stored with bias.
bool winograd_conv(const Kernels& kernels, int64_t batch, const GatherAxis& h, const GatherAxis& w, const Image& x,
                   int64_t depth, const Weight& weight, const float* bias, Image y, int64_t columns) {
  const Tiles tiles{batch, h.outputs, w.outputs};
  if (!is_dense(h) || !is_dense(w) || !pays(kernels, tiles, depth, columns, kTransformed)) return false;
  const Panels panels{kPlaces, depth, columns, kernels.panel, kernels.lanes};
  const Buffer packed(panels.size());
  transform_weight(kernels, packed.data(), panels, h, w, weight);

  const int64_t threads = at::get_num_threads(), pixel = round_up(depth, kernels.lanes) + kernels.lanes;
  int64_t block = std::clamp<int64_t>(kInputUnits / (kPlaces * pixel), 24, 128);
  block = std::min(block, ceil_div(tiles.count(), 2 * threads));
  block = ceil_div(tiles.count(), ceil_div(tiles.count(), block));
  const int64_t blocks = ceil_div(tiles.count(), block);
  // Few blocks: threads share one and take panels of it.
  const int64_t shares = std::clamp<int64_t>(threads / blocks, 1, panels.count());
  // The 16 places of a tile, a multiple of 4 KiB apart, would share one set of the first-level cache.
  const int64_t input_place = block * pixel + kernels.lanes, output_place = block * panels.panel + kernels.lanes;

  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    const Buffer inputs(kPlaces * input_place), outputs(kPlaces * output_place);
    const std::vector<float> zeros(depth), padded_bias = [&] {
      std::vector<float> padded(bias ? panels.count() * panels.panel : 0);
      if (bias) std::copy(bias, bias + columns, padded.begin());
      return padded;
    }();
    const int64_t no_tap = 0;
    for (int64_t task = begin; task < end; task++) {
      const int64_t share = task % shares, first = task / shares * block;
      const int64_t count = std::min(block, tiles.count() - first);
      for (int64_t t = 0; t < count; t++) {
        const void* pixels[16];
        pixels_of<4>(x, tiles.image(first + t), tiles.row(first + t) + h.offset[0],
                     tiles.column(first + t) + w.offset[0], h.inputs, w.inputs, zeros.data(), pixels);
        kernels.winograd.input_tile(inputs.data() + t * pixel, input_place, kernels.lanes, kernels.lanes, pixels,
                                    x.dtype, depth);
      }
      const int64_t row_tiles = ceil_div(count, kernels.max_rows);
      for (int64_t p = panels.count() * share / shares; p < panels.count() * (share + 1) / shares; p++) {
        for (int64_t place = 0; place < kPlaces; place++) {
          for (int64_t i = 0; i < row_tiles; i++) {
            const int64_t row = count * i / row_tiles;
            GemmTile tile{};
            tile.a = inputs.data() + place * input_place + row * pixel;
            tile.a_row = pixel;
            tile.tap_offset = &no_tap;
            tile.taps = 1;
            tile.b = packed.data() + panels.offset(p) + place * depth * panels.stored(p);
            tile.depth = depth;
            tile.c = outputs.data() + place * output_place + row * panels.panel;
            tile.c_row = panels.panel;
            tile.rows = count * (i + 1) / row_tiles - row;
            tile.columns = panels.stored(p);
            kernels.gemm(tile, Dtype::f32);
          }
        }
        for (int64_t t = 0; t < count; t++) {
          const void* pixels[4];
          pixels_of<2>(y, tiles.image(first + t), tiles.row(first + t), tiles.column(first + t), h.outputs, w.outputs,
                       nullptr, pixels);
          void* to[4];
          for (int i = 0; i < 4; i++) {
            to[i] = pixels[i] ? static_cast<char*>(const_cast<void*>(pixels[i])) + p * panels.panel * size_of(y.dtype)
                              : nullptr;
          }
          kernels.winograd.output_tile(to, y.dtype, outputs.data() + t * panels.panel, output_place,
                                       bias ? padded_bias.data() + p * panels.panel : nullptr, panels.valid(p));
        }
      }
    }
  });
  return true;
}

// 1. threads transform a block of tiles, inputs in panels of 32 channels and output gradients, into shared memory that
//    stays in the third-level cache;
// 2. each takes some of the 16 places, and output channels where there are more threads, and adds the product over the
//    block's tiles to its own sums [place, out, in];
// 3. the sums of all blocks are transformed back and added to the gradient.
bool winograd_weight_grad(const Kernels& kernels, int64_t batch, const ConvAxis& h, const ConvAxis& w, const Image& dy,
                          int64_t out, const Image& x, int64_t in, const WeightGrad& dweight) {
  const Tiles tiles{batch, h.outputs, w.outputs};
  for (const ConvAxis* axis : {&h, &w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) return false;
  }
  if (dweight.in != 1 || !pays(kernels, tiles, in, out, kSummed)) return false;

  const int64_t panel = kernels.panel, panels = ceil_div(in, panel), out_pitch = round_up(out, kernels.lanes);
  int64_t block = std::clamp<int64_t>(kGradientUnits / (kPlaces * (panels * panel + out_pitch)), 64, 256);
  block = ceil_div(tiles.count(), ceil_div(tiles.count(), block));
  const int64_t x_panel = block * panel, x_place = panels * x_panel + kernels.lanes;
  const int64_t dy_place = block * out_pitch + kernels.lanes, sum_place = out * in;
  const Buffer inputs(kPlaces * x_place), gradients(kPlaces * dy_place), sums(kPlaces * sum_place);
  const std::vector<float> zeros(std::max(in, out));
  const int64_t parts = std::min(ceil_div(at::get_num_threads(), kPlaces), ceil_div(out, kernels.max_rows));

  for (int64_t first = 0; first < tiles.count(); first += block) {
    const int64_t count = std::min(block, tiles.count() - first);
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t n = tiles.image(first + t), row = tiles.row(first + t), column = tiles.column(first + t);
        const void* pixels[16];
        pixels_of<4>(x, n, row - h.padding, column - w.padding, h.inputs, w.inputs, zeros.data(), pixels);
        kernels.winograd.input_tile(inputs.data() + t * panel, x_place, panel, x_panel, pixels, x.dtype, in);
        pixels_of<2>(dy, n, row, column, h.outputs, w.outputs, zeros.data(), pixels);
        kernels.winograd.gradient_tile(gradients.data() + t * out_pitch, dy_place, pixels, dy.dtype, out);
      }
    });
    at::parallel_for(0, kPlaces * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t place = task / parts, groups = ceil_div(out, kernels.max_rows);
        const int64_t out_begin = groups * (task % parts) / parts * kernels.max_rows;
        const int64_t out_end = std::min(out, groups * (task % parts + 1) / parts * kernels.max_rows);
        float* sum = sums.data() + place * sum_place;
        if (first == 0) std::memset(sum + out_begin * in, 0, (out_end - out_begin) * in * sizeof(float));
        for (int64_t i = 0; i < in; i += panel) {
          OuterTile tile{};
          tile.b = inputs.data() + place * x_place + i / panel * x_panel;
          tile.images = tile.rows = 1, tile.pixels = count, tile.chunk = 32;
          tile.a_pixel = out_pitch, tile.b_pixel = panel;
          tile.c_row = in;
          tile.columns = std::min(panel, in - i);
          for (int64_t o = out_begin; o < out_end; o += kernels.max_rows) {
            tile.a = gradients.data() + place * dy_place + o;
            tile.c = sum + o * in + i;
            tile.channels = std::min<int64_t>(kernels.max_rows, out_end - o);
            kernels.outer(tile);
          }
        }
      }
    });
  }
  at::parallel_for(0, out, std::max<int64_t>(1, 4096 / in), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      float* taps[9];
      for (int t = 0; t < 9; t++) taps[t] = dweight.data + o * dweight.out + t / 3 * dweight.h + t % 3 * dweight.w;
      kernels.winograd.add_weight_grad(taps, sums.data() + o * in, sum_place, in);
    }
  });
  return true;
}

}  // namespace gradaug::cpu
