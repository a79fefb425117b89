// csrc/cuda/conv/mma_sm80.cuh on the CPU, written from the PTX manual. Registers hold the same bits in the same lanes
// as on a GPU, so a wrong fragment layout gives a wrong result. A copy that is not waited for never happens here: each
// one is kept until copy_async_wait asks for it.
#pragma once

#include <deque>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace gradaug {

namespace host {

struct Copy {
  void* shared;
  const void* source;
  int bytes, valid;
};
inline thread_local std::vector<Copy> open_group;
inline thread_local std::deque<std::vector<Copy>> groups;

}  // namespace host

template <int kBytes>
inline void copy_async(void* shared, const void* source, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  host_shim::require(
      reinterpret_cast<uintptr_t>(shared) % kBytes == 0 && reinterpret_cast<uintptr_t>(source) % kBytes == 0,
      "both ends of an asynchronous copy must be aligned to its size");
  host_shim::require(valid >= 0 && valid <= kBytes, "an asynchronous copy must read between 0 and all its bytes");
  host::open_group.push_back({shared, source, kBytes, valid});
}

inline void copy_async_commit() {
  host::groups.push_back(std::move(host::open_group));
  host::open_group.clear();
}

template <int kPending>
inline void copy_async_wait() {
  while (host::groups.size() > kPending) {
    for (const host::Copy& copy : host::groups.front()) {
      std::memcpy(copy.shared, copy.source, copy.valid);
      std::memset(static_cast<unsigned char*>(copy.shared) + copy.valid, 0, copy.bytes - copy.valid);
    }
    host::groups.pop_front();
  }
}

template <bool kTransposed, int kCount>
inline void load_matrices(uint32_t (&registers)[kCount][4], const void* const (&rows)[kCount]) {
  struct Rows {
    const unsigned char* row[kCount];
  } mine;
  for (int i = 0; i < kCount; ++i) {
    mine.row[i] = static_cast<const unsigned char*>(rows[i]);
    host_shim::require(reinterpret_cast<uintptr_t>(rows[i]) % 16 == 0, "a matrix row must be aligned to 16 bytes");
  }
  const host_shim::Shown<Rows> shown(mine);
  const int lane = host_shim::lane();
  for (int i = 0; i < kCount; ++i) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned char* target = reinterpret_cast<unsigned char*>(&registers[i][matrix]);
      if (kTransposed) {
        for (int j = 0; j < 2; ++j) {
          std::memcpy(target + 2 * j, shown[8 * matrix + 2 * (lane % 4) + j].row[i] + 2 * (lane / 4), 2);
        }
      } else {
        std::memcpy(target, shown[8 * matrix + lane / 4].row[i] + 4 * (lane % 4), 4);
      }
    }
  }
}

// To nearest, ties away from zero, as cvt.rna does.
inline uint32_t round_to_tf32(uint32_t bits) { return (bits + 0x1000u) & ~0x1fffu; }

namespace host {

template <typename T>
float element(uint32_t bits, int index) {
  const uint16_t half = static_cast<uint16_t>(bits >> (16 * index));
  if constexpr (std::is_same_v<T, __half>) return __half2float({half});
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float({half});
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(bits & ~0x1fffu);
}

}  // namespace host

template <typename T, int kM, int kN>
inline void multiply_accumulate(float (&sums)[kM][kN][4], const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][2]) {
  struct Fragments {
    uint32_t a[kM][4], b[kN][2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const host_shim::Shown<Fragments> shown(mine);
  constexpr int kPerRegister = 4 / sizeof(T), kK = 8 * kPerRegister, kHalf = kK / 2;
  // Element (row, k) of a lies in lane 4 * (row % 8) + (k % kHalf) / kPerRegister, register row / 8 + 2 * (k / kHalf);
  // element (k, column) of b in lane 4 * column + (k % kHalf) / kPerRegister, register k / kHalf.
  float left[kM][2][kK], right[kN][2][kK];
  const int lane = host_shim::lane();
  for (int k = 0; k < kK; ++k) {
    const int holder = k % kHalf / kPerRegister, index = k % kPerRegister;
    for (int i = 0; i < kM; ++i) {
      for (int half = 0; half < 2; ++half) {
        left[i][half][k] = host::element<T>(shown[4 * (lane / 4) + holder].a[i][half + 2 * (k / kHalf)], index);
      }
    }
    for (int j = 0; j < kN; ++j) {
      for (int side = 0; side < 2; ++side) {
        right[j][side][k] = host::element<T>(shown[4 * (2 * (lane % 4) + side) + holder].b[j][k / kHalf], index);
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      for (int part = 0; part < 4; ++part) {
        float sum = sums[i][j][part];
        for (int k = 0; k < kK; ++k) sum += left[i][part / 2][k] * right[j][part % 2][k];
        sums[i][j][part] = sum;
      }
    }
  }
}

}  // namespace gradaug
