#include "kernels/embed.h"

#include "kernels/device/vector.cuh"

namespace uly::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 512;  // table rows r with equal r % kGroups belong to one block
constexpr int kAhead = 4;     // rows of dh that are on their way at once: many tokens may share an id

template <typename T>
struct Lookup {
  EmbedArgs a;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    float v[W];
    load_any(a.table, *row_of<int64_t>(a.ids, row) * a.table.stride + i * W, v);
    store(row_of<T>(a.h, row) + i * W, v);
  }
};

// A block walks over all ids, 256 at a time, lists those of its table rows in their order, and adds their rows of dh to
// its columns. So each element of the table is added to by one thread, in the order of tokens.
template <typename T, int W>
__global__ void __launch_bounds__(kThreads) embed_grad_kernel(const __grid_constant__ EmbedGradArgs a) {
  __shared__ int counts[kThreads / 32];
  __shared__ int64_t listed_ids[kThreads];
  __shared__ int listed[kThreads];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t first = 0; first < a.dh.rows; first += kThreads) {
    const int64_t token = first + threadIdx.x;
    const int64_t id = token < a.dh.rows ? *row_of<int64_t>(a.ids, token) : -1;
    const bool mine = id >= 0 && id != a.skip_id && id % kGroups == blockIdx.y;
    const unsigned mask = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) counts[warp] = __popc(mask);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      before += w < warp ? counts[w] : 0;
      total += counts[w];
    }
    if (mine) {
      const int place = before + __popc(mask & ((1u << lane) - 1));
      listed[place] = static_cast<int>(threadIdx.x);
      listed_ids[place] = id;
    }
    __syncthreads();
    if (column < a.dh.columns) {
      for (int l = 0; l < total; l += kAhead) {
        Held<T, W> held[kAhead];
#pragma unroll
        for (int p = 0; p < kAhead; ++p)
          if (l + p < total) held[p].fetch(row_of<T>(a.dh, first + listed[l + p]) + column);
#pragma unroll
        for (int p = 0; p < kAhead; ++p) {
          if (l + p >= total) break;
          float* to = row_of<float>(a.dtable, listed_ids[l + p]) + column;
          float sum[W], v[W];
          load(to, sum), held[p].get(v);
#pragma unroll
          for (int k = 0; k < W; ++k) sum[k] += v[k];
          store(to, sum);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

void embed(const EmbedArgs& a, Stream stream) {
  for_float_type(a.h.dtype, "embed", [&](auto t) {
    for_elements<8>("embed", Lookup<decltype(t)>{a}, a.h.rows, a.h.columns, vectors_fit<8>(a.h.columns, {a.h, a.table}), stream);
  });
}

void embed_grad(const EmbedGradArgs& a, Stream stream) {
  if (a.dh.elements() == 0) return;
  for_float_type(a.dh.dtype, "embed_grad", [&](auto t) {
    using T = decltype(t);
    const bool vectors = vectors_fit<8>(a.dh.columns, {a.dh, a.dtable});
    const int64_t per_block = kThreads * (vectors ? 8 : 1);
    const dim3 grid(static_cast<unsigned>((a.dh.columns + per_block - 1) / per_block), kGroups);
    if (vectors)
      embed_grad_kernel<T, 8><<<grid, kThreads, 0, stream>>>(a);
    else
      embed_grad_kernel<T, 1><<<grid, kThreads, 0, stream>>>(a);
  });
  check_launch("embed_grad");
}

}  // namespace uly::kernels
