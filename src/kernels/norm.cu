#include "kernels/norm.h"

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

constexpr int64_t kSharedColumns = 12288;  // a row of fp32 sums up to here fits the 48 KiB that every device gives

// A row a block.
template <typename T, int W>
__global__ void __launch_bounds__(512) rms_norm_kernel(const __grid_constant__ RmsNormArgs a) {
  __shared__ float shared[33];
  const int64_t row = blockIdx.x, n = a.x.columns, step = static_cast<int64_t>(blockDim.x) * W;
  const T* x = row_of<T>(a.x, row);
  T* y = row_of<T>(a.y, row);
  float v[W], w[W], sum = 0;
  for (int64_t j = threadIdx.x * W; j < n; j += step) {
    load(x + j, v);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += v[k] * v[k];
  }
  const float rstd = 1.0f / sqrtf(block_sum(sum, shared) / static_cast<float>(n) + static_cast<float>(a.eps));
  if (threadIdx.x == 0) *row_of<float>(a.rstd, row) = rstd;
  for (int64_t j = threadIdx.x * W; j < n; j += step) {
    load(x + j, v);
    load_any(a.w, j, w);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] = v[k] * rstd * w[k];
    store(y + j, v);
  }
}

// Rows blockIdx.x, + gridDim.x, ...; a thread keeps the sums of its own columns of dw, in shared memory or in its block's
// row of scratch.
template <typename T, int W>
__global__ void __launch_bounds__(512) rms_norm_grad_kernel(const __grid_constant__ RmsNormGradArgs a, bool in_shared) {
  __shared__ float shared[33];
  extern __shared__ float4 dynamic[];
  const int64_t n = a.x.columns, step = static_cast<int64_t>(blockDim.x) * W;
  float* out = static_cast<float*>(a.scratch) + blockIdx.x * n;
  float* sums = in_shared ? reinterpret_cast<float*>(dynamic) : out;
  float dy[W], x[W], w[W], v[W];
  for (int k = 0; k < W; ++k) v[k] = 0;
  for (int64_t j = threadIdx.x * W; j < n; j += step) store(sums + j, v);
  for (int64_t row = blockIdx.x; row < a.x.rows; row += gridDim.x) {
    const float rstd = *row_of<float>(a.rstd, row);
    float sum = 0;
    for (int64_t j = threadIdx.x * W; j < n; j += step) {
      load(row_of<T>(a.dy, row) + j, dy), load(row_of<T>(a.x, row) + j, x), load_any(a.w, j, w);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += dy[k] * x[k] * w[k];
    }
    const float c = block_sum(sum, shared) / static_cast<float>(n) * rstd * rstd * rstd;
    for (int64_t j = threadIdx.x * W; j < n; j += step) {
      load(row_of<T>(a.dy, row) + j, dy), load(row_of<T>(a.x, row) + j, x), load_any(a.w, j, w);
      load(row_of<T>(a.dx, row) + j, v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] += dy[k] * w[k] * rstd - x[k] * c;
      store(row_of<T>(a.dx, row) + j, v);
      load(sums + j, v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] += dy[k] * (x[k] * rstd);
      store(sums + j, v);
    }
  }
  if (!in_shared) return;
  for (int64_t j = threadIdx.x * W; j < n; j += step) {
    load(sums + j, v);
    store(out + j, v);
  }
}

// A head a warp.
template <typename T, int W>
__global__ void __launch_bounds__(256) head_norm_kernel(const __grid_constant__ HeadNormArgs a, int64_t heads) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32, H = a.head_size;
  if (unit >= a.x.rows * heads) return;
  const int64_t row = unit / heads, head = unit % heads, first = static_cast<int64_t>(threadIdx.x % 32) * W;
  const T* x = row_of<T>(a.x, row) + head * H;
  T* y = row_of<T>(a.y, row) + head * H;
  float v[W], w[W], sum = 0;
  for (int64_t j = first; j < H; j += 32 * W) {
    load(x + j, v);
#pragma unroll
    for (int k = 0; k < W; ++k) sum += v[k] * v[k];
  }
  const float rstd = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(H) + static_cast<float>(a.eps));
  if (threadIdx.x % 32 == 0) row_of<float>(a.rstd, row)[head] = rstd;
  for (int64_t j = first; j < H; j += 32 * W) {
    load(x + j, v);
    load_any(a.w, j, w);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] = v[k] * rstd * w[k];
    store(y + j, v);
  }
}

