// Convolution with the first channels of a full-width weight, on CUDA without Triton: forward, input gradient, weight
// gradient. Formulas, shapes and memory formats: gradaug_kernels/ops/slim_conv2d.py. Kernels: conv/paths.cuh.
//
// The operators are private, slim_conv2d*_cuda_cpp: Python chooses which backend serves the public ones on CUDA.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <initializer_list>

#include "checks.h"
#include "cuda/conv/paths.cuh"

namespace {

using at::IntArrayRef;
using at::Tensor;
using namespace gradaug::conv;

// NHWC if one of the two is, as torch's convolutions choose.
at::MemoryFormat memory_format(const Tensor& a, const Tensor& b) {
  const bool nhwc = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Calls f with a null pointer of the kernels' type for a dtype.
template <typename F>
void with_type(at::ScalarType dtype, const char* name, F f) {
  switch (dtype) {
    case at::kHalf:
      return f(static_cast<__half*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    default:
      TORCH_CHECK_TYPE(false, name, " must be float16, bfloat16, float32 or float64, got ", dtype);
  }
}

// The kernels count in 32 bits.
void check_countable(const char* what, std::initializer_list<int64_t> sizes, int64_t most = INT32_MAX) {
  int64_t room = most;
  for (const int64_t size : sizes) room = size > 0 ? room / size : most;
  TORCH_CHECK_VALUE(room > 0, what, " must be at most ", most, ", got the product of ",
                    IntArrayRef(sizes.begin(), sizes.size()));
}

// The sizes of a convolution that checks.h has seen.
Shape shape_of(IntArrayRef x, IntArrayRef y, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding,
               IntArrayRef dilation, int64_t groups) {
  // A phase of the stride counts at most (size + stride) pixels along each axis.
  check_countable("the input's number of pixels", {x[0], x[2] + stride[0], x[3] + stride[1]});
  check_countable("the output's number of pixels", {y[0], y[2], y[3]});
  check_countable("the padded image's size", {2, x[2] + 2 * padding[0] + x[3] + 2 * padding[1]});
  check_countable("the weight's number of elements", {weight[0], weight[2], weight[3], weight[1] + 8});
  check_countable("groups * stride * stride", {groups, stride[0], stride[1]}, 65535);
  auto i = [](int64_t value) { return static_cast<int>(value); };
  return {i(x[0]),          i(x[2]),       i(x[3]),        i(y[2]),       i(y[3]),      i(x[1] / groups),
          i(y[1] / groups), i(groups),     i(weight[2]),   i(weight[3]),  i(stride[0]), i(stride[1]),
          i(padding[0]),    i(padding[1]), i(dilation[0]), i(dilation[1])};
}

template <typename T>
Image<T> image_of(const Tensor& t) {  // [N, C, H, W]
  // The stride of an axis of one element says nothing: it must not cost an alignment or the contiguous path.
  auto stride = [&](int axis) { return t.size(axis) == 1 ? int64_t{axis == 1} : t.stride(axis); };
  return {static_cast<T*>(t.data_ptr()), stride(0), stride(2), stride(3), stride(1)};
}

template <typename T>
Filter<T> filter_of(const Tensor& t) {  // [O, I, KH, KW]
  const Image<T> strides = image_of<T>(t);
  return {strides.data, strides.n, strides.h, strides.w, strides.c};
}

// The tensor itself where its channels are contiguous or the kernel does not need that, otherwise an NHWC copy.
template <typename T>
Tensor readable(const Tensor& t, const Kernel<T>& kernel) {
  const bool contiguous_channels = t.size(1) == 1 || t.stride(1) == 1;
  return kernel.contiguous_channels && !contiguous_channels ? t.contiguous(at::MemoryFormat::ChannelsLast) : t;
}

template <typename T>
Device current_device() {
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();
  const bool allow_tf32 = std::is_same_v<T, float> && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return {10 * device.major + device.minor, device.multiProcessorCount, allow_tf32};
}

Tensor slim_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_channels,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const auto size =
      gradaug::check_conv_forward(x, weight, bias, out_channels, stride, padding, dilation, groups);  // of y
  const c10::cuda::CUDAGuard guard(x.device());
  const Shape shape = shape_of(x.sizes(), size, weight.sizes(), stride, padding, dilation, groups);
  const Tensor y = at::empty(size, x.options().memory_format(memory_format(x, weight)));
  if (y.numel() == 0) return y;
  with_type(x.scalar_type(), "x", [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Device device = current_device<T>();
    Conv<T> conv{shape, image_of<T>(x), image_of<T>(y)};
    const Kernel<T>& kernel = choose_kernel<T, Pass::kForward>(conv, device);
    const Tensor image = readable(x, kernel);
    const Tensor filter = readable(weight.narrow(0, 0, out_channels).narrow(1, 0, shape.in_channels), kernel);
    const Tensor shift = bias ? bias->contiguous() : Tensor();
    conv.x = image_of<T>(image);
    conv.w = filter_of<T>(filter);
    conv.bias = bias ? static_cast<const T*>(shift.data_ptr()) : nullptr;
    prepare(conv);
    kernel.launch(conv, device, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

Tensor slim_conv2d_input_grad(const Tensor& dy, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  gradaug::check_conv_input_grad(dy, weight, input_size, stride, padding, dilation, groups);
  const c10::cuda::CUDAGuard guard(dy.device());
  const Shape shape = shape_of(input_size, dy.sizes(), weight.sizes(), stride, padding, dilation, groups);
  Tensor dx = at::empty(input_size, dy.options().memory_format(memory_format(dy, weight)));
  if (dx.numel() == 0) return dx;
  with_type(dy.scalar_type(), "dy", [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Device device = current_device<T>();
    Conv<T> conv{shape, image_of<T>(dx), image_of<T>(dy)};
    const Kernel<T>& kernel = choose_kernel<T, Pass::kInputGrad>(conv, device);
    const Tensor image = readable(dy, kernel);
    const Tensor filter = readable(weight.narrow(0, 0, dy.size(1)).narrow(1, 0, shape.in_channels), kernel);
    conv.y = image_of<T>(image);
    conv.w = filter_of<T>(filter);
    prepare(conv);
    kernel.launch(conv, device, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dx;
}

void slim_conv2d_weight_grad_(const Tensor& dy, const Tensor& x, Tensor dweight, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  gradaug::check_conv_weight_grad(dy, x, dweight, stride, padding, dilation, groups);
  const c10::cuda::CUDAGuard guard(x.device());
  const Shape shape = shape_of(x.sizes(), dy.sizes(), dweight.sizes(), stride, padding, dilation, groups);
  if (dy.numel() == 0) return;
  with_type(x.scalar_type(), "x", [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Device device = current_device<T>();
    Conv<T> conv{shape, image_of<T>(x), image_of<T>(dy)};
    const Kernel<T>& kernel = choose_kernel<T, Pass::kWeightGrad>(conv, device);
    const Tensor image = readable(x, kernel), gradient = readable(dy, kernel);
    conv.x = image_of<T>(image);
    conv.y = image_of<T>(gradient);
    prepare(conv);
    conv.splits = weight_grad_splits(conv, kernel.blocks(conv), device);
    const auto dtype = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
    const Tensor partial = at::empty({weight_grad_workspace(conv)}, x.options().dtype(dtype));
    conv.partial = static_cast<Sum<T>*>(partial.data_ptr());
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    kernel.launch(conv, device, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    with_type(dweight.scalar_type(), "dweight", [&](auto* null_gradient) {
      using D = std::remove_pointer_t<decltype(null_gradient)>;
      launch_accumulate(conv, filter_of<D>(dweight), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gradaug, m) {
  m.def(
      "slim_conv2d_cuda_cpp(Tensor x, Tensor weight, Tensor? bias, int out_channels, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> Tensor");
  m.def(
      "slim_conv2d_input_grad_cuda_cpp(Tensor dy, Tensor weight, int[4] input_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> Tensor");
  m.def(
      "slim_conv2d_weight_grad__cuda_cpp(Tensor dy, Tensor x, Tensor(a!) dweight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> ()");
}

TORCH_LIBRARY_IMPL(gradaug, CUDA, m) {
  m.impl("slim_conv2d_cuda_cpp", slim_conv2d);
  m.impl("slim_conv2d_input_grad_cuda_cpp", slim_conv2d_input_grad);
  m.impl("slim_conv2d_weight_grad__cuda_cpp", slim_conv2d_weight_grad_);
}
