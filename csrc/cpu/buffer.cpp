#include "buffer.h"

#include <c10/core/CPUAllocator.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <mutex>
#include <utility>
#include <vector>

namespace gradaug::cpu {
namespace {

constexpr int64_t kLarge = 1 << 20;      // bytes from which on a block is kept
constexpr int64_t kMostKept = 64 << 20;  // bytes in all that are kept while nobody uses them
constexpr int64_t kHugePage = 2 << 20;

struct Block {
  c10::DataPtr memory;
  int64_t bytes = 0;
};

// Blocks in the order of their last use.
class Kept {
 public:
  // The smallest block of at least, and at most about twice, that many bytes; one of 0 bytes where there is none.
  Block take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes <= 2 * bytes + kHugePage;
      if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == blocks_.end()) return {};
    Block found = std::move(*best);
    blocks_.erase(best);
    total_ -= found.bytes;
    return found;
  }

  // Keeps the block, and as many of the others as the limit allows.
  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    if (block.bytes > kMostKept) return;
    total_ += block.bytes;
    blocks_.push_back(std::move(block));
    for (; total_ > kMostKept; blocks_.erase(blocks_.begin())) total_ -= blocks_.front().bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t total_ = 0;
};

Kept& kept() {
  static auto* const instance = new Kept;  // never destroyed: threads may outlive static objects
  return *instance;
}

// The first huge page that starts in a block.
float* aligned(const c10::DataPtr& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<float*>((address + kHugePage - 1) / kHugePage * kHugePage);
}

// Of at least that many bytes from `aligned` on.
Block large_block(int64_t bytes) {
  const int64_t pages = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Block block{c10::GetCPUAllocator()->allocate(pages + kHugePage), pages};
#ifdef MADV_HUGEPAGE
  madvise(aligned(block.memory), pages, MADV_HUGEPAGE);  // a hint: small pages serve where it is refused
#endif
  return block;
}

}  // namespace

Buffer::Buffer(int64_t floats) : bytes_(floats * static_cast<int64_t>(sizeof(float))) {
  if (bytes_ < kLarge) {
    memory_ = c10::GetCPUAllocator()->allocate(bytes_);
    data_ = static_cast<float*>(memory_.get());
    return;
  }
  Block block = kept().take(bytes_);
  if (block.bytes == 0) block = large_block(bytes_);
  memory_ = std::move(block.memory);
  bytes_ = block.bytes;
  data_ = aligned(memory_);
}

Buffer& Buffer::operator=(Buffer&& other) {
  std::swap(memory_, other.memory_);
  std::swap(bytes_, other.bytes_);
  std::swap(data_, other.data_);
  return *this;
}

Buffer::~Buffer() {
  if (memory_ && bytes_ >= kLarge) kept().keep({std::move(memory_), bytes_});
}

}  // namespace gradaug::cpu
