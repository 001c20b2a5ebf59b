#include "kernels/optimizer.h"

#include <algorithm>
#include <bit>

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

// Threads sum vectors in fp32 and those sums in fp64.
template <typename T, int W>
__global__ void __launch_bounds__(256) squared_norm_kernel(double* partial, const T* x, int64_t items) {
  __shared__ double shared[33];
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
#pragma unroll 2
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < items; i += step) {
    float v[W], part = 0;
    load(x + i * W, v);
#pragma unroll
    for (int k = 0; k < W; ++k) part += v[k] * v[k];
    sum += static_cast<double>(part);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kNormBlocks) add_norms_kernel(double* total, const double* partial) {
  __shared__ double shared[33];
  const double sum = block_sum(partial[threadIdx.x], shared);
  if (threadIdx.x == 0) *total += sum;
}

// kNone: the weight is the master. kSplit: the master is the weight and `low`.
enum class Weight { kNone, kBf16, kF32, kSplit };

// W 16-bit numbers as they are.
template <int W>
struct Halves {
  uint16_t v[W];
};

template <int W>
__device__ __forceinline__ Halves<W> load_halves(const void* base, int64_t i) {
  if constexpr (W == 4)
    return std::bit_cast<Halves<4>>(*reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + i));
  else
    return {static_cast<const uint16_t*>(base)[i]};
}

template <int W>
__device__ __forceinline__ void store_halves(void* base, int64_t i, const Halves<W>& x) {
  if constexpr (W == 4)
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + i) = std::bit_cast<uint2>(x);
  else
    static_cast<uint16_t*>(base)[i] = x.v[0];
}

template <Weight kWeight, int W>
__device__ __forceinline__ void load_master(const AdamwArgs& a, int64_t i, float (&p)[W]) {
  if constexpr (kWeight == Weight::kSplit) {
    const Halves<W> weight = load_halves<W>(a.weight, i), low = load_halves<W>(a.low, i);
#pragma unroll
    for (int e = 0; e < W; ++e) p[e] = join(weight.v[e], static_cast<int16_t>(low.v[e]));
  } else {
    load(a.master + i, p);
  }
}

template <Weight kWeight, int W>
__device__ __forceinline__ void store_master(const AdamwArgs& a, int64_t i, const float (&p)[W]) {
  if constexpr (kWeight == Weight::kSplit) {
    Halves<W> weight, low;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      const SplitFloat x = split(p[e]);
      weight.v[e] = x.weight, low.v[e] = static_cast<uint16_t>(x.low);
    }
    store_halves(a.weight, i, weight), store_halves(a.low, i, low);
  } else {
    store(a.master + i, p);
    if constexpr (kWeight == Weight::kBf16) store(static_cast<Bf16*>(a.weight) + i, p);
    if constexpr (kWeight == Weight::kF32) store(static_cast<float*>(a.weight) + i, p);
  }
}

template <Weight kWeight, int W>
__global__ void __launch_bounds__(256) adamw_kernel(const __grid_constant__ AdamwArgs a, const __grid_constant__ AdamwConstants k, int64_t items) {
  __shared__ float shared;
  if (!finite(a.squared_norm) || !finite(a.loss)) return;
  if (threadIdx.x == 0) shared = clip_coefficient(a.squared_norm, a.clip);
  __syncthreads();
  const float coefficient = shared;
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; item < items; item += step) {
    const int64_t i = item * W;
    float g[W], m[W], v[W], p[W];
    load(a.gradient + i, g), load(a.m + i, m), load(a.v + i, v), load_master<kWeight>(a, i, p);
#pragma unroll
    for (int e = 0; e < W; ++e) p[e] = adamw_element(k, coefficient, g[e], m[e], v[e], p[e]);
    store(a.m + i, m), store(a.v + i, v), store_master<kWeight>(a, i, p);
  }
}

template <Weight kWeight>
void run_adamw(const AdamwArgs& a, bool vectors, Stream stream) {
  const int64_t items = vectors ? a.count / 4 : a.count;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((items + 255) / 256, 4096));
  if (vectors)
    adamw_kernel<kWeight, 4><<<blocks, 256, 0, stream>>>(a, adamw_constants(a), items);
  else
    adamw_kernel<kWeight, 1><<<blocks, 256, 0, stream>>>(a, adamw_constants(a), items);
  check_launch("adamw");
}

}  // namespace

void squared_norm(const SquaredNormArgs& a, Stream stream) {
  const int64_t n = a.x.elements();
  double* partial = static_cast<double*>(a.scratch);
  for_float_type(a.x.dtype, "squared_norm", [&](auto t) {
    using T = decltype(t);
    const T* x = static_cast<const T*>(a.x.data);
    if (vectors_fit<8>(n, {as_vector(a.x)}))
      squared_norm_kernel<T, 8><<<kNormBlocks, 256, 0, stream>>>(partial, x, n / 8);
    else
      squared_norm_kernel<T, 1><<<kNormBlocks, 256, 0, stream>>>(partial, x, n);
  });
  add_norms_kernel<<<1, kNormBlocks, 0, stream>>>(a.total, partial);
  check_launch("squared_norm");
}

void adamw(const AdamwArgs& a, Stream stream) {
  if (a.count == 0) return;
  const auto flat = [](void* data, Dtype dtype) { return Matrix{.data = data, .dtype = dtype, .rows = 1}; };
  const bool splits = a.low != nullptr;
  const bool vectors = vectors_fit<4>(a.count, {flat(a.weight, a.weight_dtype), splits ? flat(a.low, Dtype::kBf16) : flat(a.master, Dtype::kF32),
                                                flat(a.m, Dtype::kF32), flat(a.v, Dtype::kF32), flat(const_cast<float*>(a.gradient), Dtype::kF32)});
  if (splits) return a.weight_dtype == Dtype::kBf16 ? run_adamw<Weight::kSplit>(a, vectors, stream) : unsupported_dtype("adamw");
  if (a.weight == a.master) return run_adamw<Weight::kNone>(a, vectors, stream);
  if (a.weight_dtype == Dtype::kBf16) return run_adamw<Weight::kBf16>(a, vectors, stream);
  if (a.weight_dtype == Dtype::kF32) return run_adamw<Weight::kF32>(a, vectors, stream);
  unsupported_dtype("adamw");
}

}  // namespace uly::kernels
