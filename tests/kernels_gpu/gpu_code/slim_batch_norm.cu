// Instantiates the kernels that csrc/cuda/slim_batch_norm.cu launches, without torch's headers.
#include "cuda/slim_batch_norm.cuh"

namespace gradaug::batch_norm {

#define GRADAUG_INSTANTIATE(T)                                                                              \
  template void launch_forward(const Plan&, const ForwardTensors<T>&, bool, double, double*, cudaStream_t); \
  template void launch_backward(const Plan&, const BackwardTensors<T>&, bool, double, double*, cudaStream_t)

GRADAUG_INSTANTIATE(__half);
GRADAUG_INSTANTIATE(__nv_bfloat16);
GRADAUG_INSTANTIATE(float);
GRADAUG_INSTANTIATE(double);

}  // namespace gradaug::batch_norm
