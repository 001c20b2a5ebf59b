// Every CUDA kernel on matrices of more than 2^31 elements (--gtest_filter=*Beyond*); they want 45 GB of device memory.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/exchange.h"
#include "kernels/loss.h"
#include "kernels/merge.h"
#include "kernels/norm.h"
#include "kernels/norm_rope.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"
#include "mirror.h"

namespace uly::kernels {
namespace {

// Rows that are checked of a matrix of more than 2^31 elements: around element 2^31, and the last.
class BeyondInt32Test : public testing::Test {
 protected:
  static constexpr int64_t kRows = 600000, kColumns = 4096, kTable = 97;
  const std::vector<int64_t> rows_ = {0, 262143, 262144, 524287, 524288, 524289, kRows - 1};

  Memory x_{kRows * kColumns * 2}, y_{kRows * kColumns * 2};
  Mirror table_{kTable, kColumns, Dtype::kBf16, 0, 1}, ids_{kRows, 1, Dtype::kI64};
  Matrix x = big(x_, Dtype::kBf16), y = big(y_, Dtype::kBf16);  // row i of x is row i % kTable of the table

  static Matrix big(const Memory& memory, Dtype dtype, int64_t columns = kColumns) {
    return {.data = memory.at(), .dtype = dtype, .rows = kRows, .columns = columns, .stride = columns};
  }
  static Matrix columns_of(Matrix m, int64_t first, int64_t count) {
    m.data = static_cast<char*>(m.data) + first * size_of(m.dtype);
    m.columns = count;
    return m;
  }
  void SetUp() override {
    size_t available = 0, all = 0;
    must(cudaMemGetInfo(&available, &all));
    if (x.data == nullptr || y.data == nullptr || available < (size_t{32} << 30)) GTEST_SKIP() << "needs 45 GB of device memory";
    for (int64_t i = 0; i < kRows; ++i) ids_.set(i, static_cast<double>(i % kTable));
    ids_.upload();
    embed({.h = x, .table = table_.d(), .ids = ids_.d()}, nullptr);
  }
  // How many rows of x are row r of the table.
  static double times(int64_t r) { return static_cast<double>(kRows / kTable + (r < kRows % kTable ? 1 : 0)); }
  std::vector<Bf16> table_row(int64_t i) const {
    const Bf16* row = static_cast<const Bf16*>(table_.h().data) + i % kTable * kColumns;
    return {row, row + kColumns};
  }
  template <typename T>
  static std::vector<T> row_on_host(const Matrix& m, int64_t i) {
    std::vector<T> row(static_cast<size_t>(m.columns));
    must(cudaMemcpy(row.data(), static_cast<const T*>(m.data) + i * m.stride, row.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return row;
  }
  template <typename T>
  static void expect_row(const Matrix& m, int64_t i, const std::vector<T>& want, double tolerance, double size = 1) {
    const std::vector<T> got = row_on_host<T>(m, i);
    for (size_t j = 0; j < got.size(); ++j) {
      const double expected = static_cast<double>(to_float(want[j]));
      ASSERT_NEAR(static_cast<double>(to_float(got[j])), expected, tolerance * (size + std::abs(expected))) << "row " << i << " column " << j;
    }
  }
  // Compares rows with f(row, the bf16 values that the table gives it), which changes them in place.
  template <typename F>
  void expect_rows(const Matrix& got, double tolerance, F&& f) {
    must(cudaDeviceSynchronize());
    for (const int64_t i : rows_) {
      std::vector<Bf16> want = table_row(i);
      f(i, want);
      expect_row(got, i, want, tolerance);
    }
  }
  void expect_unchanged(const Matrix& got) {
    expect_rows(got, 0, [](int64_t, std::vector<Bf16>&) {});
  }
};

template <typename T>
Matrix one_row(std::vector<T>& v) {
  const int64_t n = static_cast<int64_t>(v.size());
  return {.data = v.data(), .dtype = sizeof(T) == 2 ? Dtype::kBf16 : Dtype::kF32, .rows = 1, .columns = n, .stride = n};
}

TEST_F(BeyondInt32Test, EmbedCopyAddAndZero) {
  expect_unchanged(x);
  copy({y, x}, nullptr);
  expect_unchanged(y);
  add({y, x}, nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>& v) {
    std::vector<Bf16> twin = v;
    cpu::add({one_row(v), one_row(twin)}, 0, kColumns);
  });
  zero(y, nullptr);
  for (const int64_t i : rows_) expect_row(y, i, std::vector<Bf16>(kColumns), 0);
  const Memory wide_memory(kRows * kColumns * 4);
  const Matrix wide = big(wide_memory, Dtype::kF32);
  copy({wide, x}, nullptr), copy({y, wide}, nullptr);
  expect_unchanged(y);
}

TEST_F(BeyondInt32Test, StridedCopyAndZero) {
  copy({columns_of(y, 0, 2048), columns_of(x, 2048, 2048)}, nullptr), copy({columns_of(y, 2048, 2048), columns_of(x, 0, 2048)}, nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>& v) { std::rotate(v.begin(), v.begin() + 2048, v.end()); });
  zero(columns_of(y, 1000, 3000), nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>& v) {
    std::rotate(v.begin(), v.begin() + 2048, v.end());
    std::fill(v.begin() + 1000, v.begin() + 4000, Bf16{});
  });
}

TEST_F(BeyondInt32Test, AddBiasAndBiasGrad) {
  Mirror b(1, kColumns, Dtype::kBf16, 0, 2), db(1, kColumns, Dtype::kF32);
  copy({y, x}, nullptr), add_bias({y, b.d()}, nullptr);
  expect_rows(y, 0, [&](int64_t, std::vector<Bf16>& v) { cpu::add_bias({one_row(v), b.h()}, 0, 1); });
  const Memory scratch(column_sum_scratch_bytes(kRows, kColumns));
  bias_grad({.db = db.d(), .dy = x, .scratch = scratch.at()}, nullptr);
  for (int64_t r = 0; r < kTable; ++r) {
    const std::vector<Bf16> row = table_row(r);
    for (int64_t j = 0; j < kColumns; ++j)
      static_cast<float*>(db.h().data)[j] += static_cast<float>(times(r) * static_cast<double>(to_float(row[static_cast<size_t>(j)])));
  }
  db.expect_close(1e-5, 6000);
}

TEST_F(BeyondInt32Test, RmsNormAndItsGradient) {
  Mirror w(1, kColumns, Dtype::kBf16, 0, 2), dw(1, kColumns, Dtype::kF32);
  const Memory rstd_memory(kRows * 4), dx_memory(kRows * kColumns * 2), scratch(column_sum_scratch_bytes(kRows, kColumns));
  const Matrix rstd = big(rstd_memory, Dtype::kF32, 1), dx = big(dx_memory, Dtype::kBf16);
  float value = 0;
  const Matrix host_rstd{.data = &value, .rows = 1, .columns = 1, .stride = 1};
  rms_norm({.y = y, .rstd = rstd, .x = x, .w = w.d()}, nullptr);
  expect_rows(y, 8e-3, [&](int64_t, std::vector<Bf16>& v) { cpu::rms_norm({.y = one_row(v), .rstd = host_rstd, .x = one_row(v), .w = w.h()}, 0, 1); });
  zero(dx, nullptr);
  rms_norm_grad({.dx = dx, .dw = dw.d(), .dy = y, .x = x, .rstd = rstd, .w = w.d(), .scratch = scratch.at()}, nullptr);
  const auto gradient = [&](const std::vector<Bf16>& row, std::vector<Bf16>& dx_row, std::vector<float>& dw_row) {
    std::vector<Bf16> x_row = row, y_row = row;
    dx_row.assign(kColumns, Bf16{}), dw_row.assign(kColumns, 0);
    cpu::rms_norm({.y = one_row(y_row), .rstd = host_rstd, .x = one_row(x_row), .w = w.h()}, 0, 1);
    const RmsNormGradArgs a{.dx = one_row(dx_row), .dw = one_row(dw_row), .dy = one_row(y_row), .x = one_row(x_row), .rstd = host_rstd, .w = w.h()};
    cpu::rms_norm_grad_dx(a, 0, 1), cpu::rms_norm_grad_dw(a, 0, kColumns);
  };
  std::vector<Bf16> dx_row;
  std::vector<float> dw_row;
  expect_rows(dx, 2e-2, [&](int64_t, std::vector<Bf16>& v) {
    gradient(v, dx_row, dw_row);
    v = dx_row;
  });
  for (int64_t r = 0; r < kTable; ++r) {
    gradient(table_row(r), dx_row, dw_row);
    for (int64_t j = 0; j < kColumns; ++j) static_cast<float*>(dw.h().data)[j] += static_cast<float>(times(r)) * dw_row[static_cast<size_t>(j)];
  }
  dw.expect_close(3e-3, 6000);  // a rounding of y to bf16 that differs is there thousands of times
}

TEST_F(BeyondInt32Test, NormRopeAndItsGradient) {
  constexpr int64_t H = 128, n = kColumns / H;
  Mirror w(1, H, Dtype::kBf16, 0, 2), dw(1, H, Dtype::kF32), angles(1, H, Dtype::kF32, 0, 3);
  const Memory rstd_memory(kRows * n * 4), raw_memory(kRows * kColumns * 2), scratch(column_sum_scratch_bytes(kRows * n, H));
  const Matrix rstd = big(rstd_memory, Dtype::kF32, n), raw = big(raw_memory, Dtype::kBf16);
  Matrix table = angles.d();
  table.rows = kRows, table.stride = 0;  // the same angles for all
  std::vector<float> host_rstd(n);
  norm_rope({.y = y, .raw = raw, .rstd = rstd, .x = x, .w = w.d(), .table = table, .head_size = H}, nullptr);
  expect_unchanged(raw);
  const auto forward = [&](std::vector<Bf16>& v) {
    cpu::norm_rope({.y = one_row(v), .rstd = one_row(host_rstd), .x = one_row(v), .w = w.h(), .table = angles.h(), .head_size = H}, 0, 1);
  };
  expect_rows(y, 8e-3, [&](int64_t, std::vector<Bf16>& v) { forward(v); });
  copy({y, x}, nullptr);  // dy = x
  norm_rope_grad({.dx = y, .dw = dw.d(), .x = raw, .rstd = rstd, .w = w.d(), .table = table, .head_size = H, .scratch = scratch.at()}, nullptr);
  const auto gradient = [&](std::vector<Bf16>& v, Matrix dw_row) {
    std::vector<Bf16> x_row = v, unused = v;
    forward(unused);
    const NormRopeGradArgs a{.dx = one_row(v), .dw = dw_row, .x = one_row(x_row), .rstd = one_row(host_rstd), .w = w.h(), .table = angles.h(), .head_size = H};
    cpu::norm_rope_grad_dw(a, 0, H), cpu::norm_rope_grad_dx(a, 0, 1);
  };
  std::vector<float> dw_row(H);
  expect_rows(y, 1e-2, [&](int64_t, std::vector<Bf16>& v) { gradient(v, one_row(dw_row)); });
  for (int64_t r = 0; r < kTable; ++r) {
    std::vector<Bf16> row = table_row(r);
    dw_row.assign(H, 0);
    gradient(row, one_row(dw_row));
    for (int64_t j = 0; j < H; ++j) static_cast<float*>(dw.h().data)[j] += static_cast<float>(times(r)) * dw_row[static_cast<size_t>(j)];
  }
  dw.expect_close(1e-4, 100000);
}

TEST_F(BeyondInt32Test, RopeAndItsTable) {
  copy({y, x}, nullptr);
  Mirror one(1, 128, Dtype::kF32, 0, 3), inv_freq(1, kColumns / 2, Dtype::kF32), positions(kRows, 1, Dtype::kI64);
  Matrix angles = one.d();
  angles.rows = kRows, angles.stride = 0;  // the same for all
  rope({.x = y, .table = angles}, nullptr);
  expect_rows(y, 8e-3, [&](int64_t, std::vector<Bf16>& v) { cpu::rope({.x = one_row(v), .table = one.h()}, 0, 1); });
  const Memory table_memory(kRows * kColumns * 4);
  const Matrix table = big(table_memory, Dtype::kF32);
  for (int64_t j = 0; j < kColumns / 2; ++j) inv_freq.set(j, std::pow(500000.0, -static_cast<double>(j) / (kColumns / 2)));
  for (int64_t i = 0; i < kRows; ++i) positions.set(i, static_cast<double>(i));
  inv_freq.upload(), positions.upload();
  rope_table({.table = table, .positions = positions.d(), .inv_freq = static_cast<float*>(inv_freq.d().data)}, nullptr);
  for (const int64_t i : rows_) {
    std::vector<float> want(kColumns);
    int64_t position = i;
    cpu::rope_table({.table = one_row(want),
                     .positions = {.data = &position, .dtype = Dtype::kI64, .rows = 1, .columns = 1, .stride = 1},
                     .inv_freq = static_cast<float*>(inv_freq.h().data)},
                    0, 1);
    expect_row(table, i, want, 1e-6);
  }
}

TEST_F(BeyondInt32Test, SwigluAndItsGradient) {
  constexpr int64_t F = kColumns / 2;
  const Matrix a = columns_of(y, 0, F), da = columns_of(y, F, F);
  copy({y, x}, nullptr);
  const auto forward = [](std::vector<Bf16>& v) {
    std::vector<Bf16> out(F);
    cpu::swiglu({.a = one_row(out), .gate_up = one_row(v)}, 0, 1);
    return out;
  };
  swiglu({.a = a, .gate_up = x}, nullptr);
  const auto check_a = [&] { expect_rows(a, 8e-3, [&](int64_t, std::vector<Bf16>& v) { v = forward(v); }); };
  check_a();
  zero(a, nullptr);
  swiglu_grad({.gate_up = x, .a = a, .da = da}, nullptr);
  check_a();
  expect_rows(x, 8e-3, [&](int64_t, std::vector<Bf16>& v) {
    std::vector<Bf16> out(F), gradient(v.begin() + F, v.end());
    cpu::swiglu_grad({.gate_up = one_row(v), .a = one_row(out), .da = one_row(gradient)}, 0, 1);
  });
}

TEST_F(BeyondInt32Test, CrossEntropy) {
  constexpr int64_t t = 20000, V = 128256, kDifferent = 7;
  const Memory memory(t * V * 2);
  Mirror rows(kDifferent, V, Dtype::kBf16, 0, 4), ids(t, 1, Dtype::kI64), labels(t, 1, Dtype::kI64), loss(t, 1, Dtype::kF32);
  for (int64_t i = 0; i < t; ++i) ids.set(i, static_cast<double>(i % kDifferent)), labels.set(i, static_cast<double>(i * 31 % V));
  ids.upload(), labels.upload();
  const Matrix logits{.data = memory.at(), .dtype = Dtype::kBf16, .rows = t, .columns = V, .stride = V};
  embed({.h = logits, .table = rows.d(), .ids = ids.d()}, nullptr);
  cross_entropy({.logits = logits, .loss = loss.d(), .labels = labels.d()}, nullptr);
  const std::vector<char> losses = loss.download();
  for (const int64_t i : {int64_t{0}, int64_t{16743}, int64_t{16744}, t - 1}) {
    const Bf16* from = static_cast<const Bf16*>(rows.h().data) + i % kDifferent * V;
    std::vector<Bf16> want(from, from + V);
    int64_t label = i * 31 % V;
    float value = 0;
    cpu::cross_entropy({.logits = one_row(want),
                        .loss = {.data = &value, .rows = 1, .columns = 1, .stride = 1},
                        .labels = {.data = &label, .dtype = Dtype::kI64, .rows = 1, .columns = 1, .stride = 1}},
                       0, 1);
    expect_row(logits, i, want, 8e-3, 1e-7);
    EXPECT_NEAR(reinterpret_cast<const float*>(losses.data())[i], value, 1e-4) << i;
  }
}

TEST_F(BeyondInt32Test, EmbedGradOfManyTokensAndOfALargeTable) {
  Mirror dtable(kTable, kColumns, Dtype::kF32);
  embed_grad({.dtable = dtable.d(), .dh = x, .ids = ids_.d(), .skip_id = 3}, nullptr);
  const std::vector<char> got = dtable.download();
  for (const int64_t r : {int64_t{0}, int64_t{3}, kTable - 1}) {
    const std::vector<Bf16> row = table_row(r);
    for (int64_t j = 0; j < kColumns; ++j) {
      float sum = 0;
      for (int64_t k = 0; r != 3 && k < static_cast<int64_t>(times(r)); ++k) sum += to_float(row[static_cast<size_t>(j)]);
      ASSERT_EQ(reinterpret_cast<const float*>(got.data())[r * kColumns + j], sum) << r << " " << j;
    }
  }
  const Memory large_memory(kRows * kColumns * 4);
  const Matrix large = big(large_memory, Dtype::kF32);
  zero(large, nullptr);
  Mirror ids(static_cast<int64_t>(rows_.size()), 1, Dtype::kI64);
  for (size_t k = 0; k < rows_.size(); ++k) ids.set(static_cast<int64_t>(k), static_cast<double>(rows_[k]));
  ids.upload();
  Matrix dh = table_.d();
  dh.rows = ids.h().rows;
  embed_grad({.dtable = large, .dh = dh, .ids = ids.d()}, nullptr);
  for (size_t k = 0; k < rows_.size(); ++k) {
    std::vector<Bf16> row = table_row(static_cast<int64_t>(k));
    std::vector<float> want(kColumns);
    cpu::copy({one_row(want), one_row(row)}, 0, kColumns);
    expect_row(large, rows_[k], want, 0);
  }
}

TEST_F(BeyondInt32Test, PackAndUnpack) {
  const std::vector<PackedColumns> ranges = {{2048, 2048, 0, 2048}, {0, 2048, kRows * 2048, 2048}};
  pack_columns({.x = x, .packed = y.data, .ranges = ranges.data(), .num_ranges = 2}, nullptr);
  zero(x, nullptr);
  unpack_columns({.x = x, .packed = y.data, .ranges = ranges.data(), .num_ranges = 2}, nullptr);
  expect_unchanged(x);
}

TEST_F(BeyondInt32Test, SumPieces) {
  const Memory shard_memory(kRows * kColumns * 4), received_memory(kRows * kColumns * 4);
  const Matrix shard = big(shard_memory, Dtype::kF32);
  const Matrix received{.data = received_memory.at(), .dtype = Dtype::kBf16, .rows = 2 * kRows, .columns = kColumns, .stride = kColumns};
  Matrix half = received;
  half.rows = kRows;
  copy({half, x}, nullptr);
  half.data = static_cast<Bf16*>(half.data) + kRows * kColumns;
  copy({half, x}, nullptr);
  zero(shard, nullptr);
  sum_pieces({.shard = shard, .received = received, .pieces = 2}, nullptr);
  copy({y, shard}, nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>& v) {
    std::vector<Bf16> twin = v;
    cpu::add({one_row(v), one_row(twin)}, 0, kColumns);
  });
}

