#include "kernels/swiglu.h"

#include "kernels/device/vector.cuh"

namespace uly::kernels {
namespace {

template <typename T>
struct Forward {
  SwigluArgs a;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    const T* gate = row_of<T>(a.gate_up, row) + i * W;
    float g[W], u[W];
    load(gate, g), load(gate + a.a.columns, u);
#pragma unroll
    for (int k = 0; k < W; ++k) g[k] = __fdividef(g[k], 1.0f + expf(-fmaxf(g[k], -80.0f))) * u[k];
    store(row_of<T>(a.a, row) + i * W, g);
  }
};

template <typename T>
struct Backward {
  SwigluGradArgs a;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    T* gate = row_of<T>(a.gate_up, row) + i * W;
    float g[W], u[W], d[W];
    load(gate, g), load(gate + a.da.columns, u), load(row_of<T>(a.da, row) + i * W, d);
    float y[W];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float denominator = 1.0f + expf(-fmaxf(g[k], -80.0f));
      const float sigmoid = __fdividef(1.0f, denominator), silu = __fdividef(g[k], denominator);
      y[k] = silu * u[k];
      g[k] = d[k] * u[k] * (sigmoid + silu * (1.0f - sigmoid));
      u[k] = d[k] * silu;
    }
    store(gate, g), store(gate + a.da.columns, u);
    if (a.a.data) store(row_of<T>(a.a, row) + i * W, y);
  }
};

}  // namespace

void swiglu(const SwigluArgs& a, Stream stream) {
  for_float_type(a.a.dtype, "swiglu", [&](auto t) {
    for_elements<8>("swiglu", Forward<decltype(t)>{a}, a.a.rows, a.a.columns, vectors_fit<8>(a.a.columns, {a.a, a.gate_up}), stream);
  });
}

void swiglu_grad(const SwigluGradArgs& a, Stream stream) {
  for_float_type(a.da.dtype, "swiglu_grad", [&](auto t) {
    for_elements<8>("swiglu_grad", Backward<decltype(t)>{a}, a.da.rows, a.da.columns, vectors_fit<8>(a.da.columns, {a.a.data ? a.a : a.da, a.gate_up, a.da}), stream);
  });
}

}  // namespace uly::kernels
