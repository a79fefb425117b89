// The kernels for AVX2, with FMA and F16C.
#include "cpu/microkernels/kernel_tables.h"

#if defined(__x86_64__)
#include "cpu/simd/target.h"

GRADAUG_TARGET_BEGIN("avx2,fma,f16c,prfchw")

#include "cpu/microkernels/instantiate.h"
#include "cpu/norm/instantiate.h"
#include "cpu/simd/avx2.h"

namespace gradaug::cpu {

constinit const KernelTables avx2_kernels = {
    .gemm = &gemm_table<Avx2>,
    .depthwise = &Depthwise<Avx2>::table,
    .norm = batch_norm::norm_tables<batch_norm::Avx2Elements>,
};

}  // namespace gradaug::cpu

GRADAUG_TARGET_END
#endif
