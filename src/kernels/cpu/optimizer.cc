#include "kernels/optimizer.h"

#include <algorithm>

#include "base/shapes.h"
#include "kernels/cpu/reduce.h"

namespace uly::kernels::cpu {
namespace {

// Bf16 or float: the weight is rounded from the master; void: they are the same memory.
template <typename W>
ULY_INLINE void adamw_range(const AdamwArgs& a, W* weight, int64_t begin, int64_t end) {
  const AdamwConstants k = adamw_constants(a);
  const float coefficient = clip_coefficient(a.squared_norm, a.clip);
  float* __restrict master = a.master;
  float* __restrict m = a.m;
  float* __restrict v = a.v;
  const float* __restrict gradient = a.gradient;
  ULY_LANES
  for (int64_t i = begin; i < end; ++i) {
    const float updated = adamw_element(k, coefficient, gradient[i], m[i], v[i], master[i]);
    master[i] = updated;
    if constexpr (!std::is_void_v<W>) weight[i] = from_float<W>(updated);
  }
}

ULY_INLINE void adamw_split_range(const AdamwArgs& a, int64_t begin, int64_t end) {
  const AdamwConstants k = adamw_constants(a);
  const float coefficient = clip_coefficient(a.squared_norm, a.clip);
  uint16_t* __restrict weight = static_cast<uint16_t*>(a.weight);
  int16_t* __restrict low = a.low;
  float* __restrict m = a.m;
  float* __restrict v = a.v;
  const float* __restrict gradient = a.gradient;
  ULY_LANES
  for (int64_t i = begin; i < end; ++i) {
    const SplitFloat updated = split(adamw_element(k, coefficient, gradient[i], m[i], v[i], join(weight[i], low[i])));
    weight[i] = updated.weight;
    low[i] = updated.low;
  }
}

}  // namespace

ULY_CLONES void squared_norm_blocks(const SquaredNormArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 2048;  // elements summed in fp32
  const int64_t n = a.x.elements(), length = round_up(ceil_div(n, kNormBlocks), kPiece);
  double* partial = static_cast<double*>(a.scratch);
  for_float_type(a.x.dtype, "squared_norm", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    const T* x = static_cast<const T*>(a.x.data);
    for (int64_t b = begin; b < end; ++b) {
      double sum = 0;
      const int64_t last = std::min(n, (b + 1) * length);
      for (int64_t first = b * length; first < last; first += kPiece) sum += static_cast<double>(sum_of_squares(x + first, std::min(kPiece, last - first)));
      partial[b] = sum;
    }
  });
}

void squared_norm_total(const SquaredNormArgs& a) {
  const double* partial = static_cast<const double*>(a.scratch);
  double sum = 0;
  for (int64_t b = 0; b < kNormBlocks; ++b) sum += partial[b];
  *a.total += sum;
}

ULY_CLONES void adamw(const AdamwArgs& a, int64_t begin, int64_t end) {
  if (!finite(a.squared_norm) || !finite(a.loss)) return;
  if (a.low != nullptr) return a.weight_dtype == Dtype::kBf16 ? adamw_split_range(a, begin, end) : unsupported_dtype("adamw");
  if (a.weight == a.master) return adamw_range<void>(a, nullptr, begin, end);
  if (a.weight_dtype == Dtype::kBf16) return adamw_range(a, static_cast<Bf16*>(a.weight), begin, end);
  if (a.weight_dtype == Dtype::kF32) return adamw_range(a, static_cast<float*>(a.weight), begin, end);
  unsupported_dtype("adamw");
}

}  // namespace uly::kernels::cpu
