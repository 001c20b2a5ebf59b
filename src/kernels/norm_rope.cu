#include "kernels/norm_rope.h"

#include <algorithm>

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

constexpr int kScalars = 4;             // pairs a thread holds where vectors do not fit: 32 lanes reach kLargestHead
constexpr int64_t kResident = 3 * 132;  // blocks that an H100 holds at once

// What a thread holds of a head: V times W columns of the first half and their partners in the second.
template <typename T, int W, int V>
struct Pairs {
  Held<T, W> first[V], second[V];

  __device__ __forceinline__ void fetch(const T* head, int j, int step, int half) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (j + i * step < half) first[i].fetch(head + j + i * step), second[i].fetch(head + half + j + i * step);
  }
  __device__ __forceinline__ void put(T* head, int j, int step, int half) const {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (j + i * step < half) first[i].put(head + j + i * step), second[i].put(head + half + j + i * step);
  }
  __device__ __forceinline__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float x[W], y[W];
      first[i].get(x), second[i].get(y);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += x[k] * x[k] + y[k] * y[k];
    }
    return sum;
  }
};

// A group of threads works on kHeads heads of one row, which are `apart` heads apart and share its angles.
template <typename T, typename Weight, int W, int V, int kHeads>
__global__ void __launch_bounds__(256, 4) norm_rope_kernel(const __grid_constant__ NormRopeArgs a, int heads, int apart, Lanes lanes) {
  constexpr int P = W < 4 ? W : 4;  // columns of w held at a time
  const int H = static_cast<int>(a.head_size), half = H / 2, j = lanes.mine() * W, step = lanes.count * W;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * lanes.groups() + lanes.group();
  const bool works = item < a.x.rows * apart;
  const Place at = place_of(works ? item : 0, apart);  // all threads stay for the shuffles
  const int head = static_cast<int>(at.place);
  const T* x = row_of<T>(a.x, at.row) + head * H;
  const float* table = row_of<float>(a.table, at.row);
  const Weight* weight = static_cast<const Weight*>(a.w.data);
  Pairs<T, W, V> held[kHeads] = {};
  float c[V][W], s[V][W], rstd[kHeads];
  bool exists[kHeads];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    exists[k] = works && head + k * apart < heads;
    if (exists[k]) held[k].fetch(x + k * apart * H, j, step, half);
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (j + i * step < half) load(table + j + i * step, c[i]), load(table + half + j + i * step, s[i]);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) rstd[k] = held[k].squares();
  group_sums(rstd, lanes);
#pragma unroll
  for (int k = 0; k < kHeads; ++k) rstd[k] = rsqrtf(rstd[k] * __fdividef(1.0f, static_cast<float>(H)) + static_cast<float>(a.eps));
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    if (!exists[k]) continue;
    const int mine = head + k * apart;
    if (a.raw.data != nullptr) held[k].put(row_of<T>(a.raw, at.row) + mine * H, j, step, half);
    if (j == 0) row_of<float>(a.rstd, at.row)[mine] = rstd[k];
    T* y = row_of<T>(a.y, at.row) + mine * H;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = j + i * step;
      if (column >= half) continue;
      float first[W], second[W];
      held[k].first[i].get(first), held[k].second[i].get(second);
#pragma unroll
      for (int part = 0; part < W; part += P) {
        float w[P], u[P];
        load(weight + column + part, w), load(weight + half + column + part, u);
#pragma unroll
        for (int e = part; e < part + P; ++e) {
          const float p = first[e] * rstd[k] * w[e - part], q = second[e] * rstd[k] * u[e - part];
          first[e] = p * c[i][e] - q * s[i][e];
          second[e] = q * c[i][e] + p * s[i][e];
        }
      }
      store(y + column, first), store(y + half + column, second);
    }
  }
}

