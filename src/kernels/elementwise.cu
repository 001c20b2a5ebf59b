#include "kernels/elementwise.h"

#include "kernels/device/reduce.cuh"

namespace uly::kernels {
namespace {

size_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
    case Dtype::kI64:
      return 8;
    case Dtype::kF32:
    case Dtype::kI32:
      return 4;
    case Dtype::kBf16:
    case Dtype::kF16:
    case Dtype::kI16:
      return 2;
    case Dtype::kU8:
      return 1;
  }
  return 1;
}

CopyArgs flattened_pair(const Matrix& y, const Matrix& x) {
  if (!y.contiguous() || !x.contiguous()) return {y, x};
  return {flattened(y), flattened(x)};
}

template <typename U>
struct CopyUnits {
  U* y;
  const U* x;
  int64_t y_stride, x_stride;
  template <int>
  __device__ void run(int64_t row, int64_t i) const {
    y[row * y_stride + i] = x[row * x_stride + i];
  }
};

// Copies in units of U if all addresses and strides are multiples of it; an element has `element` bytes.
template <typename U>
bool copy_units(const Matrix& y, const Matrix& x, int64_t element, Stream stream) {
  constexpr int64_t kUnit = sizeof(U);
  const uint64_t all =
      reinterpret_cast<uintptr_t>(y.data) | reinterpret_cast<uintptr_t>(x.data) | static_cast<uint64_t>((y.columns | y.stride | x.stride) * element);
  if (all % sizeof(U) != 0) return false;
  const CopyUnits<U> f{static_cast<U*>(y.data), static_cast<const U*>(x.data), y.stride * element / kUnit, x.stride * element / kUnit};
  for_elements<1>("copy", f, y.rows, y.columns * element / kUnit, false, stream);
  return true;
}

template <typename T>
struct Cast {
  Matrix y, x;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    float v[W];
    load_any(x, row * x.stride + i * W, v);
    store(row_of<T>(y, row) + i * W, v);
  }
};

template <typename T>
struct Add {
  Matrix y, x;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    T* to = row_of<T>(y, row) + i * W;
    float v[W], w[W];
    load(to, v), load_any(x, row * x.stride + i * W, w);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] += w[k];
    store(to, v);
  }
};

// Rows blockIdx.y, + gridDim.y, ... of W columns a thread, into row blockIdx.y of scratch.
template <typename T, int W>
__global__ void __launch_bounds__(256) column_sums_kernel(const __grid_constant__ BiasGradArgs a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * W;
  if (column >= a.dy.columns) return;
  float sum[W], v[W];
  for (int k = 0; k < W; ++k) sum[k] = 0;
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < a.dy.rows; row += gridDim.y) {
    load(row_of<T>(a.dy, row) + column, v);
#pragma unroll
    for (int k = 0; k < W; ++k) sum[k] += v[k];
  }
  store(static_cast<float*>(a.scratch) + blockIdx.y * a.dy.columns + column, sum);
}

void require_float(Dtype dtype, const char* kernel) {
  if (dtype != Dtype::kF32 && dtype != Dtype::kBf16) unsupported_dtype(kernel);
}

}  // namespace

void zero(const Matrix& y, Stream stream) {
  if (y.elements() == 0) return;
  const size_t bytes = element_bytes(y.dtype);
  const cudaError_t error = y.contiguous() ? cudaMemsetAsync(y.data, 0, static_cast<size_t>(y.elements()) * bytes, stream)
                                           : cudaMemset2DAsync(y.data, static_cast<size_t>(y.stride) * bytes, 0, static_cast<size_t>(y.columns) * bytes,
                                                               static_cast<size_t>(y.rows), stream);
  check_call("zero", error);
}

void copy(const CopyArgs& a, Stream stream) {
  if (a.y.elements() == 0) return;
  const CopyArgs flat = flattened_pair(a.y, a.x);
  const Matrix &y = flat.y, &x = flat.x;
  if (y.dtype == x.dtype) {
    const int64_t bytes = static_cast<int64_t>(element_bytes(y.dtype));
    if (y.rows == 1) return check_call("copy", cudaMemcpyAsync(y.data, x.data, static_cast<size_t>(y.columns * bytes), cudaMemcpyDeviceToDevice, stream));
    if (copy_units<uint4>(y, x, bytes, stream) || copy_units<uint64_t>(y, x, bytes, stream) || copy_units<uint32_t>(y, x, bytes, stream)) return;
    if (!copy_units<uint16_t>(y, x, bytes, stream)) copy_units<uint8_t>(y, x, bytes, stream);
    return;
  }
  require_float(x.dtype, "copy");
  for_float_type(y.dtype, "copy", [&](auto t) {
    for_elements<8>("copy", Cast<decltype(t)>{y, x}, y.rows, y.columns, vectors_fit<8>(y.columns, {y, x}), stream);
  });
}

void add(const AddArgs& a, Stream stream) {
  const CopyArgs flat = flattened_pair(a.y, a.x);
  const Matrix &y = flat.y, &x = flat.x;
  require_float(x.dtype, "add");
  for_float_type(y.dtype, "add", [&](auto t) { for_elements<8>("add", Add<decltype(t)>{y, x}, y.rows, y.columns, vectors_fit<8>(y.columns, {y, x}), stream); });
}

void add_bias(const AddBiasArgs& a, Stream stream) {
  Matrix b = a.b;
  b.stride = 0;  // the same row for every row
  require_float(b.dtype, "add_bias");
  for_float_type(a.y.dtype, "add_bias", [&](auto t) {
    for_elements<8>("add_bias", Add<decltype(t)>{a.y, b}, a.y.rows, a.y.columns, vectors_fit<8>(a.y.columns, {a.y, b}), stream);
  });
}

void bias_grad(const BiasGradArgs& a, Stream stream) {
  if (a.dy.elements() == 0) return;
  const int64_t blocks = column_sum_blocks(a.dy.rows, a.dy.columns);
  for_float_type(a.dy.dtype, "bias_grad", [&](auto t) {
    using T = decltype(t);
    const bool vectors = vectors_fit<8>(a.dy.columns, {a.dy});
    const int64_t items = vectors ? a.dy.columns / 8 : a.dy.columns, threads = items < 256 ? (items + 31) / 32 * 32 : 256;
    const dim3 grid(static_cast<unsigned>((items + threads - 1) / threads), static_cast<unsigned>(blocks));
    if (vectors)
      column_sums_kernel<T, 8><<<grid, static_cast<unsigned>(threads), 0, stream>>>(a);
    else
      column_sums_kernel<T, 1><<<grid, static_cast<unsigned>(threads), 0, stream>>>(a);
  });
  check_launch("bias_grad");
  add_partial_rows("bias_grad", a.db.data, a.scratch, blocks, a.dy.columns, stream);
}

}  // namespace uly::kernels
