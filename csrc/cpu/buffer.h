// Memory of the kernels: packed weights, transformed images, partial sums.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>

namespace gradaug::cpu {

// Floats, not initialised, aligned to a cache line. Large blocks are in huge pages, and are kept when they are freed,
// up to a limit, to be used again: the C library returns them to the system, which needs as long to provide and clear
// their pages as a convolution needs to fill them.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  Buffer(Buffer&& other) = default;
  Buffer& operator=(Buffer&& other);
  ~Buffer();

  float* data() const { return data_; }

 private:
  c10::DataPtr memory_;
  int64_t bytes_;
  float* data_;
};

}  // namespace gradaug::cpu
