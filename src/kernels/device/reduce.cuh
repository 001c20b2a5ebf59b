// Sums over warps, blocks and rows, each in a fixed order.
#pragma once

#include "kernels/device/vector.cuh"

namespace uly::kernels {

template <typename V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The same for each of N values over groups of threads.
template <int N>
__device__ __forceinline__ void group_sums(float (&v)[N], Lanes lanes) {
  for (int offset = lanes.count / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += __shfl_xor_sync(0xffffffffu, v[k], offset);
  }
}

// Every thread gets the sum, after one barrier. `shared` has a value a warp and must not be that of the call before.
__device__ __forceinline__ float alternating_block_sum(float v, float* shared) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += shared[warp];
  return sum;
}

// Every thread gets the sum. `shared` has room for 33 values; whole warps only.
template <typename V>
__device__ __forceinline__ V block_sum(V v, V* shared) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < warps ? shared[lane] : V{});
    if (lane == 0) shared[32] = v;
  }
  __syncthreads();
  return shared[32];
}

// total[j] += sum over b of partial[b][j]; 32 columns a block of 32 x 32 threads.
static __global__ void __launch_bounds__(1024) add_partial_rows_kernel(float* total, const float* partial, int64_t blocks, int64_t columns) {
  __shared__ float shared[32][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0;
  if (column < columns)
    for (int64_t b = threadIdx.y; b < blocks; b += 32) sum += partial[b * columns + column];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = warp_sum(shared[threadIdx.x][threadIdx.y]);  // transposed: a warp now holds one column
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && mine < columns) total[mine] += sum;
}

inline void add_partial_rows(const char* kernel, void* total, const void* partial, int64_t blocks, int64_t columns, Stream stream) {
  add_partial_rows_kernel<<<static_cast<unsigned>((columns + 31) / 32), dim3(32, 32), 0, stream>>>(static_cast<float*>(total),
                                                                                                   static_cast<const float*>(partial), blocks, columns);
  check_launch(kernel);
}

}  // namespace uly::kernels
