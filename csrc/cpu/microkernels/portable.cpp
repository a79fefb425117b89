// The kernels of norm/table.h for any processor.
#include "cpu/norm/rows.h"

namespace gradaug::batch_norm {

template <typename T>
const Kernels<T>& BaselineKernels::get() {
  return Table<Vectors<T, 16>>::kernels;
}

template const Kernels<float>& BaselineKernels::get();
template const Kernels<double>& BaselineKernels::get();
template const Kernels<c10::BFloat16>& BaselineKernels::get();
template const Kernels<c10::Half>& BaselineKernels::get();

}  // namespace gradaug::batch_norm
