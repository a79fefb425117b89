// The kernels of norm/table.h for any processor.
#include "cpu/norm/instantiate.h"

namespace gradaug::batch_norm {

template <typename T>
const NormKernels<T>& BaselineKernels::get() {
  return norm_table<Vectors<T, 16>>;
}

template const NormKernels<float>& BaselineKernels::get();
template const NormKernels<double>& BaselineKernels::get();
template const NormKernels<c10::BFloat16>& BaselineKernels::get();
template const NormKernels<c10::Half>& BaselineKernels::get();

}  // namespace gradaug::batch_norm
