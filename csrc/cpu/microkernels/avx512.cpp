// The kernels for AVX-512 (F, BW, DQ, VL).
#include "cpu/microkernels/kernel_tables.h"

#if defined(__x86_64__)
#include "cpu/simd/target.h"

GRADAUG_TARGET_BEGIN("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl")

#include "cpu/microkernels/instantiate.h"
#include "cpu/norm/instantiate.h"
#include "cpu/simd/avx512.h"

namespace gradaug::cpu {

constinit const KernelTables avx512_kernels = {
    .gemm = &gemm_table<Avx512<false>>,
    .depthwise = &Depthwise<Avx512<false>>::table,
    .norm = batch_norm::norm_tables<batch_norm::Avx512Elements>,
};

}  // namespace gradaug::cpu

GRADAUG_TARGET_END
#endif
