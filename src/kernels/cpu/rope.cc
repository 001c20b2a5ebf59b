#include "kernels/rope.h"

#include <cmath>

#include "kernels/access.h"
#include "kernels/cpu/clones.h"

namespace uly::kernels::cpu {
namespace {

template <typename T>
ULY_INLINE void rotate(T* first, T* second, const float* cosine, const float* sine, float direction, int64_t half) {
  ULY_LANES
  for (int64_t j = 0; j < half; ++j) {
    const float s = sine[j] * direction;
    const float x = to_float(first[j]), y = to_float(second[j]);
    first[j] = from_float<T>(x * cosine[j] - y * s);
    second[j] = from_float<T>(y * cosine[j] + x * s);
  }
}

}  // namespace

void rope_table(const RopeTableArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.table.columns / 2;
  for (int64_t i = begin; i < end; ++i) {
    const float position = static_cast<float>(*row_of<int64_t>(a.positions, i));
    float* row = row_of<float>(a.table, i);
    for (int64_t j = 0; j < half; ++j) {
      const float angle = position * a.inv_freq[j];
      row[j] = std::cos(angle) * a.scaling;
      row[half + j] = std::sin(angle) * a.scaling;
    }
  }
}

ULY_CLONES void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t H = a.table.columns, half = H / 2, n = a.x.columns / H;
  const float direction = a.direction < 0 ? -1.0f : 1.0f;
  for_float_type(a.x.dtype, "rope", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const float* cosine = row_of<float>(a.table, i);
      for (int64_t h = 0; h < n; ++h) {
        T* x = row_of<T>(a.x, i) + h * H;
        rotate(x, x + half, cosine, cosine + half, direction, half);
      }
    }
  });
}

}  // namespace uly::kernels::cpu
