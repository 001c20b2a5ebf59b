// Loads and stores of W adjacent elements as fp32, and launches over the elements of a matrix.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "kernels/access.h"

namespace uly::kernels {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) launch_failed(kernel, cudaGetErrorString(error));
}

inline void check_call(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) launch_failed(kernel, cudaGetErrorString(error));
}

// Whether vectors of W elements can be loaded from these at every multiple of W, in rows of `columns`.
template <int W>
bool vectors_fit(int64_t columns, std::initializer_list<Matrix> matrices) {
  if (columns % W != 0) return false;
  for (const Matrix& m : matrices) {
    const int64_t bytes = W * (m.dtype == Dtype::kBf16 ? 2 : 4);
    if (reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(bytes > 16 ? 16 : bytes) != 0) return false;
    if (m.rows > 1 && m.stride % W != 0) return false;
  }
  return true;
}

// A vector as a matrix without rows to step over, for vectors_fit.
inline Matrix as_vector(Matrix m) {
  m.rows = 1;
  return m;
}

__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

// One instruction for both; the bits of to_bf16, but for which NaN a NaN becomes.
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <int W>
__device__ __forceinline__ void load(const float* p, float (&v)[W]) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(p + i);
      v[i] = x.x, v[i + 1] = x.y, v[i + 2] = x.z, v[i + 3] = x.w;
    }
  } else {
    static_assert(W == 1);
    v[0] = *p;
  }
}

template <int W>
__device__ __forceinline__ void load(const Bf16* p, float (&v)[W]) {
  if constexpr (W == 8) {
    const uint4 x = *reinterpret_cast<const uint4*>(p);
    unpack_pair(x.x, v[0], v[1]), unpack_pair(x.y, v[2], v[3]), unpack_pair(x.z, v[4], v[5]), unpack_pair(x.w, v[6], v[7]);
  } else if constexpr (W == 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    unpack_pair(x.x, v[0], v[1]), unpack_pair(x.y, v[2], v[3]);
  } else {
    static_assert(W == 1);
    v[0] = to_float(*p);
  }
}

// The same where the type is known only when the kernel runs; all threads take one branch.
template <int W>
__device__ __forceinline__ void load_any(const Matrix& m, int64_t element, float (&v)[W]) {
  if (m.dtype == Dtype::kBf16)
    load(static_cast<const Bf16*>(m.data) + element, v);
  else
    load(static_cast<const float*>(m.data) + element, v);
}

template <int W>
__device__ __forceinline__ void store(float* p, const float (&v)[W]) {
  if constexpr (W % 4 == 0) {
#pragma unroll
    for (int i = 0; i < W; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  } else {
    *p = v[0];
  }
}

template <int W>
__device__ __forceinline__ void store(Bf16* p, const float (&v)[W]) {
  if constexpr (W == 8)
    *reinterpret_cast<uint4*>(p) = make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]), pack_pair(v[6], v[7]));
  else if constexpr (W == 4)
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]));
  else
    *p = to_bf16(v[0]);
}

// W adjacent elements as they lie in memory: until they are used, bf16 takes half the registers of fp32.
template <typename T, int W>
struct Held {
  static constexpr int kWords = W * static_cast<int>(sizeof(T)) / 16;
  static_assert(kWords * 16 == W * static_cast<int>(sizeof(T)));
  uint4 words[kWords];

  __device__ __forceinline__ void fetch(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ __forceinline__ void put(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(p)[i] = words[i];
  }
  __device__ __forceinline__ void get(float (&v)[W]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint4 x = words[i];
      if constexpr (sizeof(T) == 2) {
        unpack_pair(x.x, v[8 * i], v[8 * i + 1]), unpack_pair(x.y, v[8 * i + 2], v[8 * i + 3]);
        unpack_pair(x.z, v[8 * i + 4], v[8 * i + 5]), unpack_pair(x.w, v[8 * i + 6], v[8 * i + 7]);
      } else {
        v[4 * i] = __uint_as_float(x.x), v[4 * i + 1] = __uint_as_float(x.y);
        v[4 * i + 2] = __uint_as_float(x.z), v[4 * i + 3] = __uint_as_float(x.w);
      }
    }
  }
};

template <typename T>
struct Held<T, 1> {
  T value;

  __device__ __forceinline__ void fetch(const T* p) { value = *p; }
  __device__ __forceinline__ void put(T* p) const { *p = value; }
  __device__ __forceinline__ void get(float (&v)[1]) const { v[0] = to_float(value); }
};

// Elements of 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Threads of one warp that work on a head together: a power of two, enough for a vector each, at most 32.
struct Lanes {
  int count, log2;

  // Which group of its block a thread belongs to, which thread of the group it is, and how many groups a block of 256 has.
  __device__ __forceinline__ int group() const { return static_cast<int>(threadIdx.x) >> log2; }
  __device__ __forceinline__ int mine() const { return static_cast<int>(threadIdx.x) & (count - 1); }
  __host__ __device__ __forceinline__ int groups() const { return 256 >> log2; }
};

inline Lanes lanes_for(int64_t vectors) {
  Lanes lanes{1, 0};
  while (lanes.count < 32 && lanes.count < vectors) lanes = {lanes.count * 2, lanes.log2 + 1};
  return lanes;
}

// Where unit = row * per_row + place lies.
struct Place {
  int64_t row, place;
};

__device__ __forceinline__ Place place_of(int64_t unit, int64_t per_row) {
  if ((unit | per_row) >> 32 != 0) return {unit / per_row, unit % per_row};
  const uint32_t row = static_cast<uint32_t>(unit) / static_cast<uint32_t>(per_row);
  return {row, static_cast<uint32_t>(unit) - row * static_cast<uint32_t>(per_row)};
}

// Returns a grid for so many units. A grid holds 2^31 - 1 blocks; no device has the memory for units that need more.
inline unsigned blocks_for(int64_t units, int64_t per_block) { return static_cast<unsigned>((units + per_block - 1) / per_block); }

// Blocks of tx x ty threads: tx along columns, ty along rows.
struct Launch {
  dim3 grid, block;
};

inline Launch launch_over(int64_t rows, int64_t per_row) {
  constexpr int kThreads = 256;
  int tx = 32;
  while (tx < kThreads && tx < per_row) tx *= 2;
  const int ty = kThreads / tx;
  const int64_t row_blocks = (rows + ty - 1) / ty;
  return {dim3(static_cast<unsigned>((per_row + tx - 1) / tx), static_cast<unsigned>(row_blocks < 65535 ? row_blocks : 65535)),
          dim3(static_cast<unsigned>(tx), static_cast<unsigned>(ty))};
}

// Calls f.run<W>(row, i) for i in [0, per_row), which stands for elements [i W, i W + W).
template <int W, typename F>
__global__ void __launch_bounds__(256) for_elements_kernel(const __grid_constant__ F f, int64_t rows, int64_t per_row) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= per_row) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step) f.template run<W>(row, i);
}

// Runs f over rows x columns, W at a time where `vectors` says that it can.
template <int W, typename F>
void for_elements(const char* kernel, const F& f, int64_t rows, int64_t columns, bool vectors, Stream stream) {
  if (rows <= 0 || columns <= 0) return;
  const int64_t per_row = vectors ? columns / W : columns;
  const Launch launch = launch_over(rows, per_row);
  if (vectors)
    for_elements_kernel<W, F><<<launch.grid, launch.block, 0, stream>>>(f, rows, per_row);
  else
    for_elements_kernel<1, F><<<launch.grid, launch.block, 0, stream>>>(f, rows, per_row);
  check_launch(kernel);
}

}  // namespace uly::kernels
