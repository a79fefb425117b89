// The kernels of csrc/cuda/slim_conv2d.cuh on the CPU. Cases: "forward", "input_grad", "weight_grad".
//
// integers  type of x, type of dweight (0 float16, 1 bfloat16, 2 float32, 3 float64), whether TF32 is allowed,
//           multiprocessors, Shape's fields in order, then offset and strides of x [n, h, w, c], y [n, h, w, c],
//           w [o, h, w, c] in elements
// tensors   x, y, w (dweight for the weight gradient), bias
#include "cuda/slim_conv2d.cuh"
#include "runner.h"

using namespace gradaug::conv;

template <typename T, typename D>
void run_typed(Case& c) {
  const bool allow_tf32 = c.integer();
  const int multiprocessors = static_cast<int>(c.integer());
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
  const Path path = choose_path<T>(conv.shape, allow_tf32);
  if (c.name == "weight_grad") {
    conv.w = {nullptr, o, h, w, i};
    prepare(conv);
    conv.splits = weight_grad_splits(conv, path, multiprocessors);
    const std::unique_ptr<Sum<T>[]> partial(new Sum<T>[weight_grad_workspace(conv)]);
    conv.partial = partial.get();
    launch_weight_grad(conv, Filter<D>{c.tensor<D>(2) + offset, o, h, w, i}, path, multiprocessors, nullptr);
    return;
  }
  conv.w = {c.tensor<T>(2) + offset, o, h, w, i};
  conv.bias = c.tensor<T>(3);
  prepare(conv);
  if (c.name == "forward") {
    launch_image<T, Pass::kForward>(conv, path, multiprocessors, nullptr);
  } else {
    launch_image<T, Pass::kInputGrad>(conv, path, multiprocessors, nullptr);
  }
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
