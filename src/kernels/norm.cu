#include "kernels/norm.h"

#include <algorithm>

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

constexpr int64_t kSharedColumns = 12288;  // a row of fp32 sums up to here fits the 48 KiB that every device gives

template <int W>
__device__ __forceinline__ void add_squares(float& sum, const float (&v)[W]) {
#pragma unroll
  for (int k = 0; k < W; ++k) sum += v[k] * v[k];
}

template <int W>
__device__ __forceinline__ void add_products(float& sum, const float (&dy)[W], const float (&x)[W], const Matrix& w, int64_t j) {
  float u[W];
  load_any(w, j, u);
#pragma unroll
  for (int k = 0; k < W; ++k) sum += dy[k] * x[k] * u[k];
}

template <typename T, int W>
__device__ __forceinline__ void store_normed(T* y, int64_t j, const float (&x)[W], float rstd, const Matrix& w) {
  float u[W];
  load_any(w, j, u);
#pragma unroll
  for (int k = 0; k < W; ++k) u[k] *= x[k] * rstd;
  store(y + j, u);
}

// Stores dx + (rstd dy w - x c) and adds dy x rstd to the sums of dw.
template <typename T, int W>
__device__ __forceinline__ void store_grads(T* to, float* sums, int64_t j, const float (&dx)[W], const float (&dy)[W], const float (&x)[W], float rstd, float c,
                                            const Matrix& w) {
  float u[W], s[W];
  load_any(w, j, u), load(sums + j, s);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    u[k] = dx[k] + (dy[k] * u[k] * rstd - x[k] * c);
    s[k] += dy[k] * (x[k] * rstd);
  }
  store(to + j, u), store(sums + j, s);
}

// A row a block; its first 4 vectors a thread are held between the sum and the result.
template <typename T, int W>
__global__ void __launch_bounds__(512) rms_norm_kernel(const __grid_constant__ RmsNormArgs a) {
  constexpr int kHeld = 4;
  __shared__ float shared[16];
  const int64_t row = blockIdx.x, n = a.x.columns, step = static_cast<int64_t>(blockDim.x) * W, first = threadIdx.x * W;
  const T* x = row_of<T>(a.x, row);
  T* y = row_of<T>(a.y, row);
  float held[kHeld][W], v[W], sum = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) load(x + first + h * step, held[h]);
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) add_squares(sum, held[h]);
  for (int64_t j = first + kHeld * step; j < n; j += step) {
    load(x + j, v);
    add_squares(sum, v);
  }
  const float rstd = 1.0f / sqrtf(alternating_block_sum(sum, shared) / static_cast<float>(n) + static_cast<float>(a.eps));
  if (threadIdx.x == 0) *row_of<float>(a.rstd, row) = rstd;
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) store_normed(y, first + h * step, held[h], rstd, a.w);
  for (int64_t j = first + kHeld * step; j < n; j += step) {
    load(x + j, v);
    store_normed(y, j, v, rstd, a.w);
  }
}

// Rows blockIdx.x, + gridDim.x, ...; a thread keeps the sums of its own columns of dw, in shared memory or in its block's
// row of scratch.
template <typename T, int W>
__global__ void __launch_bounds__(512) rms_norm_grad_kernel(const __grid_constant__ RmsNormGradArgs a, bool in_shared) {
  constexpr int kHeld = 2;
  __shared__ float shared[2][16];
  extern __shared__ float4 dynamic[];
  const int64_t n = a.x.columns, step = static_cast<int64_t>(blockDim.x) * W, first = threadIdx.x * W;
  float* out = static_cast<float*>(a.scratch) + blockIdx.x * n;
  float* sums = in_shared ? reinterpret_cast<float*>(dynamic) : out;
  float dy[kHeld][W], x[kHeld][W], dx[kHeld][W], v[W];
  for (int k = 0; k < W; ++k) v[k] = 0;
  for (int64_t j = first; j < n; j += step) store(sums + j, v);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.x.rows; row += gridDim.x, turn ^= 1) {
    const T *from_dy = row_of<T>(a.dy, row), *from_x = row_of<T>(a.x, row);
    T* to = row_of<T>(a.dx, row);
    const float rstd = *row_of<float>(a.rstd, row);
    float sum = 0;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int64_t j = first + h * step;
      if (j < n) load(from_dy + j, dy[h]), load(from_x + j, x[h]), load(to + j, dx[h]);
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (first + h * step < n) add_products(sum, dy[h], x[h], a.w, first + h * step);
    for (int64_t j = first + kHeld * step; j < n; j += step) {
      float later_dy[W], later_x[W];
      load(from_dy + j, later_dy), load(from_x + j, later_x);
      add_products(sum, later_dy, later_x, a.w, j);
    }
    const float c = alternating_block_sum(sum, shared[turn]) / static_cast<float>(n) * rstd * rstd * rstd;
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (first + h * step < n) store_grads(to, sums, first + h * step, dx[h], dy[h], x[h], rstd, c, a.w);
    for (int64_t j = first + kHeld * step; j < n; j += step) {
      float later_dy[W], later_x[W];
      load(from_dy + j, later_dy), load(from_x + j, later_x), load(to + j, v);
      store_grads(to, sums, j, v, later_dy, later_x, rstd, c, a.w);
    }
  }
  if (!in_shared) return;
  for (int64_t j = first; j < n; j += step) {
    load(sums + j, v);
    store(out + j, v);
  }
}

