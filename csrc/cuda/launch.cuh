// How a kernel is launched and how it gets dynamic shared memory. Without nvcc, the same kernels run on the CPU:
// tests/kernels_gpu/host_shim/include gives these macros, and CUDA's keywords, their meaning there.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

// A kernel's name with a comma in it must be given through a variable: auto* kernel = f<a, b>.
#define GRADAUG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

#define GRADAUG_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#else

#include "host_launch.h"

#endif
