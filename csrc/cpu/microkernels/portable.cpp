// The kernels for any processor: of batch norm. Convolutions are PyTorch's there.
#include "cpu/norm/instantiate.h"

namespace gradaug::cpu {

constinit const KernelTables portable_kernels = {
    .norm = batch_norm::norm_tables<batch_norm::PortableElements>,
};

}  // namespace gradaug::cpu
