// Zero, copy, add, and biases.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

// Copy of any dtype to itself, and between kF32 and kBf16. y and x have the same shape.
struct CopyArgs {
  Matrix y, x;
};

// y += x; each kF32 or kBf16, not necessarily the same.
struct AddArgs {
  Matrix y, x;
};

struct AddBiasArgs {
  Matrix y, b;  // activation txO, += | weight O
};

struct BiasGradArgs {
  Matrix db, dy;            // fp32 O, += column sums | activation txO
  void* scratch = nullptr;  // CUDA: column_sum_scratch_bytes(dy.rows, dy.columns)
};

void zero(const Matrix& y, Stream stream);
void copy(const CopyArgs& a, Stream stream);  // device to device
void add(const AddArgs& a, Stream stream);
void add_bias(const AddBiasArgs& a, Stream stream);
void bias_grad(const BiasGradArgs& a, Stream stream);

namespace cpu {

// Elements, counted in row-major order without gaps: of y.elements().
void zero(const Matrix& y, int64_t begin, int64_t end);
void copy(const CopyArgs& a, int64_t begin, int64_t end);
void add(const AddArgs& a, int64_t begin, int64_t end);

void add_bias(const AddBiasArgs& a, int64_t begin, int64_t end);    // rows
void bias_grad(const BiasGradArgs& a, int64_t begin, int64_t end);  // columns

}  // namespace cpu
}  // namespace uly::kernels
