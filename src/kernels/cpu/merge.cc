#include "kernels/merge.h"

#include <cmath>

#include "kernels/access.h"
#include "kernels/cpu/clones.h"

namespace uly::kernels::cpu {
namespace {

struct Weights {
  float a = 0, b = 0, lse = -__builtin_inff();
};

Weights weights_of(float a_lse, float b_lse) {
  const double largest = static_cast<double>(a_lse > b_lse ? a_lse : b_lse);
  if (largest == -__builtin_inf()) return {};
  const double a = std::exp(static_cast<double>(a_lse) - largest), b = std::exp(static_cast<double>(b_lse) - largest);
  return {static_cast<float>(a / (a + b)), static_cast<float>(b / (a + b)), static_cast<float>(largest + std::log(a + b))};
}

// A partial of weight 0 may hold anything, NaN too.
template <typename Y, typename A, typename B>
ULY_INLINE void weighted_sum(Y* y, const A* a, const B* b, const Weights& w, int64_t n) {
  ULY_LANES
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<Y>((w.a == 0 ? 0 : to_float(a[j]) * w.a) + (w.b == 0 ? 0 : to_float(b[j]) * w.b));
}

}  // namespace

ULY_CLONES void merge(const MergeArgs& m, int64_t begin, int64_t end) {
  const int64_t H = m.head_size, heads = m.y.columns / H;
  for_float_types(m.a.dtype, m.b.dtype, "merge", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using A = decltype(t);
    using B = decltype(u);
    for_float_type(m.y.dtype, "merge", [&](auto v) ULY_INLINE_LAMBDA {
      using Y = decltype(v);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < heads; ++h) {
          const Weights w = weights_of(row_of<float>(m.a_lse, i)[h * m.a_lse_column_stride], row_of<float>(m.b_lse, i)[h * m.b_lse_column_stride]);
          row_of<float>(m.lse, i)[h * m.lse_column_stride] = w.lse;
          weighted_sum(row_of<Y>(m.y, i) + h * H, row_of<A>(m.a, i) + h * H, row_of<B>(m.b, i) + h * H, w, H);
        }
    });
  });
}

}  // namespace uly::kernels::cpu