TEST_F(BeyondInt32Test, Merge) {
  constexpr int64_t H = 128, n = kColumns / H;
  Mirror a_lse(1, n, Dtype::kF32, 0, 2), b_lse(1, n, Dtype::kF32, 0, 3), others(kRows, 1, Dtype::kI64);
  const auto other = [](int64_t i) { return (i * 5 + 1) % kTable; };
  for (int64_t i = 0; i < kRows; ++i) others.set(i, static_cast<double>(other(i)));
  others.upload();
  embed({.h = y, .table = table_.d(), .ids = others.d()}, nullptr);
  const Memory lse_memory(kRows * n * 4);
  const auto for_all = [](Matrix m) {
    m.rows = kRows, m.stride = 0;
    return m;
  };
  merge({.y = y, .lse = big(lse_memory, Dtype::kF32, n), .a = x, .a_lse = for_all(a_lse.d()), .b = y, .b_lse = for_all(b_lse.d()), .head_size = H}, nullptr);
  expect_rows(y, 8e-3, [&](int64_t i, std::vector<Bf16>& v) {
    std::vector<Bf16> b = table_row(other(i));
    std::vector<float> lse(n);
    cpu::merge({.y = one_row(v), .lse = one_row(lse), .a = one_row(v), .a_lse = a_lse.h(), .b = one_row(b), .b_lse = b_lse.h(), .head_size = H}, 0, 1);
    expect_row(big(lse_memory, Dtype::kF32, n), i, lse, 1e-6);
  });
}

