// Matrix products by cuBLASLt on row-major matrices of bf16: results in bf16, or added to fp32 within the GEMM.
//
// Choice      The first time that a shape is seen with about so many tokens (to a power of two), the algorithms that
//             cuBLASLt proposes are timed on the operands at hand and the fastest is kept: its own order is often a few
//             percent off. With fixed_choice the first is taken, so that runs give the same bits. Timing waits for the
//             stream: it happens in the first step, and in the first of twice or half its length.
// Source      cuBLAS 13, cublasLtMatmul
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/matrix.h"
#include "ops/places.h"

namespace uly::engine::cuda {

class Gemm {
 public:
  // `workspace`: ops::kGemmWorkspaceBytes of device memory, used by one stream only.
  Gemm(kernels::Stream stream, void* workspace, bool fixed_choice);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  using Matrix = kernels::Matrix;
  void linear(const Matrix& y_tO, const Matrix& x_tI, const Matrix& w_OI);                          // y = x w'
  void linear_add(const Matrix& y_tO, const Matrix& x_tI, const Matrix& w_OI, const Matrix& r_tO);  // y = r + x w'; r may be y
  void linear_dx(const Matrix& dx_tI, const Matrix& dy_tO, const Matrix& w_OI);                     // dx = dy w
  void linear_dw(const Matrix& dw_OI, const Matrix& dy_tO, const Matrix& x_tI, bool add);           // dw = or += dy' x, fp32

 private:
  struct Product;
  void run(const Product& p);

  struct Inside;
  std::unique_ptr<Inside> inside_;
};

}  // namespace uly::engine::cuda
