// What kernels take: matrices by address. Every x.h here declares its arguments once, the CPU version in
// uly::kernels::cpu (x.cc in cpu/) and the CUDA version in uly::kernels (x.cu, asynchronous on a stream).
//
// Rules       Sizes and strides are 64-bit and count elements. Columns are adjacent; rows are `stride` apart. A matrix
//             with one value a row (rstd, loss, ids) is rows x 1 and its stride is respected. A vector (a norm's weight,
//             a bias) is read from `data` on, adjacent. Matrices do not overlap unless a comment says they may.
// Dtypes      "activation": kF32 or kBf16, one for all activations of a call. "weight": kF32 or kBf16, on its own.
//             The math is fp32 and a result is rounded once, to nearest even.
// CPU         A call works on [begin, end) of what its comment names; the caller spreads ranges over threads. Results do
//             not depend, to the bit, on how a whole is cut into ranges.
// Throws      InternalError for a dtype that is not listed, DeviceError for a failed launch.
#pragma once

#include <cstdint>

#include "base/dtype.h"

struct CUstream_st;

namespace uly::kernels {

using Stream = CUstream_st*;  // a cudaStream_t

struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;  // elements from one row to the next

  int64_t elements() const { return rows * columns; }
  bool contiguous() const { return stride == columns || rows <= 1; }
};

// How many partial rows the CUDA column sums (norm weights, bias) keep, for so many rows of so many columns.
constexpr int64_t column_sum_blocks(int64_t rows, int64_t columns) {
  int64_t blocks = columns <= 1024 ? 1056 : 1056 * 1024 / columns;
  if (blocks < 264) blocks = 264;
  return rows < blocks ? (rows < 1 ? 1 : rows) : blocks;
}

// Returns the bytes of scratch that a CUDA column sum needs; the CPU versions need none.
constexpr int64_t column_sum_scratch_bytes(int64_t rows, int64_t columns) { return column_sum_blocks(rows, columns) * columns * 4; }

}  // namespace uly::kernels