TEST_F(BeyondInt32Test, SquaredNormAndAdamw) {
  const int64_t n = kRows * kColumns;
  Mirror total(1, 1, Dtype::kF64);
  const Memory scratch(kNormScratchBytes), m_memory(n * 4), v_memory(n * 4), gradient_memory(n * 4);
  const Matrix m = big(m_memory, Dtype::kF32), v = big(v_memory, Dtype::kF32), gradient = big(gradient_memory, Dtype::kF32);
  copy({gradient, x}, nullptr), zero(m, nullptr), zero(v, nullptr), zero(y, nullptr);
  double expected = 0, got = 0;
  for (int64_t r = 0; r < kTable; ++r)
    for (const Bf16 value : table_row(r)) expected += times(r) * static_cast<double>(to_float(value)) * static_cast<double>(to_float(value));
  squared_norm({.total = static_cast<double*>(total.d().data), .x = gradient, .scratch = scratch.at()}, nullptr);
  std::memcpy(&got, total.download().data(), 8);
  EXPECT_NEAR(got, expected, 1e-6 * expected);
  squared_norm({.total = static_cast<double*>(total.d().data), .x = x, .scratch = scratch.at()}, nullptr);
  std::memcpy(&got, total.download().data(), 8);
  EXPECT_NEAR(got, 2 * expected, 1e-6 * expected);
  // The weight is x, its missing bits are y.
  AdamwArgs a{.weight = x.data, .weight_dtype = Dtype::kBf16, .low = static_cast<int16_t*>(y.data), .count = n, .learning_rate = 1e-3, .weight_decay = 0.1};
  a.m = static_cast<float*>(m.data), a.v = static_cast<float*>(v.data), a.gradient = static_cast<float*>(gradient.data);
  adamw(a, nullptr);
  must(cudaDeviceSynchronize());
  for (const int64_t i : rows_) {
    std::vector<Bf16> weight = table_row(i), low(kColumns);
    std::vector<float> gradient_row(kColumns), m_row(kColumns), v_row(kColumns);
    cpu::copy({one_row(gradient_row), one_row(weight)}, 0, kColumns);
    a.weight = weight.data(), a.low = reinterpret_cast<int16_t*>(low.data()), a.m = m_row.data(), a.v = v_row.data(), a.gradient = gradient_row.data();
    a.count = kColumns;
    cpu::adamw(a, 0, kColumns);
    expect_row(x, i, weight, 0), expect_row(m, i, m_row, 0), expect_row(v, i, v_row, 0), expect_row(gradient, i, gradient_row, 0);
    EXPECT_EQ(std::memcmp(row_on_host<Bf16>(y, i).data(), low.data(), kColumns * 2), 0) << i;
  }
}

}  // namespace
}  // namespace uly::kernels
