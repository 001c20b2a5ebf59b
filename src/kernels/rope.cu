#include "kernels/rope.h"

#include "kernels/device/vector.cuh"

namespace uly::kernels {
namespace {

struct Table {
  RopeTableArgs a;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    const float angle = static_cast<float>(*row_of<int64_t>(a.positions, row)) * a.inv_freq[i];
    float* out = row_of<float>(a.table, row);
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    out[i] = cosine * a.scaling;
    out[a.table.columns / 2 + i] = sine * a.scaling;
  }
};

// Vector i of a row's pairs: heads x (H / 2 / W).
template <typename T>
struct Rotate {
  RopeArgs a;
  float direction;
  template <int W>
  __device__ void run(int64_t row, int64_t i) const {
    const uint32_t half = static_cast<uint32_t>(a.table.columns / 2), per_head = half / W;
    const uint32_t head = static_cast<uint32_t>(i) / per_head, j = (static_cast<uint32_t>(i) - head * per_head) * W;
    T* first = row_of<T>(a.x, row) + static_cast<int64_t>(head) * 2 * half + j;
    const float* cosine = row_of<float>(a.table, row) + j;
    float x[W], y[W], c[W], s[W];
    load(first, x), load(first + half, y), load(cosine, c), load(cosine + half, s);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float old = x[k];
      s[k] *= direction;
      x[k] = old * c[k] - y[k] * s[k];
      y[k] = y[k] * c[k] + old * s[k];
    }
    store(first, x), store(first + half, y);
  }
};

}  // namespace

void rope_table(const RopeTableArgs& a, Stream stream) { for_elements<1>("rope_table", Table{a}, a.table.rows, a.table.columns / 2, true, stream); }

void rope(const RopeArgs& a, Stream stream) {
  const int64_t H = a.table.columns;
  for_float_type(a.x.dtype, "rope", [&](auto t) {
    const Rotate<decltype(t)> f{a, a.direction < 0 ? -1.0f : 1.0f};
    for_elements<8>("rope", f, a.x.rows, a.x.columns / H * (H / 2), vectors_fit<8>(H / 2, {a.x, a.table}), stream);
  });
}

}  // namespace uly::kernels
