// The kernels of csrc/cuda/conv on the CPU. Cases: "forward", "input_grad", "weight_grad".
//
// integers  type of x, type of dweight (0 float16, 1 bfloat16, 2 float32, 3 float64), whether TF32 is allowed,
//           multiprocessors, architecture, Shape's fields in order, then offset and strides of x [n, h, w, c], y [n, h,
//           w, c], w [o, h, w, c] in elements
// tensors   x, y, w (dweight for the weight gradient), bias, 32 zeros for the name of the kernel that was chosen
#include <cstring>

#include "cuda/conv/paths.cuh"
#include "runner.h"

using namespace gradaug::conv;

template <typename T, Pass kPass>
const Kernel<T>& chosen_kernel(Case& c, const Conv<T>& conv, const Device& device) {
  const Kernel<T>& kernel = choose_kernel<T, kPass>(conv, device);
  std::strncpy(c.tensor<char>(4), kernel.name, 31);
  return kernel;
}

template <typename T, typename D>
void run_typed(Case& c) {
  Device device{};
  device.allow_tf32 = c.integer();
  device.multiprocessors = static_cast<int>(c.integer());
  device.architecture = static_cast<int>(c.integer());
  Conv<T> conv{};
  int* const fields[] = {
      &conv.shape.batch,    &conv.shape.in_h,        &conv.shape.in_w,         &conv.shape.out_h,
      &conv.shape.out_w,    &conv.shape.in_channels, &conv.shape.out_channels, &conv.shape.groups,
      &conv.shape.kernel_h, &conv.shape.kernel_w,    &conv.shape.stride_h,     &conv.shape.stride_w,
      &conv.shape.pad_h,    &conv.shape.pad_w,       &conv.shape.dilation_h,   &conv.shape.dilation_w};
  for (int* field : fields) *field = static_cast<int>(c.integer());
  auto image = [&](size_t index) {
    T* data = c.tensor<T>(index) + c.integer();
    const int64_t n = c.integer(), h = c.integer(), w = c.integer(), channel = c.integer();
    return Image<T>{data, n, h, w, channel};
  };
  conv.x = image(0);
  conv.y = image(1);
  const int64_t offset = c.integer(), o = c.integer(), h = c.integer(), w = c.integer(), i = c.integer();
  if (c.name == "weight_grad") {
    const Kernel<T>& kernel = chosen_kernel<T, Pass::kWeightGrad>(c, conv, device);
    prepare(conv);
    conv.splits = weight_grad_splits(conv, kernel.blocks(conv), device);
    const std::unique_ptr<Sum<T>[]> partial(new Sum<T>[weight_grad_workspace(conv)]);
    conv.partial = partial.get();
    kernel.launch(conv, device, nullptr);
    launch_accumulate(conv, Filter<D>{c.tensor<D>(2) + offset, o, h, w, i}, nullptr);
    return;
  }
  const Kernel<T>& kernel = c.name == "forward" ? chosen_kernel<T, Pass::kForward>(c, conv, device)
                                                : chosen_kernel<T, Pass::kInputGrad>(c, conv, device);
  conv.w = {c.tensor<T>(2) + offset, o, h, w, i};
  conv.bias = c.tensor<T>(3);
  prepare(conv);
  kernel.launch(conv, device, nullptr);
}

void run(Case& c) {
  const int64_t type = c.integer(), gradient_type = c.integer();
#define GRADAUG_RUN(number, T, gradient_number, D) \
  if (type == number && gradient_type == gradient_number) return run_typed<T, D>(c)
  GRADAUG_RUN(0, __half, 0, __half);
#ifndef ONLY_FLOAT16  // for the planted defects, which need one type and not the others' compile time
  GRADAUG_RUN(0, __half, 2, float);
  GRADAUG_RUN(1, __nv_bfloat16, 2, float);
  GRADAUG_RUN(2, float, 2, float);
  GRADAUG_RUN(3, double, 3, double);
#endif
  std::fprintf(stderr, "this runner has no kernels for these types\n");
  std::exit(2);
}

int main(int argc, char** argv) {
  return run_cases(argc, argv, {{"forward", run}, {"input_grad", run}, {"weight_grad", run}});
}
