// Implicit GEMM on the tensor cores of sm_80 and newer: __half, __nv_bfloat16, and float as TF32; any group.
// Channels must be contiguous in x, y and w.
#pragma once

#include "cuda/conv/implicit_gemm.cuh"
#include "cuda/conv/mma_sm80.cuh"
#include "cuda/conv/operands_sm80.cuh"

namespace gradaug::conv::sm80 {

template <typename T>
constexpr bool kSupports = !std::is_same_v<T, double>;

// Fragments of the left operand: kCount tiles of [16, 32 bytes of the reduction], from `first` on.
template <typename T, bool kColumns, int kTile, int kCount>
__device__ inline void load_left(uint32_t (&fragments)[kCount][4], const unsigned char* tile, int first, int half,
                                 int lane) {
  if constexpr (!kColumns || sizeof(T) == 2) {
    const void* rows[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int start = first + 16 * i;
      rows[i] =
          tile + (kColumns ? columns_offset<T, kTile>(16 * half + lane % 8 + lane / 16 * 8, start / 8 + lane / 8 % 2)
                           : rows_offset(start + lane % 16, 2 * half + lane / 16));
    }
    load_matrices<kColumns>(fragments, rows);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first + 16 * i + lane / 4 + 8 * (j % 2), k = 8 * half + lane % 4 + 4 * (j / 2);
        fragments[i][j] =
            *reinterpret_cast<const uint32_t*>(tile + columns_offset<T, kTile>(k, column / 4) + 4 * (column % 4));
      }
    }
  }
}

// Fragments of the right operand: kCount pairs of [32 bytes of the reduction, 8], from `first` on.
template <typename T, bool kColumns, int kTile, int kCount>
__device__ inline void load_right(uint32_t (&fragments)[2 * kCount][2], const unsigned char* tile, int first, int half,
                                  int lane) {
  uint32_t pairs[kCount][4];  // both halves of the reduction for columns 0 to 7, then for 8 to 15
  if constexpr (!kColumns || sizeof(T) == 2) {
    const void* rows[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int start = first + 16 * i;
      rows[i] = tile + (kColumns ? columns_offset<T, kTile>(16 * half + lane % 16, start / 8 + lane / 16)
                                 : rows_offset(start + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
    }
    load_matrices<kColumns>(pairs, rows);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first + 16 * i + lane / 4 + 8 * (j / 2), k = 8 * half + lane % 4 + 4 * (j % 2);
        pairs[i][j] =
            *reinterpret_cast<const uint32_t*>(tile + columns_offset<T, kTile>(k, column / 4) + 4 * (column % 4));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) fragments[2 * i + j / 2][j % 2] = pairs[i][j];
  }
}

// Blocks that a multiprocessor's registers must hold: 2, but for the one kernel that would spill.
template <typename T, Pass kPass, int kTile>
constexpr int kResidentBlocks = std::is_same_v<T, float> && kPass == Pass::kInputGrad && kTile == 128 ? 1 : 2;

using LargeTile = TileShape<128, 128>;
using SmallTile = TileShape<64, 64>;

// 8 neighbouring elements, 16-byte aligned.
template <typename T>
__device__ inline void store8(T* target, const float (&v)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(target) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(target + 4) = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    struct alignas(16) {
      T element[8];
    } packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) store(&packed.element[i], v[i]);
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&packed);
  }
}

