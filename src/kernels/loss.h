// Softmax cross entropy over the vocabulary.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

inline constexpr int64_t kIgnoredLabel = -100;

// loss = log(sum(exp(logits))) - logits[label]; logits become (softmax - onehot) * scale. A row whose label is
// kIgnoredLabel (or any negative) gets loss 0 and gradient 0. Labels are below the number of columns.
struct CrossEntropyArgs {
  Matrix logits, loss, labels;  // activation txV, in place | fp32 tx1 | i64 tx1
  float scale = 1;
};

// total += scale * sum(loss), in fp64.
struct SumLossArgs {
  double* total = nullptr;
  Matrix loss;  // fp32 sx1
  double scale = 1;
};

void cross_entropy(const CrossEntropyArgs& a, Stream stream);
void sum_loss(const SumLossArgs& a, Stream stream);

namespace cpu {

void cross_entropy(const CrossEntropyArgs& a, int64_t begin, int64_t end);  // rows
void sum_loss(const SumLossArgs& a);

}  // namespace cpu
}  // namespace uly::kernels