// A head a group at a time. A thread keeps the sums of its columns of dw; those of a block's groups are added in order at
// the end.
template <typename T, int W, int V>
__global__ void __launch_bounds__(256, 3) norm_rope_grad_kernel(const __grid_constant__ NormRopeGradArgs a, int heads, Lanes lanes) {
  extern __shared__ float4 dynamic[];
  __shared__ float4 shared_w[kLargestHead / 4];  // as many columns as threads
  const int H = static_cast<int>(a.head_size), half = H / 2, j = lanes.mine() * W, step = lanes.count * W;
  float* w = reinterpret_cast<float*>(shared_w);
  if (static_cast<int>(threadIdx.x) < H) {
    float one[1];
    load_any(a.w, threadIdx.x, one);
    w[threadIdx.x] = one[0];
  }
  __syncthreads();
  float first_sums[V][W] = {}, second_sums[V][W] = {};
  const int64_t units = a.x.rows * heads;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * lanes.groups(); begin < units; begin += static_cast<int64_t>(gridDim.x) * lanes.groups()) {
    const int64_t unit = begin + lanes.group();
    const bool exists = unit < units;  // all threads stay for the shuffles
    const Place at = place_of(exists ? unit : units - 1, heads);
    T* dx = row_of<T>(a.dx, at.row) + at.place * H;
    const float* table = row_of<float>(a.table, at.row);
    Pairs<T, W, V> dy = {}, x = {};
    float first[V][W], second[V][W], c[V][W] = {}, s[V][W] = {}, sum[1] = {};
    if (exists) dy.fetch(dx, j, step, half), x.fetch(row_of<T>(a.x, at.row) + at.place * H, j, step, half);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (j + i * step < half) load(table + j + i * step, c[i]), load(table + half + j + i * step, s[i]);
    const float rstd = row_of<float>(a.rstd, at.row)[at.place];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = j + i * step;
      float p[W], q[W], u[W], v[W];
      dy.first[i].get(p), dy.second[i].get(q);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        first[i][e] = p[e] * c[i][e] + q[e] * s[i][e];
        second[i][e] = q[e] * c[i][e] - p[e] * s[i][e];
      }
      if (column >= half) continue;
      x.first[i].get(p), x.second[i].get(q), load(w + column, u), load(w + half + column, v);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const float dn_p = first[i][e] * p[e], dn_q = second[i][e] * q[e];
        sum[0] += dn_p * u[e] + dn_q * v[e];
        first_sums[i][e] += dn_p * rstd, second_sums[i][e] += dn_q * rstd;
        first[i][e] *= u[e] * rstd, second[i][e] *= v[e] * rstd;
      }
    }
    group_sums(sum, lanes);
    const float along = sum[0] * __fdividef(1.0f, static_cast<float>(H)) * rstd * rstd * rstd;
    if (!exists) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = j + i * step;
      if (column >= half) continue;
      float p[W], q[W];
      x.first[i].get(p), x.second[i].get(q);
#pragma unroll
      for (int e = 0; e < W; ++e) p[e] = first[i][e] - p[e] * along, q[e] = second[i][e] - q[e] * along;
      store(dx + column, p), store(dx + half + column, q);
    }
  }
  float* all = reinterpret_cast<float*>(dynamic);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float* mine = all + lanes.group() * H + j + i * step;
    if (j + i * step < half) store(mine, first_sums[i]), store(mine + half, second_sums[i]);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < H) {
    float total = 0;
    for (int g = 0; g < lanes.groups(); ++g) total += all[g * H + static_cast<int>(threadIdx.x)];
    static_cast<float*>(a.scratch)[static_cast<int64_t>(blockIdx.x) * H + threadIdx.x] = total;
  }
}

}  // namespace

void norm_rope(const NormRopeArgs& a, Stream stream) {
  const int64_t H = a.head_size, half = H / 2;
  if (H < 2 || H % 2 != 0 || H > kLargestHead) unsupported_head("norm_rope");
  if (a.x.elements() == 0) return;
  const int heads = static_cast<int>(a.x.columns / H);
  for_float_types(a.x.dtype, a.w.dtype, "norm_rope", [&](auto t, auto u) {
    using T = decltype(t);
    using Weight = decltype(u);
    constexpr int W = kVector<T>;
    const bool vectors = vectors_fit<W>(half, {a.y, a.x, a.table, as_vector(a.w), a.raw.data != nullptr ? a.raw : a.x});
    const Lanes lanes = lanes_for(vectors ? half / W : half);
    const int apart = vectors ? (heads + 1) / 2 : heads;
    const unsigned blocks = blocks_for(a.x.rows * apart, lanes.groups());
    if (vectors)
      norm_rope_kernel<T, Weight, W, 1, 2><<<blocks, 256, 0, stream>>>(a, heads, apart, lanes);
    else
      norm_rope_kernel<T, Weight, 1, kScalars, 1><<<blocks, 256, 0, stream>>>(a, heads, apart, lanes);
  });
  check_launch("norm_rope");
}

void norm_rope_grad(const NormRopeGradArgs& a, Stream stream) {
  const int64_t H = a.head_size, half = H / 2;
  if (H < 2 || H % 2 != 0 || H > kLargestHead) unsupported_head("norm_rope_grad");
  if (a.x.elements() == 0) return;
  const int heads = static_cast<int>(a.x.columns / H);
  const int64_t blocks = std::min(column_sum_blocks(a.x.rows * heads, H), kResident);
  for_float_type(a.x.dtype, "norm_rope_grad", [&](auto t) {
    using T = decltype(t);
    constexpr int W = kVector<T>;
    const bool vectors = vectors_fit<W>(half, {a.dx, a.x, a.table});
    const Lanes lanes = lanes_for(vectors ? half / W : half);
    const size_t bytes = static_cast<size_t>(lanes.groups() * H) * 4;
    if (vectors)
      norm_rope_grad_kernel<T, W, 1><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads, lanes);
    else
      norm_rope_grad_kernel<T, 1, kScalars><<<static_cast<unsigned>(blocks), 256, bytes, stream>>>(a, heads, lanes);
  });
  check_launch("norm_rope_grad");
  add_partial_rows("norm_rope_grad", a.dw.data, a.scratch, blocks, H, stream);
}

}  // namespace uly::kernels