// Implicit GEMM on tensor cores; one block computes one [kTileM, kTileN] tile of one group (and one phase of the input
// gradient, or one split of the weight gradient's pixels).
//   reads   64 bytes of the reduction of its rows and columns at a time, copied asynchronously into a ring of kStages
//           buffers in shared memory, zeros where a tap leaves the image or channels end
//   keeps   the tile's sums in float32 registers: each warp a [kTileM / 2, 32] part
//   writes  the tile once, through shared memory in 16-byte stores where the rows allow it
template <typename T, Pass kPass, int kTileM, int kTileN>
__global__ void __launch_bounds__(TileShape<kTileM, kTileN>::kThreads, kResidentBlocks<T, kPass, kTileM>)
    tensor_core_kernel(const __grid_constant__ Conv<T> conv, const Divisor column_tiles, const Divisor parts) {
  using Tile = TileShape<kTileM, kTileN>;
  using Operands = Sources<T, kPass, kTileM, kTileN>;
  constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
  GRADAUG_DYNAMIC_SHARED(shared);

  const int row_tile = column_tiles.divide(blockIdx.x), column_tile = column_tiles.remainder(blockIdx.x, row_tile);
  const int group = parts.divide(blockIdx.z), part = parts.remainder(blockIdx.z, group);
  const int first_row = row_tile * kTileM, first_column = column_tile * kTileN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM, warp_column = warp % Tile::kWarpsN * Tile::kWarpN;

  const Operands operands(conv, first_row, first_column, group, part);
  const int all_steps = (operands.depth + kDepth<T> - 1) / kDepth<T>;
  int begin = 0, end = all_steps;
  if constexpr (kPass == Pass::kWeightGrad) {
    const int per_split = (all_steps + conv.splits - 1) / conv.splits;
    begin = part * per_split;
    end = begin + per_split < all_steps ? begin + per_split : all_steps;
  }

  // This thread's chunks of a step lie at fixed offsets; the permutation of chunks repeats from one to the next.
  constexpr int kLeftChunks = Operands::kLeftColumns ? kTileM / kChunk<T> : 4;
  constexpr int kRightChunks = Operands::kRightColumns ? kTileN / kChunk<T> : 4;
  const int left_row = threadIdx.x / kLeftChunks, left_chunk = threadIdx.x % kLeftChunks;
  const int right_row = threadIdx.x / kRightChunks, right_chunk = threadIdx.x % kRightChunks;
  const int left_offset =
      Operands::kLeftColumns ? columns_offset<T, kTileM>(left_row, left_chunk) : rows_offset(left_row, left_chunk);
  const int right_offset = kTileM * 64 + (Operands::kRightColumns ? columns_offset<T, kTileN>(right_row, right_chunk)
                                                                  : rows_offset(right_row, right_chunk));
  constexpr int kOffsetStep = Tile::kThreads * 16;
  const int left_alignment = kPass == Pass::kForward ? conv.x_alignment : conv.y_alignment;
  const int right_alignment = kPass == Pass::kWeightGrad ? conv.x_alignment : conv.w_alignment;
  const bool left_held = sizeof(T) == 2 && left_alignment < 4, right_held = sizeof(T) == 2 && right_alignment < 4;

  Registers held_left[Tile::kCopies], held_right[Tile::kCopies];
  auto start = [&](int step) {
    if (step < end) {
      unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
      Source<T> left[Tile::kCopies], right[Tile::kCopies];
      operands.at(step, left, right);
#pragma unroll
      for (int i = 0; i < Tile::kCopies; ++i) {
        fetch(stage + left_offset + i * kOffsetStep, left[i], left_alignment, held_left[i]);
        fetch(stage + right_offset + i * kOffsetStep, right[i], right_alignment, held_right[i]);
      }
    }
    copy_async_commit();
  };
  auto finish = [&](int step) {
    if (step >= end) return;
    unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      if (left_held) *reinterpret_cast<Registers*>(stage + left_offset + i * kOffsetStep) = held_left[i];
      if (right_held) *reinterpret_cast<Registers*>(stage + right_offset + i * kOffsetStep) = held_right[i];
    }
  };

  float sums[kM][kN][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    start(begin + step);
    finish(begin + step);
  }
  for (int step = begin; step < end; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // all of this step's chunks have arrived, and nobody reads the buffer that is filled next
    start(step + kStages - 1);
    const unsigned char* stage = shared + (step - begin) % kStages * Tile::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[kM][4], right[kN][2];
      load_left<T, Operands::kLeftColumns, kTileM>(left, stage, warp_row, half, lane);
      load_right<T, Operands::kRightColumns, kTileN, kN / 2>(right, stage + kTileM * 64, warp_column, half, lane);
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int i = 0; i < kM * 4; ++i) left[i / 4][i % 4] = round_to_tf32(left[i / 4][i % 4]);
#pragma unroll
        for (int i = 0; i < kN * 2; ++i) right[i / 2][i % 2] = round_to_tf32(right[i / 2][i % 2]);
      }
      multiply_accumulate<T>(sums, left, right);
    }
    finish(step + kStages - 1);
  }
  copy_async_wait<0>();
  __syncthreads();  // the ring is free for the results

  // Each warp turns 16 rows of 32 columns at a time from fragments into rows.
  const Target<T, kPass> target(conv, group, part);
  constexpr int kPitch = Tile::kWarpN + 4;
  float* rows = reinterpret_cast<float*>(shared) + warp * 16 * kPitch;  // [16, kPitch]
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(rows + lane / 4 * kPitch + column) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(rows + (lane / 4 + 8) * kPitch + column) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
    __syncwarp();
    const int tile_row = first_row + warp_row + 16 * i, tile_column = first_column + warp_column;
    auto bias = [&](int column) {
      const bool has_bias = kPass == Pass::kForward && conv.bias != nullptr && column < target.columns;
      return has_bias ? load(conv.bias + static_cast<int64_t>(group) * target.columns + column) : 0.0f;
    };
    if (target.vector) {
      const int column = lane % 4 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        auto* row = target.row(tile_row + r);
        if (row == nullptr || tile_column + column >= target.columns) continue;
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = rows[r * kPitch + column + e] + bias(tile_column + column + e);
        if (tile_column + column + 8 <= target.columns) {
          store8(row + tile_column + column, v);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (tile_column + column + e < target.columns) store(row + tile_column + column + e, v[e]);
          }
        }
      }
    } else {
      const int column = tile_column + lane;
      const float shift = bias(column);
      for (int r = 0; r < 16; ++r) {
        auto* row = target.row(tile_row + r);
        if (row == nullptr || column >= target.columns) continue;
        store(row + column * target.column_stride, rows[r * kPitch + lane] + shift);
      }
    }
    __syncwarp();
  }
}

