// Head norm and rotary embedding of queries or keys in one pass each way; columns i and i + H/2 of a head are a pair.
//
// With xhat = x rstd, rstd = 1 / sqrt(mean(x^2) + eps) over a head:  y = rotate(w xhat), rounded once.
// With dn = dy rotated back and g = dn w:  dx = rstd (g - xhat mean(g xhat)),  dw = sum over rows and heads of dn xhat
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

inline constexpr int64_t kLargestHead = 256;  // head sizes are even

// Rows of n heads, n = columns / H. y may be x.
struct NormRopeArgs {
  Matrix y, raw, rstd, x, w, table;  // activation sxnH | activation sxnH: x as it was, or no data | fp32 sxn | activation sxnH | weight H | fp32 sxH: cos | sin
  int64_t head_size = 0;
  double eps = 1e-5;
};

struct NormRopeGradArgs {
  Matrix dx, dw, x, rstd, w, table;  // activation sxnH: dy in, dx out | fp32 H, += | activation sxnH | fp32 sxn | weight H | fp32 sxH
  int64_t head_size = 0;
  void* scratch = nullptr;  // CUDA: column_sum_scratch_bytes(rows * n, H)
};

// Throw InternalError, as the CPU versions do, for heads that are odd or larger than kLargestHead.
void norm_rope(const NormRopeArgs& a, Stream stream);
void norm_rope_grad(const NormRopeGradArgs& a, Stream stream);

namespace cpu {

void norm_rope(const NormRopeArgs& a, int64_t begin, int64_t end);  // rows
// dw first: dx overwrites the dy that dw reads.
void norm_rope_grad_dw(const NormRopeGradArgs& a, int64_t begin, int64_t end);  // columns of w
void norm_rope_grad_dx(const NormRopeGradArgs& a, int64_t begin, int64_t end);  // rows

}  // namespace cpu
}  // namespace uly::kernels
