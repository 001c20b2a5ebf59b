// Root-mean-square norms: y = w x / sqrt(mean(x^2) + eps), over a row. Those of heads: norm_rope.h.
//
// With g = dy w, xhat = x rstd and a mean over the normed columns:
//   dx = rstd (g - xhat mean(g xhat)),   dw = sum over rows of dy xhat
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

// y_sD may be x_sD.
struct RmsNormArgs {
  Matrix y, rstd, x, w;  // activation sxD | fp32 sx1 | activation sxD | weight D
  double eps = 1e-5;
};

struct RmsNormGradArgs {
  Matrix dx, dw, dy, x, rstd, w;  // activation sxD, += | fp32 D, += | activation | activation | fp32 sx1 | weight D
  void* scratch = nullptr;        // CUDA: column_sum_scratch_bytes(x.rows, x.columns)
};

void rms_norm(const RmsNormArgs& a, Stream stream);
void rms_norm_grad(const RmsNormGradArgs& a, Stream stream);

namespace cpu {

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end);              // rows
void rms_norm_grad_dx(const RmsNormGradArgs& a, int64_t begin, int64_t end);  // rows
void rms_norm_grad_dw(const RmsNormGradArgs& a, int64_t begin, int64_t end);  // columns of w

}  // namespace cpu
}  // namespace uly::kernels