// The large tile where it still gives every multiprocessor a block and its columns are not mostly padding.
inline bool use_large_tile(const Extent& e, int splits, int multiprocessors) {
  return e.columns > 64 && e.rows > 64 &&
         tiles(e.rows, 128) * tiles(e.columns, 128) * e.copies * splits >= multiprocessors;
}

template <typename T, Pass kPass, typename Tile, int kTile>
void launch_tile(const Conv<T>& conv, const Extent& e, int parts, cudaStream_t stream) {
  const int64_t row_tiles = tiles(e.rows, kTile), column_tiles = tiles(e.columns, kTile);
  const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles), 1, conv.shape.groups * parts);
  auto* kernel = tensor_core_kernel<T, kPass, kTile, kTile>;
  GRADAUG_LAUNCH(kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, conv,
                 Divisor(static_cast<int>(column_tiles)), Divisor(parts));
}

template <typename T, Pass kPass>
void launch(const Conv<T>& conv, const Device& device, cudaStream_t stream) {
  if constexpr (kSupports<T>) {
    const Extent e = extent_of(conv, kPass);
    const int parts = parts_of(conv, kPass), splits = kPass == Pass::kWeightGrad ? conv.splits : 1;
    if (use_large_tile(e, splits, device.multiprocessors)) {
      launch_tile<T, kPass, LargeTile, 128>(conv, e, parts, stream);
    } else {
      launch_tile<T, kPass, SmallTile, 64>(conv, e, parts, stream);
    }
  }
}

// Blocks of one split of a weight gradient.
template <typename T>
int64_t weight_grad_blocks(const Conv<T>& conv) {
  const Extent e = extent_of(conv, Pass::kWeightGrad);
  const int tile = e.rows > 64 && e.columns > 64 ? 128 : 64;
  return tiles(e.rows, tile) * tiles(e.columns, tile) * e.copies;
}

}  // namespace gradaug::conv::sm80
