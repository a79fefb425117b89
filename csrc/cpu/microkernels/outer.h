// Matrix products over pixels, for any vector type S (simd/): the weight gradients.
// One call of a tile reads its columns of a and a panel of b once, keeps all sums in registers, and adds them to c
// once.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/microkernels/accumulators.h"
#include "cpu/microkernels/table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Product of a transposed with b, for weight gradients: each pixel adds the outer product of kRows channels of a with
// kVectors vectors of b to accumulators in registers, which are added to c at the end. The lines of c, which are as
// many bytes as the accumulators and seldom in a cache, are asked for at the start.
template <class S, int kRows, int kVectors>
void outer_tile(const OuterTile& tile) {
  using V = typename S::V;
  Accumulators<S, kRows, kVectors> sum;
  clear<S, kRows, kVectors>(sum);
  alignas(64) float total[kRows * kVectors * S::lanes];
  bool chunked = false;
  int64_t chunk = 0;
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) S::prefetch_to_write(tile.c + r * tile.c_row + v * S::lanes);
  }
  for (int64_t n = 0; n < tile.images; n++) {
    for (int64_t h = 0; h < tile.rows; h++) {
      const float* a = tile.a + n * tile.a_image + h * tile.a_row;
      const float* b = tile.b + n * tile.b_image + h * tile.b_row;
      for (int64_t begin = 0, end; begin < tile.pixels; begin = end) {
        end = S::pair == 1 && tile.pixels - begin > tile.chunk ? begin + tile.chunk : tile.pixels;
        for (int64_t p = begin; p < end; p++, a += tile.a_pixel, b += tile.b_pixel) {
          V x[kVectors];
          GRADAUG_UNROLL
          for (int v = 0; v < kVectors; v++) x[v] = S::load(b + v * S::lanes);
          GRADAUG_UNROLL
          for (int r = 0; r < kRows; r++) {
            const V unit = S::broadcast(a + r);
            GRADAUG_UNROLL
            for (int v = 0; v < kVectors; v++) sum[r][v] = S::unit_fma(unit, x[v], sum[r][v]);
          }
        }
        chunk += end - begin;
        if (S::pair == 1 && chunk >= tile.chunk) {
          add<S, kRows, kVectors>(total, sum, chunked);
          clear<S, kRows, kVectors>(sum);
          chunked = true;
          chunk = 0;
        }
      }
    }
  }
  if (chunked) add<S, kRows, kVectors>(sum, total);
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      float* c = tile.c + r * tile.c_row + v * S::lanes;
      const int64_t n = tile.columns - v * S::lanes;
      S::store(c, S::add(S::load(c, n), sum[r][v]), n);
    }
  }
}

// Channels in nearly equal tiles of up to max_rows.
template <class S, size_t... kRows>
void outer_rows(const OuterTile& all, std::index_sequence<kRows...>) {
  using Tile = void (*)(const OuterTile&);
  static constexpr Tile tiles[2][sizeof...(kRows)] = {{outer_tile<S, kRows + 1, 1>...},
                                                      {outer_tile<S, kRows + 1, 2>...}};
  const Tile* of_rows = tiles[all.columns > S::lanes];
  OuterTile tile = all;
  const int64_t count = (all.channels + S::max_rows - 1) / S::max_rows;
  for (int64_t i = 0, row = 0, end; i < count; i++, row = end) {
    end = all.channels * (i + 1) / count;
    tile.channels = end - row;
    of_rows[tile.channels - 1](tile);
    tile.a += tile.channels;
    tile.c += tile.channels * all.c_row;
  }
}

template <class S>
void outer(const OuterTile& tile) {
  outer_rows<S>(tile, std::make_index_sequence<S::max_rows>());
}

}  // namespace
}  // namespace gradaug::cpu
