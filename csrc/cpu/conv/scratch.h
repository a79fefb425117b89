// Memory of the kernels: packed weights, transformed images, partial sums.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>

namespace gradaug::cpu {

// Floats, not initialised, aligned to a cache line. Large blocks are in huge pages where the system has them: some
// systems need as long to provide a block in small ones as a convolution needs to fill it.
class Buffer {
 public:
  explicit Buffer(int64_t floats);

  float* data() const { return data_; }

 private:
  c10::DataPtr memory_;
  float* data_;
};

}  // namespace gradaug::cpu
