#include "kernels/loss.h"

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

// sum(exp(x - largest)) over the elements seen so far.
struct Running {
  float largest, sum;
};

__device__ __forceinline__ Running merged(Running a, Running b) {
  const float largest = fmaxf(a.largest, b.largest);
  const float from_a = a.largest == largest ? a.sum : a.sum * expf(a.largest - largest);
  const float from_b = b.largest == largest ? b.sum : b.sum * expf(b.largest - largest);
  return {largest, from_a + from_b};
}

__device__ __forceinline__ Running warp_merged(Running r) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) r = merged(r, {__shfl_xor_sync(0xffffffffu, r.largest, offset), __shfl_xor_sync(0xffffffffu, r.sum, offset)});
  return r;
}

// exp in two instructions. Off by up to |x| 2^-24 of itself, which is least where exp(x) is large: here x <= 0.
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

template <int W>
__device__ __forceinline__ void add_to(Running& r, const float (&v)[W]) {
  float largest = r.largest;
#pragma unroll
  for (int k = 0; k < W; ++k) largest = fmaxf(largest, v[k]);
  const float base = largest == -INFINITY ? 0 : largest;  // no infinity minus infinity
  float sum = 0;
#pragma unroll
  for (int k = 0; k < W; ++k) sum += fast_exp(v[k] - base);
  r.sum = (r.largest == largest ? r.sum : r.sum * fast_exp(r.largest - largest)) + sum;
  r.largest = largest;
}

// A row a block of 512: one pass for the maximum and the sum, one for the gradient, which goes backwards: it begins with
// what the first has left in the cache.
template <typename T, int W>
__global__ void __launch_bounds__(512) cross_entropy_kernel(const __grid_constant__ CrossEntropyArgs a) {
  constexpr int kHeld = 4;
  __shared__ Running shared[17];
  const int64_t row = blockIdx.x, n = a.logits.columns, label = *row_of<int64_t>(a.labels, row);
  constexpr int64_t kStep = 512 * W;
  T* x = row_of<T>(a.logits, row);
  const int64_t first = threadIdx.x * W;
  float v[W];
  if (label < 0) {
    for (int k = 0; k < W; ++k) v[k] = 0;
    for (int64_t j = first; j < n; j += kStep) store(x + j, v);
    if (threadIdx.x == 0) *row_of<float>(a.loss, row) = 0;
    return;
  }
  Running r{-INFINITY, 0};
  Held<T, W> held[kHeld];
  const int64_t rounds = (n + kHeld * kStep - 1) / (kHeld * kStep);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = round * kHeld * kStep + first;
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (begin + h * kStep < n) held[h].fetch(x + begin + h * kStep);
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (begin + h * kStep < n) {
        held[h].get(v);
        add_to(r, v);
      }
  }
  r = warp_merged(r);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = r;
  const float of_label = to_float(x[label]);  // before any thread overwrites it
  __syncthreads();
  if (threadIdx.x < 32) {
    r = warp_merged(threadIdx.x < 16 ? shared[threadIdx.x] : Running{-INFINITY, 0});
    if (threadIdx.x == 0) shared[16] = r;
  }
  __syncthreads();
  r = shared[16];
  const float factor = a.scale / r.sum, of_label_gradient = (expf(of_label - r.largest) / r.sum - 1.0f) * a.scale;
  for (int64_t round = rounds - 1; round >= 0; --round) {
    const int64_t begin = round * kHeld * kStep + first;
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (begin + h * kStep < n) held[h].fetch(x + begin + h * kStep);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int64_t j = begin + h * kStep;
      if (j >= n) continue;
      held[h].get(v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] = fast_exp(v[k] - r.largest) * factor;
      if (label >= j && label < j + W) {
#pragma unroll
        for (int k = 0; k < W; ++k)
          if (label == j + k) v[k] = of_label_gradient;
      }
      store(x + j, v);
    }
  }
  if (threadIdx.x == 0) *row_of<float>(a.loss, row) = logf(r.sum) + (r.largest - of_label);
}

__global__ void __launch_bounds__(1024) sum_loss_kernel(const __grid_constant__ SumLossArgs a) {
  __shared__ double shared[33];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.loss.rows; i += 1024) sum += static_cast<double>(*row_of<float>(a.loss, i));
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) *a.total += a.scale * sum;
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a, Stream stream) {
  if (a.logits.elements() == 0) return;
  for_float_type(a.logits.dtype, "cross_entropy", [&](auto t) {
    using T = decltype(t);
    constexpr int W = kVector<T>;
    if (vectors_fit<W>(a.logits.columns, {a.logits}))
      cross_entropy_kernel<T, W><<<static_cast<unsigned>(a.logits.rows), 512, 0, stream>>>(a);
    else
      cross_entropy_kernel<T, 1><<<static_cast<unsigned>(a.logits.rows), 512, 0, stream>>>(a);
  });
  check_launch("cross_entropy");
}

void sum_loss(const SumLossArgs& a, Stream stream) {
  sum_loss_kernel<<<1, 1024, 0, stream>>>(a);
  check_launch("sum_loss");
}

}  // namespace uly::kernels
