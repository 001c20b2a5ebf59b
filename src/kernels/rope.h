// Rotary position embedding; columns i and i + H/2 of a head are a pair.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

// Writes cos | sin of angles position * inv_freq, which are fp32 products, times `scaling`.
struct RopeTableArgs {
  Matrix table, positions;          // fp32 sxH | i64 sx1
  const float* inv_freq = nullptr;  // H/2, where the table is
  float scaling = 1;                // of cos and sin (YaRN's attention factor)
};

// Rotates each head of x, in place: columns / H heads a row, H = table.columns. direction -1 rotates back.
struct RopeArgs {
  Matrix x, table;  // activation | fp32 sxH
  int direction = 1;
};

void rope_table(const RopeTableArgs& a, Stream stream);
void rope(const RopeArgs& a, Stream stream);

namespace cpu {

void rope_table(const RopeTableArgs& a, int64_t begin, int64_t end);  // rows
void rope(const RopeArgs& a, int64_t begin, int64_t end);             // rows

}  // namespace cpu
}  // namespace uly::kernels
