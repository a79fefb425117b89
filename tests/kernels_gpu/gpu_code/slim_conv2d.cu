// Instantiates the kernels that csrc/cuda/slim_conv2d.cu launches, without torch's headers.
#include "cuda/conv/paths.cuh"

namespace gradaug::conv {

#define GRADAUG_INSTANTIATE(T)                                                                  \
  template const Kernel<T>& choose_kernel<T, Pass::kForward>(const Conv<T>&, const Device&);    \
  template const Kernel<T>& choose_kernel<T, Pass::kInputGrad>(const Conv<T>&, const Device&);  \
  template const Kernel<T>& choose_kernel<T, Pass::kWeightGrad>(const Conv<T>&, const Device&); \
  template void launch_accumulate(const Conv<T>&, const Filter<__half>&, cudaStream_t);         \
  template void launch_accumulate(const Conv<T>&, const Filter<__nv_bfloat16>&, cudaStream_t);  \
  template void launch_accumulate(const Conv<T>&, const Filter<float>&, cudaStream_t);          \
  template void launch_accumulate(const Conv<T>&, const Filter<double>&, cudaStream_t)

GRADAUG_INSTANTIATE(__half);
GRADAUG_INSTANTIATE(__nv_bfloat16);
GRADAUG_INSTANTIATE(float);
GRADAUG_INSTANTIATE(double);

}  // namespace gradaug::conv
