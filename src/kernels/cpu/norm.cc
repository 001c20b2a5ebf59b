#include "kernels/norm.h"

#include <cmath>

#include "kernels/cpu/reduce.h"

namespace uly::kernels::cpu {
namespace {

template <typename T, typename W>
ULY_INLINE void norm(T* y, float* rstd, const T* x, const W* w, int64_t n, float eps) {
  const float r = 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  *rstd = r;
  ULY_LANES
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(to_float(x[j]) * r * to_float(w[j]));
}

// dx += rstd dy w - x c.
template <typename T, typename W>
ULY_INLINE void norm_dx(T* dx, const T* dy, const T* x, float rstd, const W* w, int64_t n) {
  const float c = sum_of_triple_products(dy, x, w, n) / static_cast<float>(n) * rstd * rstd * rstd;
  ULY_LANES
  for (int64_t j = 0; j < n; ++j) {
    const float gradient = to_float(dy[j]) * to_float(w[j]) * rstd - to_float(x[j]) * c;
    dx[j] = from_float<T>(to_float(dx[j]) + gradient);
  }
}

template <typename T>
ULY_INLINE void add_dw_row(float* part, const T* dy, const T* x, float rstd, int64_t n) {
  ULY_LANES
  for (int64_t j = 0; j < n; ++j) part[j] += to_float(dy[j]) * (to_float(x[j]) * rstd);
}

}  // namespace

ULY_CLONES void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for_float_types(a.x.dtype, a.w.dtype, "rms_norm", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    for (int64_t i = begin; i < end; ++i)
      norm(row_of<T>(a.y, i), row_of<float>(a.rstd, i), row_of<T>(a.x, i), static_cast<const W*>(a.w.data), a.x.columns, static_cast<float>(a.eps));
  });
}

ULY_CLONES void rms_norm_grad_dx(const RmsNormGradArgs& a, int64_t begin, int64_t end) {
  for_float_types(a.x.dtype, a.w.dtype, "rms_norm_grad", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    for (int64_t i = begin; i < end; ++i)
      norm_dx(row_of<T>(a.dx, i), row_of<T>(a.dy, i), row_of<T>(a.x, i), *row_of<float>(a.rstd, i), static_cast<const W*>(a.w.data), a.x.columns);
  });
}

ULY_CLONES void rms_norm_grad_dw(const RmsNormGradArgs& a, int64_t begin, int64_t end) {
  for_float_type(a.x.dtype, "rms_norm_grad", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    add_column_sums(static_cast<float*>(a.dw.data), a.x.rows, begin, end, [&](int64_t row, int64_t first, int64_t count, float* part) ULY_INLINE_LAMBDA {
      add_dw_row(part, row_of<T>(a.dy, row) + first, row_of<T>(a.x, row) + first, *row_of<float>(a.rstd, row), count);
    });
  });
}

}  // namespace uly::kernels::cpu
