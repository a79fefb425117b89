// The inner loops of depthwise.h, one table of them for each instruction set, chosen at run time.
//
// They work on vectors of `lanes` channels of one pixel. Rows of an image are copied into float32 *columns*: one vector
// after another, each [columns, lanes], with zeros for the padding and beyond the last channel.
//
// In groups of several channels, a lane meets the other lanes of its group by rotation: `rotation j` of a vector has,
// in the lane of channel c of a group, the channel (c + j) mod group. There are `group` rotations, and no product is
// wasted on zeros.
#pragma once

#include "cpu/microkernels/table.h"

namespace gradaug::cpu {

// y[p] = bias + sum over taps t and rotations j of rotation_j(x[x_offset[t] + p] * weight[weight_offset[t]][j])
struct DepthwiseRow {
  const float* x;                // [vectors, .., lanes]
  int64_t x_vector;              // floats from a vector to the next
  const int64_t* x_offset;       // [taps], floats
  const float* weight;           // [vectors, .., group, lanes]
  int64_t weight_vector;         // floats
  const int64_t* weight_offset;  // [taps], floats
  int64_t taps;
  int64_t run;        // taps come in runs of so many that are adjacent in x
  const float* bias;  // [vectors, lanes] or null
  void* y;            // [pixels, channels]
  int64_t y_pixel;    // elements of the output's dtype
  int64_t pixels, channels;
};

// sum[r][c][j] += sum over pixels p of x[row_offset[r] + column_offset[c] + p] * dy[j][p]
struct DepthwiseOuterRow {
  const float* x;                // [vectors, .., lanes]
  int64_t x_vector;              // floats
  const int64_t* row_offset;     // [rows] of the kernel, floats
  const int64_t* column_offset;  // [columns] of the kernel, floats
  int64_t rows, columns;
  bool adjacent;                             // the columns, in x
  const float* dy;                           // [vectors, group, pixels, lanes], rotation j of it at j
  int64_t dy_vector, dy_rotation, dy_pixel;  // floats
  int64_t pixels, vectors;
  float* sum;  // [vectors, rows, columns, group, lanes]
  int64_t sum_vector;
};

struct DepthwiseKernels {
  int lanes;
  int max_group;  // groups have 1, 2, 4, .. max_group channels: in larger ones PyTorch's own kernels are faster

  void (*row)(const DepthwiseRow& row, int group, Dtype output);
  void (*outer)(const DepthwiseOuterRow& row, int group);

  // dst[v][p] for p < pixels: `channels` elements from src + p * src_pixel, zeros beyond; vectors are dst_vector apart.
  // The same pixels src_next further on are likely to be loaded next, and are fetched into the cache.
  void (*load)(float* dst, int64_t dst_vector, const void* src, int64_t src_pixel, int64_t src_next, Dtype dtype,
               int64_t pixels, int64_t channels);
  // dst[j][p] for 1 <= j < group: rotation j of dst[0][p], rotations dst_rotation apart.
  void (*rotate)(float* dst, int64_t dst_rotation, int64_t pixels, int group);
};

// The best kernels this processor (and ATEN_CPU_CAPABILITY) allows for a dtype; null where there are none.
const DepthwiseKernels* select_depthwise_kernels(Dtype dtype);

}  // namespace gradaug::cpu
