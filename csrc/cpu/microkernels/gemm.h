// Matrix products with a packed weight, for any vector type S (simd/): forward and the input gradients.
// One call of a tile reads its rows of a and a panel of b once, keeps all sums in registers, and writes c once.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/microkernels/accumulators.h"
#include "cpu/microkernels/table.h"
#include "cpu/simd/unroll.h"

namespace gradaug::cpu {
namespace {

// Sums of float32 units are added to a total every so often: PyTorch's kernels sum in blocks too, and one long sum in
// one accumulator would be several times less precise. Pairs of bfloat16 have lost more than that before.
constexpr int64_t kMinChunk = 64, kMaxChunk = 256;

// Matrix product of a tile, accumulators in registers throughout:
// 1. the lines of c are asked for, which arrive while the sums are computed;
// 2. each unit k loads kVectors vectors of b and multiplies them with one unit of each row of a, broadcast;
// 3. the bias is added, and the sums are rounded to the output's dtype and stored once.
// Rows are addressed from every third one, which x86 addressing reaches without a register of its own.
template <class S, int kRows, int kVectors>
void gemm_tile(const GemmTile& tile, Dtype output) {
  using V = typename S::V;
  constexpr int kBases = (kRows + 2) / 3;
  Accumulators<S, kRows, kVectors> sum;
  clear<S, kRows, kVectors>(sum);
  alignas(64) float total[kRows * kVectors * S::lanes];
  bool chunked = false;
  const bool two_lines = kVectors * S::lanes * size_of(output) > 64;
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    const char* c = static_cast<const char*>(tile.c) + r * tile.c_row * size_of(output);
    S::prefetch_to_write(c);
    if (two_lines) S::prefetch_to_write(c + 64);
  }
  const float* b = tile.b;
  const int64_t row = tile.a_row;
  int64_t limit = tile.taps * tile.depth / 4, chunk = 0;
  limit = S::pair == 2 ? INT64_MAX : limit < kMinChunk ? kMinChunk : limit > kMaxChunk ? kMaxChunk : limit;
  if (tile.chunk > 0) limit = tile.chunk;
  for (int64_t t = 0; t < tile.taps; t++) {
    for (int64_t begin = 0, end; begin < tile.depth; begin = end) {
      end = tile.depth - begin > limit ? begin + limit : tile.depth;
      const float* base[kBases];
      GRADAUG_UNROLL
      for (int i = 0; i < kBases; i++) {
        base[i] = tile.a + tile.tap_offset[t] + begin + 3 * i * row;
        asm volatile("" : "+r"(base[i]));  // a register each, not one sum for each row
      }
      for (int64_t k = begin; k < end; k++) {
        V weight[kVectors];
        GRADAUG_UNROLL
        for (int v = 0; v < kVectors; v++) weight[v] = S::load(b + v * S::lanes);
        b += kVectors * S::lanes;
        GRADAUG_UNROLL
        for (int r = 0; r < kRows; r++) {
          const V unit = S::broadcast(base[r / 3] + (r % 3) * row);
          GRADAUG_UNROLL
          for (int v = 0; v < kVectors; v++) sum[r][v] = S::unit_fma(unit, weight[v], sum[r][v]);
        }
        GRADAUG_UNROLL
        for (int i = 0; i < kBases; i++) base[i]++;
      }
      chunk += end - begin;
      if (chunk >= limit) {
        add<S, kRows, kVectors>(total, sum, chunked);
        clear<S, kRows, kVectors>(sum);
        chunked = true;
        chunk = 0;
      }
    }
  }
  if (chunked) add<S, kRows, kVectors>(sum, total);
  if (tile.bias) {
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      const V bias = S::load(tile.bias + v * S::lanes);
      GRADAUG_UNROLL
      for (int r = 0; r < kRows; r++) sum[r][v] = S::add(sum[r][v], bias);
    }
  }
  GRADAUG_UNROLL
  for (int r = 0; r < kRows; r++) {
    char* c = static_cast<char*>(tile.c) + r * tile.c_row * size_of(output);
    GRADAUG_UNROLL
    for (int v = 0; v < kVectors; v++) {
      S::store_floats(c + v * S::lanes * size_of(output), sum[r][v], output, tile.columns - v * S::lanes);
    }
  }
}

// Rows in nearly equal tiles of up to max_rows.
template <class S, size_t... kRows>
void gemm_rows(const GemmTile& all, Dtype output, std::index_sequence<kRows...>) {
  using Tile = void (*)(const GemmTile&, Dtype);
  static constexpr Tile tiles[2][sizeof...(kRows)] = {{gemm_tile<S, kRows + 1, 1>...}, {gemm_tile<S, kRows + 1, 2>...}};
  const Tile* of_rows = tiles[all.columns > S::lanes];
  GemmTile tile = all;
  const int64_t count = (all.rows + S::max_rows - 1) / S::max_rows, c_row = all.c_row * size_of(output);
  const int64_t least = all.rows / count, more = all.rows % count;
  for (int64_t i = 0; i < count; i++) {
    tile.rows = least + (i < more);
    of_rows[tile.rows - 1](tile, output);
    tile.a += tile.rows * all.a_row;
    tile.c = static_cast<char*>(tile.c) + tile.rows * c_row;
  }
}

template <class S>
void gemm(const GemmTile& tile, Dtype output) {
  gemm_rows<S>(tile, output, std::make_index_sequence<S::max_rows>());
}

}  // namespace
}  // namespace gradaug::cpu
