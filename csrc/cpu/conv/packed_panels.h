// How a matrix of weights is stored for the tiles of microkernels/table.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Panels [tap, depth units, columns] one after another; each has `panel` columns in memory but the last, which has
// `lanes` where those suffice.
struct Panels {
  int64_t taps, units, columns, panel, lanes;
  int64_t count() const { return ceil_div(columns, panel); }
  int64_t valid(int64_t p) const { return std::min(panel, columns - p * panel); }
  int64_t stored(int64_t p) const { return valid(p) > lanes ? panel : lanes; }
  int64_t offset(int64_t p) const { return p * panel * taps * units; }
  int64_t size() const { return count() * panel * taps * units; }
};

// panel [tap, depth units, columns]: tap t of panel p of the weight, those taps that the phase names.
inline void pack_tap(const Kernels& kernels, float* panel, const Panels& panels, int64_t p, int64_t t,
                     const Phase& phase, const WeightMatrices& weight, int64_t depth) {
  const int64_t taps_w = phase.w.tap.size(), stored = panels.stored(p);
  kernels.pack_panel(panel + t * panels.units * stored, stored,
                     weight.at(phase.h.tap[t / taps_w], phase.w.tap[t % taps_w], 0, p * panels.panel), weight.dtype,
                     depth, panels.valid(p), weight.depth, weight.column);
}

// The bias of whole panels; empty where there is none.
inline std::vector<float> padded_bias(const float* bias, const Panels& panels) {
  std::vector<float> padded(bias ? panels.count() * panels.panel : 0);
  if (bias) std::copy(bias, bias + panels.columns, padded.begin());
  return padded;
}

}  // namespace gradaug::cpu