// A head a warp; each of the 8 warps keeps its sums of dw in shared memory, and they are added in order.
template <typename T, int W>
__global__ void __launch_bounds__(256) head_norm_grad_kernel(const __grid_constant__ HeadNormGradArgs a, int64_t heads) {
  extern __shared__ float4 dynamic[];
  const int64_t H = a.head_size, first = static_cast<int64_t>(threadIdx.x % 32) * W, units = a.x.rows * heads;
  float* sums = reinterpret_cast<float*>(dynamic) + threadIdx.x / 32 * H;
  float dy[W], x[W], w[W], v[W];
  for (int k = 0; k < W; ++k) v[k] = 0;
  for (int64_t j = first; j < H; j += 32 * W) store(sums + j, v);
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32; unit < units; unit += static_cast<int64_t>(gridDim.x) * 8) {
    const int64_t row = unit / heads, head = unit % heads;
    T* dx = row_of<T>(a.dx, row) + head * H;
    const T* from = row_of<T>(a.x, row) + head * H;
    const float rstd = row_of<float>(a.rstd, row)[head];
    float sum = 0;
    for (int64_t j = first; j < H; j += 32 * W) {
      load(dx + j, dy), load(from + j, x), load_any(a.w, j, w);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += dy[k] * x[k] * w[k];
    }
    const float c = warp_sum(sum) / static_cast<float>(H) * rstd * rstd * rstd;
    for (int64_t j = first; j < H; j += 32 * W) {
      load(dx + j, dy), load(from + j, x), load_any(a.w, j, w), load(sums + j, v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] += dy[k] * (x[k] * rstd);
      store(sums + j, v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] = dy[k] * w[k] * rstd - x[k] * c;
      store(dx + j, v);
    }
  }
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(dynamic);
  for (int64_t j = threadIdx.x; j < H; j += blockDim.x) {
    float total = 0;
    for (int warp = 0; warp < 8; ++warp) total += all[warp * H + j];
    static_cast<float*>(a.scratch)[blockIdx.x * H + j] = total;
  }
}

unsigned threads_for(int64_t items) { return static_cast<unsigned>(items >= 512 ? 512 : items <= 64 ? 64 : (items + 31) / 32 * 32); }

}  // namespace

void rms_norm(const RmsNormArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t n = a.x.columns;
  for_float_type(a.x.dtype, "rms_norm", [&](auto t) {
    using T = decltype(t);
    if (vectors_fit<8>(n, {a.y, a.x, as_vector(a.w)}))
      rms_norm_kernel<T, 8><<<static_cast<unsigned>(a.x.rows), threads_for(n / 8), 0, stream>>>(a);
    else
      rms_norm_kernel<T, 1><<<static_cast<unsigned>(a.x.rows), threads_for(n), 0, stream>>>(a);
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
      rms_norm_grad_kernel<T, 8><<<static_cast<unsigned>(blocks), threads_for(n / 8), bytes, stream>>>(a, in_shared);
    else
      rms_norm_grad_kernel<T, 1><<<static_cast<unsigned>(blocks), threads_for(n), bytes, stream>>>(a, in_shared);
  });
  check_launch("rms_norm_grad");
  add_partial_rows("rms_norm_grad", a.dw.data, a.scratch, blocks, n, stream);
}

void head_norm(const HeadNormArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t heads = a.x.columns / a.head_size;
  const unsigned blocks = static_cast<unsigned>((a.x.rows * heads + 7) / 8);
  for_float_type(a.x.dtype, "head_norm", [&](auto t) {
    using T = decltype(t);
    if (vectors_fit<4>(a.head_size, {a.y, a.x, as_vector(a.w)}))
      head_norm_kernel<T, 4><<<blocks, 256, 0, stream>>>(a, heads);
    else
      head_norm_kernel<T, 1><<<blocks, 256, 0, stream>>>(a, heads);
  });
  check_launch("head_norm");
}

void head_norm_grad(const HeadNormGradArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t H = a.head_size, heads = a.x.columns / H, blocks = column_sum_blocks(a.x.rows * heads, H);
  const size_t bytes = static_cast<size_t>(8 * H) * 4;
  for_float_type(a.x.dtype, "head_norm_grad", [&](auto t) {
    using T = decltype(t);
    if (vectors_fit<4>(H, {a.dx, a.x, as_vector(a.w)}))
      head_norm_grad_kernel<T, 4><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads);
    else
      head_norm_grad_kernel<T, 1><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads);
  });
  check_launch("head_norm_grad");
  add_partial_rows("head_norm_grad", a.dw.data, a.scratch, blocks, H, stream);
}

}  // namespace uly::kernels
