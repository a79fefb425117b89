// What the processor has: nothing else asks it.
#pragma once

namespace gradaug::cpu {

// What PyTorch itself would use, so that ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it, and what its name for that
// leaves open.
struct Processor {
  bool avx2 = false, avx512 = false;                                // AVX2 has FMA and F16C, AVX-512 is F, BW, DQ, VL
  bool avx512_bf16 = false, avx512_fp16 = false, amx_bf16 = false;  // none without avx512
};

const Processor& processor();

}  // namespace gradaug::cpu
