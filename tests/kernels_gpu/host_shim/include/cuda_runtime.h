// CUDA's keywords and built-ins on the CPU, as far as csrc/cuda uses them. A kernel's block is a team of std::thread,
// one for each CUDA thread, so that ThreadSanitizer sees what the kernel's own barriers order and what they do not.
// Blocks run one after another. What a missing __syncthreads leaves unordered is therefore a data race here, too, and
// what lies outside a buffer is outside a heap or static object, which AddressSanitizer guards.
//
//   __shared__ T name[n]        a static array: one block at a time uses it
//   dynamic shared memory       a heap block of the launch's exact size, filled with NaN bytes before every block
//   __syncthreads, __syncwarp   a pthread barrier of the block's, the warp's threads; a thread that does not come is
//                               waited for until the runner's alarm: no thread of a block may return before a barrier
//   warp shuffles               an exchange through memory of the warp, of all its lanes (the mask must be full); it
//                               orders their other memory accesses too, which a GPU does not promise
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// GCC's ThreadSanitizer does not see a store whose value a function returns, as in *p = make_float2(x, y). An
// assignment of their own makes such stores of CUDA's small structures visible.
#define GRADAUG_VECTOR2(name, scalar, bytes) \
  struct alignas(bytes) name {               \
    scalar x, y;                             \
    name& operator=(const name& other) {     \
      x = other.x;                           \
      y = other.y;                           \
      return *this;                          \
    }                                        \
  }
#define GRADAUG_VECTOR4(name, scalar, bytes) \
  struct alignas(bytes) name {               \
    scalar x, y, z, w;                       \
    name& operator=(const name& other) {     \
      x = other.x;                           \
      y = other.y;                           \
      z = other.z;                           \
      w = other.w;                           \
      return *this;                          \
    }                                        \
  }
GRADAUG_VECTOR2(float2, float, 8);
GRADAUG_VECTOR4(float4, float, 16);
GRADAUG_VECTOR2(uint2, unsigned, 8);
GRADAUG_VECTOR4(uint4, unsigned, 16);
GRADAUG_VECTOR2(int2, int, 8);
GRADAUG_VECTOR4(int4, int, 16);
GRADAUG_VECTOR2(double2, double, 16);
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace host_shim {

constexpr int kMaxExchange = 512;  // bytes a lane can show its warp at once

// Two pthread barriers in turn. ThreadSanitizer lets a thread that wakes up late from a barrier acquire what others
// released to the same barrier since; with a single one, they would have been through their next piece of the kernel,
// and a missing barrier in it would go unnoticed.
class Barrier {
 public:
  explicit Barrier(unsigned threads) {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~Barrier() {
    for (pthread_barrier_t& barrier : barriers_) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;
  void wait(unsigned& turn) { pthread_barrier_wait(&barriers_[turn ^= 1]); }

 private:
  pthread_barrier_t barriers_[2];
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes), lanes(lanes) {}
  Barrier barrier;
  unsigned lanes;
  // Two buffers in turn: a lane may write the next one while another still reads this one.
  alignas(16) unsigned char slots[2][32][kMaxExchange];
};

struct Team {
  explicit Team(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += 32) {
      warps.push_back(std::make_unique<Warp>(std::min(32u, threads - first)));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
};

inline thread_local Team* team;
inline thread_local unsigned thread_index, exchange_turn, block_turn, warp_turn;

inline void wait_for_block() { team->barrier.wait(block_turn); }

inline unsigned lane() { return thread_index % 32; }
inline Warp& warp() { return *team->warps[thread_index / 32]; }
inline void wait_for_warp() { warp().barrier.wait(warp_turn); }

// Shows `mine` to the warp and returns what every lane showed.
template <typename T>
const T* exchange(const T& mine, size_t& stride) {
  static_assert(sizeof(T) <= kMaxExchange);
  auto& slots = warp().slots[exchange_turn];
  exchange_turn ^= 1;
  std::memcpy(slots[lane()], &mine, sizeof(T));
  wait_for_warp();
  stride = kMaxExchange;
  return reinterpret_cast<const T*>(slots);
}

// What all lanes of the warp showed: shown[lane].
template <typename T>
class Shown {
 public:
  explicit Shown(const T& mine) { data_ = reinterpret_cast<const unsigned char*>(exchange(mine, stride_)); }
  const T& operator[](unsigned lane) const { return *reinterpret_cast<const T*>(data_ + lane * stride_); }

 private:
  size_t stride_;
  const unsigned char* data_;
};

inline void require(bool condition, const char* sentence) {
  if (!condition) {
    std::fprintf(stderr, "host shim: %s\n", sentence);
    std::abort();
  }
}

// shfl: lanes outside the segment of `width` lanes, or outside the warp, give back the caller's own value.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool inside) {
  require(mask == 0xffffffffu && warp().lanes == 32, "shuffles must name all lanes of a full warp");
  Shown<T> shown(value);
  return inside ? shown[source] : value;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  require(threads >= 1 && threads <= 1024, "a block must have between 1 and 1024 threads");
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "a grid must have at least one block");
  require(grid.y <= 65535 && grid.z <= 65535, "a grid must have at most 65535 blocks along y and z");
  require(shared_bytes <= 48 * 1024, "a launch must ask for at most 48 KiB of dynamic shared memory");
  Team own_team(threads);
  auto run = [&](unsigned index) {
    team = &own_team;
    thread_index = index;
    exchange_turn = block_turn = warp_turn = 0;
    threadIdx = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
    blockDim = block;
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          if (index == 0 && shared_bytes > 0) {
            own_team.shared = static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
            std::memset(own_team.shared, 0xff, shared_bytes);
          }
          wait_for_block();
          kernel(arguments...);
          wait_for_block();
          if (index == 0) {
            std::free(own_team.shared);
            own_team.shared = nullptr;
          }
        }
      }
    }
  };
  std::vector<std::thread> workers;
  for (unsigned index = 0; index < threads; ++index) workers.emplace_back(run, index);
  for (auto& worker : workers) worker.join();
}

}  // namespace host_shim

inline void __syncthreads() { host_shim::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  host_shim::require(mask == 0xffffffffu, "__syncwarp must name all lanes");
  host_shim::wait_for_warp();
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = host_shim::lane();
  return host_shim::shuffle(mask, value, lane / width * width + source % width, true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = host_shim::lane(), source = lane ^ lane_mask;
  return host_shim::shuffle(mask, value, source, source / width <= lane / width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = host_shim::lane();
  return host_shim::shuffle(mask, value, lane + delta, lane % width + delta < width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = host_shim::lane();
  return host_shim::shuffle(mask, value, lane - delta, lane % width >= delta);
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
using std::max;
using std::min;
