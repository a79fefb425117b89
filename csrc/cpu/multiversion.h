// One source, several instruction sets: run<Kernel>(args...) calls Kernel::run(args...), compiled for the best
// instruction set that the machine has and torch uses (ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it).
//
// Kernel::run must be GRADAUG_INLINE, like everything that it calls, and must not contain lambdas: what is inlined is
// compiled for the caller's instruction set, what is not stays at the baseline.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace gradaug {

#if defined(__x86_64__) && defined(__GNUC__)

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa isa() {
  static const Isa chosen = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Isa::kAvx512 : name == "AVX2" ? Isa::kAvx2 : Isa::kBaseline;
  }();
  return chosen;
}

template <typename Kernel, typename... Args>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_avx512(const Args&... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
__attribute__((noinline, target("avx2,fma"))) void run_avx2(const Args&... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
__attribute__((noinline)) void run_baseline(const Args&... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
void run(const Args&... args) {
  switch (isa()) {
    case Isa::kAvx512:
      return run_avx512<Kernel>(args...);
    case Isa::kAvx2:
      return run_avx2<Kernel>(args...);
    default:
      return run_baseline<Kernel>(args...);
  }
}

#else

template <typename Kernel, typename... Args>
void run(const Args&... args) {
  Kernel::run(args...);
}

#endif

}  // namespace gradaug
