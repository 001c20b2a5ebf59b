#include "kernels/norm_rope.h"

#include <algorithm>

#include "kernels/cpu/reduce.h"

namespace uly::kernels::cpu {
namespace {

template <typename T, typename W>
ULY_INLINE void norm_rope_head(T* y, float* rstd, const T* x, const W* w, const float* table, int64_t H, float eps) {
  const int64_t half = H / 2;
  const float r = 1.0f / __builtin_sqrtf(sum_of_squares(x, H) / static_cast<float>(H) + eps);
  *rstd = r;
  ULY_LANES
  for (int64_t j = 0; j < half; ++j) {
    const float first = to_float(x[j]) * r * to_float(w[j]), second = to_float(x[j + half]) * r * to_float(w[j + half]);
    y[j] = from_float<T>(first * table[j] - second * table[j + half]);
    y[j + half] = from_float<T>(second * table[j] + first * table[j + half]);
  }
}

template <typename T, typename W>
ULY_INLINE void norm_rope_dx_head(T* dx, const T* x, float rstd, const W* w, const float* table, int64_t H) {
  const int64_t half = H / 2;
  float back[kLargestHead];
  ULY_LANES
  for (int64_t j = 0; j < half; ++j) {
    const float first = to_float(dx[j]), second = to_float(dx[j + half]);
    back[j] = first * table[j] + second * table[j + half];
    back[j + half] = second * table[j] - first * table[j + half];
  }
  const float c = sum_of_triple_products(back, x, w, H) / static_cast<float>(H) * rstd * rstd * rstd;
  ULY_LANES
  for (int64_t j = 0; j < H; ++j) dx[j] = from_float<T>(back[j] * to_float(w[j]) * rstd - to_float(x[j]) * c);
}

// Adds columns [first, last) of a head's share of dw.
template <typename T>
ULY_INLINE void add_dw_head(float* part, const T* dy, const T* x, float rstd, const float* table, int64_t half, int64_t first, int64_t last) {
  const int64_t middle = std::min(last, half);
  ULY_LANES
  for (int64_t j = first; j < middle; ++j)
    part[j - first] += (to_float(dy[j]) * table[j] + to_float(dy[j + half]) * table[j + half]) * (to_float(x[j]) * rstd);
  ULY_LANES
  for (int64_t j = std::max(first, half); j < last; ++j)
    part[j - first] += (to_float(dy[j]) * table[j - half] - to_float(dy[j - half]) * table[j]) * (to_float(x[j]) * rstd);
}

}  // namespace

ULY_CLONES void norm_rope(const NormRopeArgs& a, int64_t begin, int64_t end) {
  const int64_t H = a.head_size;
  if (H < 2 || H % 2 != 0 || H > kLargestHead) unsupported_head("norm_rope");
  const int64_t n = a.x.columns / H;
  for_float_types(a.x.dtype, a.w.dtype, "norm_rope", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row_of<T>(a.x, i);
      if (a.raw.data != nullptr) std::copy_n(x, a.x.columns, row_of<T>(a.raw, i));
      for (int64_t h = 0; h < n; ++h)
        norm_rope_head(row_of<T>(a.y, i) + h * H, row_of<float>(a.rstd, i) + h, x + h * H, static_cast<const W*>(a.w.data), row_of<float>(a.table, i), H,
                       static_cast<float>(a.eps));
    }
  });
}

ULY_CLONES void norm_rope_grad_dw(const NormRopeGradArgs& a, int64_t begin, int64_t end) {
  const int64_t H = a.head_size;
  if (H < 2 || H % 2 != 0 || H > kLargestHead) unsupported_head("norm_rope_grad");
  const int64_t n = a.x.columns / H;
  for_float_type(a.x.dtype, "norm_rope_grad", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    add_column_sums(static_cast<float*>(a.dw.data), a.x.rows, begin, end, [&](int64_t row, int64_t first, int64_t count, float* part) ULY_INLINE_LAMBDA {
      for (int64_t h = 0; h < n; ++h)
        add_dw_head(part, row_of<T>(a.dx, row) + h * H, row_of<T>(a.x, row) + h * H, row_of<float>(a.rstd, row)[h], row_of<float>(a.table, row), H / 2, first,
                    first + count);
    });
  });
}

ULY_CLONES void norm_rope_grad_dx(const NormRopeGradArgs& a, int64_t begin, int64_t end) {
  const int64_t H = a.head_size;
  if (H < 2 || H % 2 != 0 || H > kLargestHead) unsupported_head("norm_rope_grad");
  const int64_t n = a.x.columns / H;
  for_float_types(a.x.dtype, a.w.dtype, "norm_rope_grad", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < n; ++h)
        norm_rope_dx_head(row_of<T>(a.dx, i) + h * H, row_of<T>(a.x, i) + h * H, row_of<float>(a.rstd, i)[h], static_cast<const W*>(a.w.data),
                          row_of<float>(a.table, i), H);
  });
}

}  // namespace uly::kernels::cpu