// Heads are worked on by groups of `lanes` threads, so many that a vector each is a head, or 32.
struct Place {
  int64_t row, head;
};

__device__ __forceinline__ Place place_of(int64_t unit, int64_t heads) {
  if ((unit | heads) >> 32 != 0) return {unit / heads, unit % heads};
  const uint32_t row = static_cast<uint32_t>(unit) / static_cast<uint32_t>(heads);
  return {row, static_cast<uint32_t>(unit) - row * static_cast<uint32_t>(heads)};
}

template <typename T, int W>
__global__ void __launch_bounds__(256) head_norm_kernel(const __grid_constant__ HeadNormArgs a, int64_t heads, int lanes) {
  const int64_t H = a.head_size, units = a.x.rows * heads, first = static_cast<int64_t>(threadIdx.x % lanes) * W, step = static_cast<int64_t>(lanes) * W;
  const int groups = 256 / lanes;
  float held[W], v[W];
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * groups; begin < units; begin += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t unit = begin + threadIdx.x / lanes;
    const bool exists = unit < units;  // all threads stay for the shuffles
    const Place at = place_of(exists ? unit : units - 1, heads);
    const T* x = row_of<T>(a.x, at.row) + at.head * H;
    T* y = row_of<T>(a.y, at.row) + at.head * H;
    float sum = 0;
    if (first < H) {
      load(x + first, held);
      add_squares(sum, held);
    }
    for (int64_t j = first + step; j < H; j += step) {
      load(x + j, v);
      add_squares(sum, v);
    }
    const float rstd = 1.0f / sqrtf(group_sum(sum, lanes) / static_cast<float>(H) + static_cast<float>(a.eps));
    if (!exists) continue;
    if (first == 0) row_of<float>(a.rstd, at.row)[at.head] = rstd;
    if (first < H) store_normed(y, first, held, rstd, a.w);
    for (int64_t j = first + step; j < H; j += step) {
      load(x + j, v);
      store_normed(y, j, v, rstd, a.w);
    }
  }
}

// Each group keeps its sums of dw in shared memory; they are added in order at the end.
template <typename T, int W>
__global__ void __launch_bounds__(256) head_norm_grad_kernel(const __grid_constant__ HeadNormGradArgs a, int64_t heads, int lanes) {
  extern __shared__ float4 dynamic[];
  const int64_t H = a.head_size, units = a.x.rows * heads, first = static_cast<int64_t>(threadIdx.x % lanes) * W, step = static_cast<int64_t>(lanes) * W;
  const int groups = 256 / lanes;
  float* sums = reinterpret_cast<float*>(dynamic) + threadIdx.x / lanes * H;
  float dy[W], x[W], v[W];
  for (int k = 0; k < W; ++k) v[k] = 0;
  for (int64_t j = first; j < H; j += step) store(sums + j, v);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * groups; begin < units; begin += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t unit = begin + threadIdx.x / lanes;
    const bool exists = unit < units;
    const Place at = place_of(exists ? unit : units - 1, heads);
    T* dx = row_of<T>(a.dx, at.row) + at.head * H;
    const T* from = row_of<T>(a.x, at.row) + at.head * H;
    const float rstd = row_of<float>(a.rstd, at.row)[at.head];
    float sum = 0;
    if (first < H) {
      load(dx + first, dy), load(from + first, x);
      add_products(sum, dy, x, a.w, first);
    }
    for (int64_t j = first + step; j < H; j += step) {
      float later_dy[W], later_x[W];
      load(dx + j, later_dy), load(from + j, later_x);
      add_products(sum, later_dy, later_x, a.w, j);
    }
    const float c = group_sum(sum, lanes) / static_cast<float>(H) * rstd * rstd * rstd;
    if (!exists) continue;
    for (int k = 0; k < W; ++k) v[k] = 0;
    if (first < H) store_grads(dx, sums, first, v, dy, x, rstd, c, a.w);
    for (int64_t j = first + step; j < H; j += step) {
      float later_dy[W], later_x[W], zeros[W] = {};
      load(dx + j, later_dy), load(from + j, later_x);
      store_grads(dx, sums, j, zeros, later_dy, later_x, rstd, c, a.w);
    }
  }
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(dynamic);
  for (int64_t j = threadIdx.x; j < H; j += 256) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += all[g * H + j];
    static_cast<float*>(a.scratch)[blockIdx.x * H + j] = total;
  }
}

