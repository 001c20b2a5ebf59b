#include "kernels/merge.h"

#include "kernels/device/vector.cuh"

namespace uly::kernels {
namespace {

struct Weights {
  float a, b, lse;
};

__device__ __forceinline__ Weights weights_of(float a_lse, float b_lse) {
  const float largest = fmaxf(a_lse, b_lse);
  if (largest == -INFINITY) return {0, 0, -INFINITY};
  const float a = expf(a_lse - largest), b = expf(b_lse - largest), sum = a + b;
  return {a / sum, b / sum, largest + logf(sum)};
}

// A partial of weight 0 may hold anything, NaN too.
template <int W>
__device__ __forceinline__ void weighted_sum(float (&y)[W], const float (&a)[W], const float (&b)[W], const Weights& w) {
#pragma unroll
  for (int k = 0; k < W; ++k) y[k] = (w.a == 0 ? 0 : a[k] * w.a) + (w.b == 0 ? 0 : b[k] * w.b);
}

// A head of a row is merged by a group of threads.
template <typename Y, typename A, typename B, int W>
__global__ void __launch_bounds__(256) merge_kernel(const __grid_constant__ MergeArgs m, int64_t heads, Lanes lanes) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * lanes.groups() + lanes.group(), H = m.head_size;
  const int first = lanes.mine() * W;
  const bool works = unit < m.y.rows * heads && first < H;
  const Place at = place_of(works ? unit : 0, heads);
  const A* a = row_of<A>(m.a, at.row) + at.place * H;
  const B* b = row_of<B>(m.b, at.row) + at.place * H;
  Y* y = row_of<Y>(m.y, at.row) + at.place * H;
  Held<A, W> held_a;
  Held<B, W> held_b;
  float a_lse = 0, b_lse = 0;
  if (works) {
    held_a.fetch(a + first), held_b.fetch(b + first);
    a_lse = row_of<float>(m.a_lse, at.row)[at.place * m.a_lse_column_stride];
    b_lse = row_of<float>(m.b_lse, at.row)[at.place * m.b_lse_column_stride];
  }
  __syncwarp();  // all threads of a head have read its log-sum-exps; one may now overwrite them
  if (!works) return;
  const Weights w = weights_of(a_lse, b_lse);
  if (first == 0) row_of<float>(m.lse, at.row)[at.place * m.lse_column_stride] = w.lse;
  float v[W], u[W];
  held_a.get(v), held_b.get(u);
  weighted_sum(v, v, u, w);
  store(y + first, v);
  for (int64_t j = first + lanes.count * W; j < H; j += lanes.count * W) {
    load(a + j, v), load(b + j, u);
    weighted_sum(v, v, u, w);
    store(y + j, v);
  }
}

template <typename Y, typename A, typename B>
void run_merge(const MergeArgs& m, Stream stream) {
  const int64_t H = m.head_size, heads = m.y.columns / H;
  const bool vectors = vectors_fit<8>(H, {m.y, m.a, m.b});
  const Lanes lanes = lanes_for(vectors ? H / 8 : H);
  const unsigned blocks = blocks_for(m.y.rows * heads, lanes.groups());
  if (vectors)
    merge_kernel<Y, A, B, 8><<<blocks, 256, 0, stream>>>(m, heads, lanes);
  else
    merge_kernel<Y, A, B, 1><<<blocks, 256, 0, stream>>>(m, heads, lanes);
}

}  // namespace

void merge(const MergeArgs& m, Stream stream) {
  if (m.y.elements() == 0) return;
  for_float_types(m.a.dtype, m.b.dtype, "merge",
                  [&](auto a, auto b) { for_float_type(m.y.dtype, "merge", [&](auto y) { run_merge<decltype(y), decltype(a), decltype(b)>(m, stream); }); });
  check_launch("merge");
}

}  // namespace uly::kernels
