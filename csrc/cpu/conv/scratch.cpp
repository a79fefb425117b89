#include "cpu/conv/scratch.h"

#include <c10/core/CPUAllocator.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gradaug::cpu {
namespace {

constexpr int64_t kLarge = 1 << 20;  // bytes
constexpr int64_t kHugePage = 2 << 20;

}  // namespace

Buffer::Buffer(int64_t floats) {
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (bytes < kLarge) {
    memory_ = c10::GetCPUAllocator()->allocate(bytes);
    data_ = static_cast<float*>(memory_.get());
    return;
  }
  const int64_t pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  memory_ = c10::GetCPUAllocator()->allocate(pages + kHugePage);
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  data_ = reinterpret_cast<float*>((address + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(data_, pages, MADV_HUGEPAGE);  // a hint: small pages serve where it is refused
#endif
}

}  // namespace gradaug::cpu
