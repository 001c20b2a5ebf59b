// How kernels reach into a matrix and turn a dtype into a type.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/matrix.h"

namespace uly::kernels {

// Throws InternalError.
[[noreturn]] void unsupported_dtype(const char* kernel);

// Throws InternalError.
[[noreturn]] void unsupported_head(const char* kernel);

// Throws DeviceError; `text` says what the runtime said.
[[noreturn]] void launch_failed(const char* kernel, const char* text);

template <typename T>
ULY_HOST_DEVICE T* row_of(const Matrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

// Returns m as one long row where nothing lies between its rows.
inline Matrix flattened(Matrix m) {
  if (!m.contiguous()) return m;
  m.columns = m.stride = m.elements();
  m.rows = 1;
  return m;
}

// Calls f(float{}) or f(Bf16{}).
template <typename F>
inline __attribute__((always_inline)) void for_float_type(Dtype dtype, const char* kernel, F&& f) {
  if (dtype == Dtype::kF32)
    f(float{});
  else if (dtype == Dtype::kBf16)
    f(Bf16{});
  else
    unsupported_dtype(kernel);
}

// The same for two dtypes.
template <typename F>
inline __attribute__((always_inline)) void for_float_types(Dtype first, Dtype second, const char* kernel, F&& f) {
  if (first == Dtype::kF32 && second == Dtype::kF32)
    f(float{}, float{});
  else if (first == Dtype::kF32 && second == Dtype::kBf16)
    f(float{}, Bf16{});
  else if (first == Dtype::kBf16 && second == Dtype::kF32)
    f(Bf16{}, float{});
  else if (first == Dtype::kBf16 && second == Dtype::kBf16)
    f(Bf16{}, Bf16{});
  else
    unsupported_dtype(kernel);
}

}  // namespace uly::kernels
