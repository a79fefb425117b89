// csrc/cuda/launch.cuh on the CPU. The stream is ignored: a launch returns when its last block has run.
#pragma once

#include "cuda_runtime.h"

#define GRADAUG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), host_shim::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))

#define GRADAUG_DYNAMIC_SHARED(name) unsigned char* name = host_shim::team->shared
