// Two attention results over different keys as one.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

// lse = log(exp(a_lse) + exp(b_lse)), y = a exp(a_lse - lse) + b exp(b_lse - lse), for each head of a row; n = columns / H.
// A log-sum-exp of -infinity is a partial without keys: it weighs 0 whatever it holds; two such give y = 0, lse = -infinity.
// In place: y may be a or b where dtype and stride are the same, lse may be a_lse or b_lse where strides are.
struct MergeArgs {
  Matrix y, lse;    // rows x nH, kF32 or kBf16 each on its own | fp32 rows x n
  Matrix a, a_lse;  // the same
  Matrix b, b_lse;  // the same
  int64_t head_size = 0;
  // A log-sum-exp of row r and head h lies at r * stride + h * column_stride, so it may be stored n x rows.
  int64_t lse_column_stride = 1, a_lse_column_stride = 1, b_lse_column_stride = 1;
};

void merge(const MergeArgs& a, Stream stream);

namespace cpu {

void merge(const MergeArgs& a, int64_t begin, int64_t end);  // rows

}  // namespace cpu
}  // namespace uly::kernels
