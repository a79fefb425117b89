// The shim's own parts: what they do on a GPU, they must do here.
//
//   "convert"   tensors: float32 values, their float16 and their bfloat16; integers: count
//   "widen"     tensors: float16 and bfloat16 values, both in float32; integers: count
//   "shuffles"  tensors: int32 [4, 64] of xor, down, up and broadcast of the thread's index, in segments of 16 lanes
//   "copy"      tensors: float32 [4] read before and after the wait for an asynchronous copy of the first 3 of 4 values
//   "sum"       tensors: float32 values, one float32: their sum by blocks of 64 threads in shared memory
#include "cuda/conv/mma_sm80.cuh"
#include "cuda/launch.cuh"
#include "runner.h"

__global__ void convert_kernel(const float* values, __half* halves, __nv_bfloat16* bfloats, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  halves[i] = __float2half_rn(values[i]);
  bfloats[i] = __float2bfloat16_rn(values[i]);
}

__global__ void widen_kernel(const __half* halves, const __nv_bfloat16* bfloats, float* from_half, float* from_bfloat,
                             int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  from_half[i] = __half2float(halves[i]);
  from_bfloat[i] = __bfloat162float(bfloats[i]);
}

__global__ void shuffle_kernel(int* results) {
  const int i = threadIdx.x;
  results[i] = __shfl_xor_sync(0xffffffffu, i, 5, 16);
  results[64 + i] = __shfl_down_sync(0xffffffffu, i, 3, 16);
  results[128 + i] = __shfl_up_sync(0xffffffffu, i, 3, 16);
  results[192 + i] = __shfl_sync(0xffffffffu, i, 7, 16);
}

// Each block adds its 64 values in a tree, and its result to the sum: blocks run one after another.
__global__ void sum_kernel(const float* values, float* sum) {
  GRADAUG_DYNAMIC_SHARED(bytes);
  float* tree = reinterpret_cast<float*>(bytes);
  __shared__ float total;
  tree[threadIdx.x] = values[blockIdx.x * 64 + threadIdx.x];
  for (int width = 32; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(width)) tree[threadIdx.x] += tree[threadIdx.x + width];
  }
  if (threadIdx.x == 0) total = tree[0];
  __syncthreads();
  if (threadIdx.x == 63) *sum += total;
}

__global__ void copy_kernel(float* before, float* after, const float* values) {
  GRADAUG_DYNAMIC_SHARED(bytes);
  const float* copied = reinterpret_cast<const float*>(bytes);
  gradaug::copy_async<16>(bytes, values, 12);
  gradaug::copy_async_commit();
  gradaug::copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) before[i] = copied[i];
  gradaug::copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) after[i] = copied[i];
}

int main(int argc, char** argv) {
  return run_cases(
      argc, argv,
      {{"convert",
        [](Case& c) {
          const int count = static_cast<int>(c.integer());
          GRADAUG_LAUNCH(convert_kernel, dim3((count + 63) / 64), dim3(64), 0, nullptr, c.tensor<float>(0),
                         c.tensor<__half>(1), c.tensor<__nv_bfloat16>(2), count);
        }},
       {"widen",
        [](Case& c) {
          const int count = static_cast<int>(c.integer());
          GRADAUG_LAUNCH(widen_kernel, dim3((count + 63) / 64), dim3(64), 0, nullptr, c.tensor<__half>(0),
                         c.tensor<__nv_bfloat16>(1), c.tensor<float>(2), c.tensor<float>(3), count);
        }},
       {"shuffles", [](Case& c) { GRADAUG_LAUNCH(shuffle_kernel, dim3(1), dim3(64), 0, nullptr, c.tensor<int>(0)); }},
       {"copy",
        [](Case& c) {
          GRADAUG_LAUNCH(copy_kernel, dim3(1), dim3(1), 16, nullptr, c.tensor<float>(0), c.tensor<float>(1),
                         c.tensor<float>(2));
        }},
       {"sum", [](Case& c) {
          const int blocks = static_cast<int>(c.integer());
          GRADAUG_LAUNCH(sum_kernel, dim3(blocks), dim3(64), 64 * sizeof(float), nullptr, c.tensor<float>(0),
                         c.tensor<float>(1));
        }}});
}
