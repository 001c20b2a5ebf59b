#include "kernels/swiglu.h"

#include "kernels/access.h"
#include "kernels/cpu/exp.h"

namespace uly::kernels::cpu {

ULY_CLONES void swiglu(const SwigluArgs& a, int64_t begin, int64_t end) {
  const int64_t F = a.a.columns;
  for_float_type(a.a.dtype, "swiglu", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      T* y = row_of<T>(a.a, i);
      const T* gate = row_of<T>(a.gate_up, i);
      const T* up = gate + F;
      ULY_LANES
      for (int64_t j = 0; j < F; ++j) {
        const float g = to_float(gate[j]);
        y[j] = from_float<T>(g / (1.0f + exp_f32(-g)) * to_float(up[j]));
      }
    }
  });
}

ULY_CLONES void swiglu_grad(const SwigluGradArgs& a, int64_t begin, int64_t end) {
  const int64_t F = a.da.columns;
  for_float_type(a.da.dtype, "swiglu_grad", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      T* y = a.a.data ? row_of<T>(a.a, i) : nullptr;
      const T* da = row_of<T>(a.da, i);
      T* gate = row_of<T>(a.gate_up, i);
      T* up = gate + F;
      ULY_LANES
      for (int64_t j = 0; j < F; ++j) {
        const float g = to_float(gate[j]), u = to_float(up[j]), d = to_float(da[j]);
        const float denominator = 1.0f + exp_f32(-g);
        const float sigmoid = 1.0f / denominator, silu = g / denominator;
        if (y) y[j] = from_float<T>(silu * u);
        up[j] = from_float<T>(d * silu);
        gate[j] = from_float<T>(d * u * (sigmoid + silu * (1.0f - sigmoid)));
      }
    }
  });
}

}  // namespace uly::kernels::cpu
