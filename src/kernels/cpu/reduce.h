// Sums and maxima over a row in a fixed order: 32 running values, then halves. Compilers vectorise them without leave to
// reorder.
#pragma once

#include <cstdint>

#include "kernels/access.h"
#include "kernels/cpu/clones.h"

namespace uly::kernels::cpu {

inline constexpr int kLanes = 32;

ULY_INLINE float sum_of_lanes(float* lane) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

template <typename T>
ULY_INLINE float sum_of(const T* x, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += to_float(x[i + l]);
  for (int l = 0; i < n; ++i, ++l) lane[l] += to_float(x[i]);
  return sum_of_lanes(lane);
}

template <typename T>
ULY_INLINE float sum_of_squares(const T* x, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float value = to_float(x[i + l]);
      lane[l] += value * value;
    }
  for (int l = 0; i < n; ++i, ++l) lane[l] += to_float(x[i]) * to_float(x[i]);
  return sum_of_lanes(lane);
}

template <typename X, typename Y, typename W>
ULY_INLINE float sum_of_triple_products(const X* x, const Y* y, const W* w, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += to_float(x[i + l]) * to_float(y[i + l]) * to_float(w[i + l]);
  for (int l = 0; i < n; ++i, ++l) lane[l] += to_float(x[i]) * to_float(y[i]) * to_float(w[i]);
  return sum_of_lanes(lane);
}

// Returns the largest of x that is no NaN, and -infinity for none.
template <typename T>
ULY_INLINE float largest_of(const T* x, int64_t n) {
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = -__builtin_inff();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float value = to_float(x[i + l]);
      lane[l] = value > lane[l] ? value : lane[l];
    }
  for (int l = 0; i < n; ++i, ++l) {
    const float value = to_float(x[i]);
    lane[l] = value > lane[l] ? value : lane[l];
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] = lane[l] > lane[l + width] ? lane[l] : lane[l + width];
  return lane[0];
}

// Sums columns [begin, end) over rows into total, += : value_row(row, first, count, part) adds `count` columns of a row to
// `part`. 64 rows are summed in fp32, those sums in fp64.
template <typename F>
ULY_INLINE void add_column_sums(float* total, int64_t rows, int64_t begin, int64_t end, F&& add_row) {
  constexpr int64_t kStrip = 512, kRows = 64;
  for (int64_t first = begin; first < end; first += kStrip) {
    const int64_t count = end - first < kStrip ? end - first : kStrip;
    double sum[kStrip] = {};
    for (int64_t row = 0; row < rows; row += kRows) {
      float part[kStrip] = {};
      const int64_t last = row + kRows < rows ? row + kRows : rows;
      for (int64_t r = row; r < last; ++r) add_row(r, first, count, part);
      for (int64_t j = 0; j < count; ++j) sum[j] += static_cast<double>(part[j]);
    }
    for (int64_t j = 0; j < count; ++j) total[first + j] = static_cast<float>(static_cast<double>(total[first + j]) + sum[j]);
  }
}

}  // namespace uly::kernels::cpu
