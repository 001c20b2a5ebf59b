#include "kernels/loss.h"

#include <cmath>

#include "kernels/cpu/exp.h"
#include "kernels/cpu/reduce.h"

namespace uly::kernels::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // columns that stay in the first cache between the maximum and the sum

struct Softmax {
  float largest = -__builtin_inff();
  double sum = 0;  // of exp(x - largest)
};

template <typename T>
ULY_INLINE Softmax softmax_of(const T* x, int64_t n) {
  Softmax s;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    const float largest = largest_of(x + first, count);
    if (largest == -__builtin_inff()) continue;
    if (largest > s.largest) {
      s.sum *= std::exp(static_cast<double>(s.largest) - static_cast<double>(largest));
      s.largest = largest;
    }
    float e[kBlock];
    for (int64_t j = 0; j < count; ++j) e[j] = exp_f32(to_float(x[first + j]) - s.largest);
    s.sum += static_cast<double>(sum_of(e, count));
  }
  return s;
}

template <typename T>
ULY_INLINE float cross_entropy_row(T* x, int64_t n, int64_t label, float scale) {
  if (label < 0) {
    for (int64_t j = 0; j < n; ++j) x[j] = T{};
    return 0.0f;
  }
  const Softmax s = softmax_of(x, n);
  const double of_label = static_cast<double>(to_float(x[label])) - static_cast<double>(s.largest);
  const float largest = s.largest, factor = static_cast<float>(static_cast<double>(scale) / s.sum);
  ULY_LANES
  for (int64_t j = 0; j < n; ++j) x[j] = from_float<T>(exp_f32(to_float(x[j]) - largest) * factor);
  x[label] = from_float<T>(static_cast<float>((std::exp(of_label) / s.sum - 1.0) * static_cast<double>(scale)));
  return static_cast<float>(std::log(s.sum) - of_label);
}

}  // namespace

ULY_CLONES void cross_entropy(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  for_float_type(a.logits.dtype, "cross_entropy", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i)
      *row_of<float>(a.loss, i) = cross_entropy_row(row_of<T>(a.logits, i), a.logits.columns, *row_of<int64_t>(a.labels, i), a.scale);
  });
}

void sum_loss(const SumLossArgs& a) {
  double sum = 0;
  for (int64_t i = 0; i < a.loss.rows; ++i) sum += static_cast<double>(*row_of<float>(a.loss, i));
  *a.total += a.scale * sum;
}

}  // namespace uly::kernels::cpu