unsigned threads_for(int64_t items) { return static_cast<unsigned>(items >= 512 ? 512 : items <= 32 ? 32 : (items + 31) / 32 * 32); }

int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  return lanes;
}

}  // namespace

void rms_norm(const RmsNormArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t n = a.x.columns;
  for_float_type(a.x.dtype, "rms_norm", [&](auto t) {
    using T = decltype(t);
    if (vectors_fit<8>(n, {a.y, a.x, as_vector(a.w)}))
      rms_norm_kernel<T, 8><<<static_cast<unsigned>(a.x.rows), threads_for((n / 8 + 3) / 4), 0, stream>>>(a);
    else
      rms_norm_kernel<T, 1><<<static_cast<unsigned>(a.x.rows), threads_for((n + 3) / 4), 0, stream>>>(a);
  });
  check_launch("rms_norm");
}

void rms_norm_grad(const RmsNormGradArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t n = a.x.columns, blocks = column_sum_blocks(a.x.rows, n);
  const bool in_shared = n <= kSharedColumns - 64;
  const size_t bytes = in_shared ? static_cast<size_t>(n) * 4 : 0;
  for_float_type(a.x.dtype, "rms_norm_grad", [&](auto t) {
    using T = decltype(t);
    if (vectors_fit<8>(n, {a.dx, a.dy, a.x, as_vector(a.w)}))
      rms_norm_grad_kernel<T, 8><<<static_cast<unsigned>(blocks), threads_for((n / 8 + 1) / 2), bytes, stream>>>(a, in_shared);
    else
      rms_norm_grad_kernel<T, 1><<<static_cast<unsigned>(blocks), threads_for((n + 1) / 2), bytes, stream>>>(a, in_shared);
  });
  check_launch("rms_norm_grad");
  add_partial_rows("rms_norm_grad", a.dw.data, a.scratch, blocks, n, stream);
}

void head_norm(const HeadNormArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t H = a.head_size, heads = a.x.columns / H;
  const bool vectors = vectors_fit<8>(H, {a.y, a.x, as_vector(a.w)});
  const int lanes = lanes_for(vectors ? H / 8 : H);
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((a.x.rows * heads * lanes + 255) / 256, 2112));
  for_float_type(a.x.dtype, "head_norm", [&](auto t) {
    using T = decltype(t);
    if (vectors)
      head_norm_kernel<T, 8><<<blocks, 256, 0, stream>>>(a, heads, lanes);
    else
      head_norm_kernel<T, 1><<<blocks, 256, 0, stream>>>(a, heads, lanes);
  });
  check_launch("head_norm");
}

void head_norm_grad(const HeadNormGradArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t H = a.head_size, heads = a.x.columns / H, blocks = column_sum_blocks(a.x.rows * heads, H);
  const bool vectors = vectors_fit<8>(H, {a.dx, a.x, as_vector(a.w)});
  const int lanes = lanes_for(vectors ? H / 8 : H);
  const size_t bytes = static_cast<size_t>(256 / lanes * H) * 4;
  for_float_type(a.x.dtype, "head_norm_grad", [&](auto t) {
    using T = decltype(t);
    if (vectors)
      head_norm_grad_kernel<T, 8><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads, lanes);
    else
      head_norm_grad_kernel<T, 1><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads, lanes);
  });
  check_launch("head_norm_grad");
  add_partial_rows("head_norm_grad", a.dw.data, a.scratch, blocks, H, stream);
}

}  // namespace uly::kernels
