// Instantiates the kernels that csrc/cuda/slim_conv2d.cu launches, without torch's headers.
#include "cuda/slim_conv2d.cuh"

namespace gradaug::conv {

#define GRADAUG_INSTANTIATE(T)                                                                             \
  template void launch_image<T, Pass::kForward>(const Conv<T>&, Path, int, cudaStream_t);                  \
  template void launch_image<T, Pass::kInputGrad>(const Conv<T>&, Path, int, cudaStream_t);                \
  template void launch_weight_grad(const Conv<T>&, const Filter<__half>&, Path, int, cudaStream_t);        \
  template void launch_weight_grad(const Conv<T>&, const Filter<__nv_bfloat16>&, Path, int, cudaStream_t); \
  template void launch_weight_grad(const Conv<T>&, const Filter<float>&, Path, int, cudaStream_t);         \
  template void launch_weight_grad(const Conv<T>&, const Filter<double>&, Path, int, cudaStream_t)

GRADAUG_INSTANTIATE(__half);
GRADAUG_INSTANTIATE(__nv_bfloat16);
GRADAUG_INSTANTIATE(float);
GRADAUG_INSTANTIATE(double);

}  // namespace gradaug::conv
