#include "kernels/elementwise.h"

#include <cstring>

#include "kernels/cpu/reduce.h"

namespace uly::kernels::cpu {
namespace {

// Calls f(row, first column, count) for the pieces of rows that make up elements [begin, end).
template <typename F>
ULY_INLINE void for_row_pieces(int64_t columns, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t row = begin / columns, first = begin % columns;
    const int64_t count = columns - first < end - begin ? columns - first : end - begin;
    f(row, first, count);
    begin += count;
  }
}

CopyArgs flattened_pair(const Matrix& y, const Matrix& x) {
  if (!y.contiguous() || !x.contiguous()) return {y, x};
  return {flattened(y), flattened(x)};
}

char* bytes_at(const Matrix& m, int64_t row, int64_t column) { return static_cast<char*>(m.data) + (row * m.stride + column) * bytes_of(m.dtype); }

ULY_CLONES void cast(const Matrix& y, const Matrix& x, int64_t begin, int64_t end) {
  for_float_types(y.dtype, x.dtype, "copy", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using U = decltype(u);
    for_row_pieces(y.columns, begin, end, [&](int64_t row, int64_t first, int64_t count) ULY_INLINE_LAMBDA {
      T* to = row_of<T>(y, row) + first;
      const U* from = row_of<U>(x, row) + first;
      ULY_LANES
      for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(to_float(from[j]));
    });
  });
}

ULY_CLONES void add_pieces(const Matrix& y, const Matrix& x, int64_t begin, int64_t end) {
  for_float_types(y.dtype, x.dtype, "add", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using U = decltype(u);
    for_row_pieces(y.columns, begin, end, [&](int64_t row, int64_t first, int64_t count) ULY_INLINE_LAMBDA {
      T* to = row_of<T>(y, row) + first;
      const U* from = row_of<U>(x, row) + first;
      ULY_LANES
      for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(to_float(to[j]) + to_float(from[j]));
    });
  });
}

}  // namespace

void zero(const Matrix& y, int64_t begin, int64_t end) {
  const Matrix flat = flattened(y);
  for_row_pieces(flat.columns, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    std::memset(bytes_at(flat, row, first), 0, static_cast<size_t>(count * bytes_of(flat.dtype)));
  });
}

void copy(const CopyArgs& a, int64_t begin, int64_t end) {
  const CopyArgs flat = flattened_pair(a.y, a.x);
  if (flat.y.dtype != flat.x.dtype) return cast(flat.y, flat.x, begin, end);
  for_row_pieces(flat.y.columns, begin, end, [&](int64_t row, int64_t first, int64_t count) {
    std::memcpy(bytes_at(flat.y, row, first), bytes_at(flat.x, row, first), static_cast<size_t>(count * bytes_of(flat.y.dtype)));
  });
}

void add(const AddArgs& a, int64_t begin, int64_t end) {
  const CopyArgs flat = flattened_pair(a.y, a.x);
  add_pieces(flat.y, flat.x, begin, end);
}

ULY_CLONES void add_bias(const AddBiasArgs& a, int64_t begin, int64_t end) {
  for_float_types(a.y.dtype, a.b.dtype, "add_bias", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    const W* b = static_cast<const W*>(a.b.data);
    for (int64_t i = begin; i < end; ++i) {
      T* y = row_of<T>(a.y, i);
      ULY_LANES
      for (int64_t j = 0; j < a.y.columns; ++j) y[j] = from_float<T>(to_float(y[j]) + to_float(b[j]));
    }
  });
}

ULY_CLONES void bias_grad(const BiasGradArgs& a, int64_t begin, int64_t end) {
  for_float_type(a.dy.dtype, "bias_grad", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    add_column_sums(static_cast<float*>(a.db.data), a.dy.rows, begin, end, [&](int64_t row, int64_t first, int64_t count, float* part) ULY_INLINE_LAMBDA {
      const T* dy = row_of<T>(a.dy, row) + first;
      for (int64_t j = 0; j < count; ++j) part[j] += to_float(dy[j]);
    });
  });
}

}  // namespace uly::kernels::cpu
