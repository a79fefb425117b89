// Which kernel takes a convolution on the path cpp. That it is on this path is decided in
// gradaug_kernels/_gpu/paths.py.
//
// kKernels is the list. A kernel for another architecture is a file of its own, <name>_sm<architecture>.cuh, and a line
// here, above those that it is faster than.
#pragma once

#include <iterator>

#include "cuda/conv/accumulate.cuh"
#include "cuda/conv/depthwise.cuh"
#include "cuda/conv/direct.cuh"
#include "cuda/conv/fma.cuh"
#include "cuda/conv/tensor_core_sm80.cuh"

namespace gradaug::conv {

// The caller sees to the device, the stream's and the buffers' life, and asks for launch errors.
template <typename T>
struct Kernel {
  const char* name;
  int architecture;          // the least that it runs on
  bool contiguous_channels;  // needs them in x, y and w
  bool (*applies)(const Conv<T>&, const Device&);
  void (*launch)(const Conv<T>&, const Device&, cudaStream_t);
  int64_t (*blocks)(const Conv<T>&);  // of one split of a weight gradient
};

// ---- Conditions: on shape, x and y, before `prepare`

inline bool has_small_groups(const Shape& s) { return s.groups > 1 && (s.in_channels < 16 || s.out_channels < 16); }

template <typename T>
bool on_tensor_cores(const Conv<T>& conv, const Device& device) {
  return sm80::kSupports<T> && (!std::is_same_v<T, float> || device.allow_tf32) && !has_small_groups(conv.shape);
}

template <typename T>
bool by_fma(const Conv<T>& conv, const Device&) {
  return kFmaSupports<T> && !has_small_groups(conv.shape);
}

template <typename T>
bool is_depthwise(const Conv<T>& conv, const Device&) {
  const Shape& s = conv.shape;
  return s.groups > 1 && s.in_channels == 1 && s.out_channels == 1 && depthwise_weights_fit(conv);
}

template <typename T>
bool always(const Conv<T>&, const Device&) {
  return true;
}

// ---- The list: of each direction the kernels in order, the first that applies is taken

constexpr int kAnyArchitecture = 70;  // the first with __grid_constant__

// Forward, input gradient.
template <typename T, Pass kPass>
constexpr Kernel<T> kKernels[] = {
    {"tensor_core_sm80", 80, true, on_tensor_cores<T>, sm80::launch<T, kPass>, nullptr},
    {"fma", kAnyArchitecture, false, by_fma<T>, launch_fma<T, kPass>, nullptr},
    {"depthwise", kAnyArchitecture, false, is_depthwise<T>, launch_depthwise<T, kPass>, nullptr},
    {"direct", kAnyArchitecture, false, always<T>, launch_direct<T, kPass>, nullptr},
};

// Weight gradient.
template <typename T>
constexpr Kernel<T> kKernels<T, Pass::kWeightGrad>[] = {
    {"tensor_core_sm80", 80, true, on_tensor_cores<T>, sm80::launch<T, Pass::kWeightGrad>, sm80::weight_grad_blocks<T>},
    {"fma", kAnyArchitecture, false, by_fma<T>, launch_fma<T, Pass::kWeightGrad>, fma_weight_grad_blocks<T>},
    {"direct", kAnyArchitecture, false, always<T>, launch_direct_weight_grad<T>, direct_weight_grad_blocks<T>},
};

// conv has its shape, x and y. What no other kernel takes, such as half types before sm_80, the last one does.
template <typename T, Pass kPass>
const Kernel<T>& choose_kernel(const Conv<T>& conv, const Device& device) {
  for (const Kernel<T>& kernel : kKernels<T, kPass>) {
    if (device.architecture >= kernel.architecture && kernel.applies(conv, device)) return kernel;
  }
  return *std::rbegin(kKernels<T, kPass>);
}

}  // namespace gradaug::conv
