// The ends of an exchange: column ranges of a matrix to blocks that lie one after the other, and back; and the sum of
// received pieces.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

// Columns [first, first + count) of a matrix, which lie in a packed buffer at element `at` of row 0, rows `stride` apart.
struct PackedColumns {
  int64_t first = 0, count = 0;
  int64_t at = 0, stride = 0;
};

// pack: packed = x's columns. unpack: x's columns = packed; where ranges overlap, the sum in fp32 in the order of ranges;
// columns in no range keep their values. `ranges` lies in host memory and is not needed after the call.
struct PackArgs {
  Matrix x;                // activation
  void* packed = nullptr;  // x's dtype
  const PackedColumns* ranges = nullptr;
  int64_t num_ranges = 0;
};

// shard[i] += received[p * n + i] for p = 0, 1, ... pieces - 1, each sum in fp32; n = shard's elements.
struct SumPiecesArgs {
  Matrix shard, received;  // fp32, contiguous | kF32 or kBf16, contiguous
  int64_t pieces = 0;
};

// y[i] = the sum of x[p * count + i] over p = 0, 1, ... ranks - 1, in this order. A GPU's only.
struct SumOfRanksArgs {
  double* y = nullptr;
  const double* x = nullptr;
  int64_t count = 0, ranks = 0;
};

void sum_of_ranks(const SumOfRanksArgs& a, Stream stream);
void pack_columns(const PackArgs& a, Stream stream);
void unpack_columns(const PackArgs& a, Stream stream);
void sum_pieces(const SumPiecesArgs& a, Stream stream);

namespace cpu {

void pack_columns(const PackArgs& a, int64_t begin, int64_t end);     // rows
void unpack_columns(const PackArgs& a, int64_t begin, int64_t end);   // rows
void sum_pieces(const SumPiecesArgs& a, int64_t begin, int64_t end);  // elements of the shard

}  // namespace cpu
}  // namespace uly::kernels
