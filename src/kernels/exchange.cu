#include "kernels/exchange.h"

#include <algorithm>

#include "kernels/device/vector.cuh"
#include "kernels/segments.h"

namespace uly::kernels {
namespace {

constexpr int kRanges = 64, kSegments = 48, kSources = 512;  // a launch's; they travel as arguments

// Sizes in units of the copied type.
struct RangeBatch {
  PackedColumns ranges[kRanges];
  int64_t rows, x_stride;
};

struct SegmentBatch {
  Segment segments[kSegments];
  Source sources[kSources];
};

template <typename U>
__global__ void __launch_bounds__(256) pack_kernel(U* packed, const U* x, const __grid_constant__ RangeBatch batch) {
  const PackedColumns& range = batch.ranges[blockIdx.z];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  if (i >= range.count) return;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < batch.rows; row += step)
    packed[range.at + row * range.stride + i] = x[row * batch.x_stride + range.first + i];
}

template <typename T, int W>
__global__ void __launch_bounds__(256) unpack_kernel(const T* packed, const __grid_constant__ Matrix x, const __grid_constant__ SegmentBatch batch) {
  const Segment& segment = batch.segments[blockIdx.z];
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * W, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  if (i >= segment.count) return;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < x.rows; row += step) {
    float sum[W], v[W];
    load(packed + batch.sources[segment.begin].at + row * batch.sources[segment.begin].stride + i, sum);
    for (int64_t s = segment.begin + 1; s < segment.end; ++s) {
      load(packed + batch.sources[s].at + row * batch.sources[s].stride + i, v);
#pragma unroll
      for (int k = 0; k < W; ++k) sum[k] += v[k];
    }
    store(row_of<T>(x, row) + segment.first + i, sum);
  }
}

template <typename T>
struct SumPieces {
  SumPiecesArgs a;
  int64_t n;
  template <int W>
  __device__ void run(int64_t, int64_t i) const {
    float* to = static_cast<float*>(a.shard.data) + i * W;
    const T* from = static_cast<const T*>(a.received.data) + i * W;
    float sum[W], v[W];
    load(to, sum);
    for (int64_t p = 0; p < a.pieces; ++p) {
      load(from + p * n, v);
#pragma unroll
      for (int k = 0; k < W; ++k) sum[k] += v[k];
    }
    store(to, sum);
  }
};

// Copies all ranges in units of U; `per_unit` elements make one.
template <typename U>
void pack_units(const PackArgs& a, int64_t per_unit, Stream stream) {
  for (int64_t begin = 0; begin < a.num_ranges; begin += kRanges) {
    const int64_t count = std::min<int64_t>(kRanges, a.num_ranges - begin);
    RangeBatch batch{.ranges = {}, .rows = a.x.rows, .x_stride = a.x.stride / per_unit};
    int64_t widest = 0;
    for (int64_t r = 0; r < count; ++r) {
      const PackedColumns& range = a.ranges[begin + r];
      batch.ranges[r] = {range.first / per_unit, range.count / per_unit, range.at / per_unit, range.stride / per_unit};
      widest = std::max(widest, batch.ranges[r].count);
    }
    if (widest == 0) continue;
    Launch launch = launch_over(a.x.rows, widest);
    launch.grid.z = static_cast<unsigned>(count);
    pack_kernel<<<launch.grid, launch.block, 0, stream>>>(static_cast<U*>(a.packed), static_cast<const U*>(a.x.data), batch);
    check_launch("pack_columns");
  }
}

bool packs_in_vectors(const PackArgs& a, int64_t W) {
  if (reinterpret_cast<uintptr_t>(a.x.data) % 16 != 0 || reinterpret_cast<uintptr_t>(a.packed) % 16 != 0) return false;
  if (a.x.rows > 1 && a.x.stride % W != 0) return false;
  for (int64_t r = 0; r < a.num_ranges; ++r) {
    const PackedColumns& range = a.ranges[r];
    if (range.first % W != 0 || range.count % W != 0 || range.at % W != 0 || (a.x.rows > 1 && range.stride % W != 0)) return false;
  }
  return true;
}

template <typename T>
void unpack_batch(const PackArgs& a, const SegmentBatch& batch, int count, int64_t widest, bool vectors, Stream stream) {
  Launch launch = launch_over(a.x.rows, vectors ? widest / 8 : widest);
  launch.grid.z = static_cast<unsigned>(count);
  if (vectors)
    unpack_kernel<T, 8><<<launch.grid, launch.block, 0, stream>>>(static_cast<const T*>(a.packed), a.x, batch);
  else
    unpack_kernel<T, 1><<<launch.grid, launch.block, 0, stream>>>(static_cast<const T*>(a.packed), a.x, batch);
  check_launch("unpack_columns");
}

__global__ void sum_of_ranks_kernel(SumOfRanksArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.count) return;
  double sum = a.x[i];
  for (int64_t p = 1; p < a.ranks; ++p) sum += a.x[p * a.count + i];
  a.y[i] = sum;
}

}  // namespace

void sum_of_ranks(const SumOfRanksArgs& a, Stream stream) {
  if (a.count == 0) return;
  sum_of_ranks_kernel<<<static_cast<unsigned>((a.count + 127) / 128), 128, 0, stream>>>(a);
  check_launch("sum_of_ranks");
}

void pack_columns(const PackArgs& a, Stream stream) {
  if (a.x.rows == 0) return;
  if (a.x.dtype == Dtype::kBf16) return packs_in_vectors(a, 8) ? pack_units<uint4>(a, 8, stream) : pack_units<uint16_t>(a, 1, stream);
  if (a.x.dtype == Dtype::kF32) return packs_in_vectors(a, 4) ? pack_units<uint4>(a, 4, stream) : pack_units<uint32_t>(a, 1, stream);
  unsupported_dtype("pack_columns");
}

void unpack_columns(const PackArgs& a, Stream stream) {
  if (a.x.rows == 0) return;
  const Segments all = segments_of(a);
  const bool vectors = packs_in_vectors(a, 8);
  for_float_type(a.x.dtype, "unpack_columns", [&](auto t) {
    SegmentBatch batch{};
    int64_t widest = 0, num_sources = 0;
    int count = 0;
    const auto flush = [&] {
      if (count > 0) unpack_batch<decltype(t)>(a, batch, count, widest, vectors, stream);
      widest = num_sources = count = 0;
    };
    for (const Segment& segment : all.segments) {
      const int64_t needed = segment.end - segment.begin;
      if (needed > kSources) launch_failed("unpack_columns", "more than 512 ranks sent one column");
      if (count == kSegments || num_sources + needed > kSources) flush();
      std::copy_n(all.sources.begin() + segment.begin, needed, batch.sources + num_sources);
      batch.segments[count++] = {segment.first, segment.count, num_sources, num_sources + needed};
      num_sources += needed;
      widest = std::max(widest, segment.count);
    }
    flush();
  });
}

void sum_pieces(const SumPiecesArgs& a, Stream stream) {
  const int64_t n = a.shard.elements();
  for_float_type(a.received.dtype, "sum_pieces", [&](auto t) {
    const SumPieces<decltype(t)> f{a, n};
    for_elements<8>("sum_pieces", f, 1, n, vectors_fit<8>(n, {as_vector(a.shard), as_vector(a.received)}), stream);
  });
}

}  // namespace uly::kernels
