// Rows of a table by id, and the gradient of the table. Ids are at least 0 and below the table's rows.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

struct EmbedArgs {
  Matrix h, table, ids;  // activation sxD | weight VxD | i64 sx1
};

// dtable[ids[i]] += dh[i]; rows with the same id are added in the order of i, rows whose id is skip_id (padding) not at all.
struct EmbedGradArgs {
  Matrix dtable, dh, ids;  // fp32 VxD, += | activation sxD | i64 sx1
  int64_t skip_id = -1;
};

void embed(const EmbedArgs& a, Stream stream);
void embed_grad(const EmbedGradArgs& a, Stream stream);

namespace cpu {

void embed(const EmbedArgs& a, int64_t begin, int64_t end);           // rows of h
void embed_grad(const EmbedGradArgs& a, int64_t begin, int64_t end);  // columns; 64 or more a range keep it fast

}  // namespace cpu
}  // namespace uly::kernels
