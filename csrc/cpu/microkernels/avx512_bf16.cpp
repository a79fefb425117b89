// The kernels for AVX-512 with AVX512_BF16. Only bfloat16 is served: other types have nothing to gain.
#include "cpu/microkernels/kernel_tables.h"

#if defined(__x86_64__)
#include "cpu/simd/target.h"

GRADAUG_TARGET_BEGIN("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

#include "cpu/microkernels/instantiate.h"
#include "cpu/norm/instantiate.h"
#include "cpu/simd/avx512.h"

namespace gradaug::cpu {

constinit const KernelTables avx512_bf16_kernels = {
    .gemm = &gemm_table<Avx512<true>>,
    .depthwise = &Depthwise<Avx512<true>>::table,
    .norm = {.bf16 = &batch_norm::norm_table<batch_norm::Avx512Bf16Elements>},
};

}  // namespace gradaug::cpu

GRADAUG_TARGET_END
#endif
