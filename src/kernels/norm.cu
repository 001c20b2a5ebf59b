#include "kernels/norm.h"

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
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(a.x.columns), step = static_cast<int>(blockDim.x) * W, first = static_cast<int>(threadIdx.x) * W;
  const T* x = row_of<T>(a.x, row);
  T* y = row_of<T>(a.y, row);
  Held<T, W> held[kHeld];
  float v[W], sum = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) held[h].fetch(x + first + h * step);
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) {
      held[h].get(v);
      add_squares(sum, v);
    }
  for (int j = first + kHeld * step; j < n; j += step) {
    load(x + j, v);
    add_squares(sum, v);
  }
  const float rstd = rsqrtf(__fdividef(alternating_block_sum(sum, shared), static_cast<float>(n)) + static_cast<float>(a.eps));
  if (threadIdx.x == 0) *row_of<float>(a.rstd, row) = rstd;
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first + h * step < n) {
      held[h].get(v);
      store_normed(y, first + h * step, v, rstd, a.w);
    }
  for (int j = first + kHeld * step; j < n; j += step) {
    load(x + j, v);
    store_normed(y, j, v, rstd, a.w);
  }
}

// What a thread holds of a row for the gradient: V vectors of each matrix; zeros beyond the last column.
template <typename T, int W, int V>
struct GradRow {
  Held<T, W> dx[V], dy[V], x[V];
  float rstd;

  __device__ __forceinline__ void fetch(const RmsNormGradArgs& a, int64_t row, int first, int step) {
    const T *from_dx = row_of<T>(a.dx, row) + first, *from_dy = row_of<T>(a.dy, row) + first, *from_x = row_of<T>(a.x, row) + first;
#pragma unroll
    for (int h = 0; h < V; ++h)
      if (first + h * step < static_cast<int>(a.x.columns)) {
        dy[h].fetch(from_dy + h * step), x[h].fetch(from_x + h * step), dx[h].fetch(from_dx + h * step);
      }
    rstd = *row_of<float>(a.rstd, row);
  }
};

// Rows blockIdx.x, + gridDim.x, ...; the next row is on its way while this one is summed and written. A thread's columns
// of w and its sums of dw stay in registers. For rows of at most kThreads V vectors; kBlocks of them share a multiprocessor.
template <typename T, int W, int V, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) rms_norm_grad_rows_kernel(const __grid_constant__ RmsNormGradArgs a) {
  __shared__ float shared[2][16];
  const int n = static_cast<int>(a.x.columns), step = static_cast<int>(blockDim.x) * W, first = static_cast<int>(threadIdx.x) * W;
  float w[V][W] = {}, sums[V][W] = {};
#pragma unroll
  for (int h = 0; h < V; ++h)
    if (first + h * step < n) load_any(a.w, first + h * step, w[h]);
  GradRow<T, W, V> now = {}, next = {};
  now.fetch(a, blockIdx.x, first, step);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.x.rows; row += gridDim.x, turn ^= 1) {
    if (row + gridDim.x < a.x.rows) next.fetch(a, row + gridDim.x, first, step);
    float sum = 0;
#pragma unroll
    for (int h = 0; h < V; ++h) {
      float dy[W], x[W];
      now.dy[h].get(dy), now.x[h].get(x);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float product = dy[k] * x[k];
        sum += product * w[h][k];
        sums[h][k] += product * now.rstd;
      }
    }
    const float c = __fdividef(alternating_block_sum(sum, shared[turn]), static_cast<float>(n)) * now.rstd * now.rstd * now.rstd;
    T* to = row_of<T>(a.dx, row) + first;
#pragma unroll
    for (int h = 0; h < V; ++h) {
      float dy[W], x[W], dx[W];
      now.dy[h].get(dy), now.x[h].get(x), now.dx[h].get(dx);
#pragma unroll
      for (int k = 0; k < W; ++k) dx[k] += dy[k] * w[h][k] * now.rstd - x[k] * c;
      if (first + h * step < n) store(to + h * step, dx);
    }
    now = next;
  }
  float* out = static_cast<float*>(a.scratch) + static_cast<int64_t>(blockIdx.x) * n + first;
#pragma unroll
  for (int h = 0; h < V; ++h)
    if (first + h * step < n) store(out + h * step, sums[h]);
}

// The same for any row: sums of dw lie in shared memory or in the block's row of scratch.
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

unsigned threads_for(int64_t items) { return static_cast<unsigned>(items >= 512 ? 512 : items <= 32 ? 32 : (items + 31) / 32 * 32); }

}  // namespace

void rms_norm(const RmsNormArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t n = a.x.columns;
  for_float_type(a.x.dtype, "rms_norm", [&](auto t) {
    using T = decltype(t);
    constexpr int W = kVector<T>;
    if (vectors_fit<W>(n, {a.y, a.x, as_vector(a.w)}))
      rms_norm_kernel<T, W><<<static_cast<unsigned>(a.x.rows), threads_for((n / W + 3) / 4), 0, stream>>>(a);
    else
      rms_norm_kernel<T, 1><<<static_cast<unsigned>(a.x.rows), threads_for((n + 3) / 4), 0, stream>>>(a);
  });
  check_launch("rms_norm");
}

void rms_norm_grad(const RmsNormGradArgs& a, Stream stream) {
  if (a.x.elements() == 0) return;
  const int64_t n = a.x.columns, blocks = column_sum_blocks(a.x.rows, n);
  const unsigned grid = static_cast<unsigned>(blocks);
  const bool in_shared = n <= kSharedColumns - 64;
  const size_t bytes = in_shared ? static_cast<size_t>(n) * 4 : 0;
  for_float_type(a.x.dtype, "rms_norm_grad", [&](auto t) {
    using T = decltype(t);
    constexpr int W = kVector<T>, V = 2;
    const bool vectors = vectors_fit<W>(n, {a.dx, a.dy, a.x, as_vector(a.w)});
    const unsigned threads = threads_for((n / W + V - 1) / V);
    if (vectors && threads > 256 && threads <= 320)
      rms_norm_grad_rows_kernel<T, W, V, 320, 2><<<grid, threads, 0, stream>>>(a);
    else if (vectors && n <= 512 * V * W)
      rms_norm_grad_rows_kernel<T, W, V, 512, 1><<<grid, threads, 0, stream>>>(a);
    else if (vectors)
      rms_norm_grad_kernel<T, W><<<grid, 512, bytes, stream>>>(a, in_shared);
    else
      rms_norm_grad_kernel<T, 1><<<grid, threads_for((n + 1) / 2), bytes, stream>>>(a, in_shared);
  });
  check_launch("rms_norm_grad");
  add_partial_rows("rms_norm_grad", a.dw.data, a.scratch, blocks, n, stream);
}

}  // namespace uly::kernels
