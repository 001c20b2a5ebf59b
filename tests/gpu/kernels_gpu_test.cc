// Every CUDA kernel against its CPU version on random data: ragged shapes, strides and unaligned addresses, both dtypes;
// AdamW to the bit; and matrices of more than 2^31 elements. Without a GPU nothing is run and the exit is 0.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/access.h"
#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/exchange.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace uly::kernels {
namespace {

int64_t size_of(Dtype dtype) { return dtype == Dtype::kBf16 ? 2 : dtype == Dtype::kF32 ? 4 : 8; }

void must(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// Device memory.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    if (cudaMalloc(&data_, static_cast<size_t>(bytes + 64)) != cudaSuccess) data_ = nullptr;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  char* at(int64_t byte = 0) const { return static_cast<char*>(data_) + byte; }

 private:
  void* data_ = nullptr;
};

// The same matrix on the host, h(), and on the device, d(), from which `shift` elements are missing at the start.
class Mirror {
 public:
  Mirror(int64_t rows, int64_t columns, Dtype dtype, int64_t gap = 0, unsigned seed = 0, double scale = 1, int64_t shift = 0)
      : host_(static_cast<size_t>((rows * (columns + gap) + shift) * size_of(dtype))), device_(std::make_unique<Memory>(static_cast<int64_t>(host_.size()))) {
    const int64_t offset = shift * size_of(dtype);
    h_ = {.data = host_.data() + offset, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns + gap};
    d_ = h_;
    d_.data = device_->at(offset);
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal(0, scale);
    if (seed != 0)
      for (int64_t i = 0; i < rows * (columns + gap); ++i) set(i, normal(engine));
    upload();
  }
  Matrix h() const { return h_; }
  Matrix d() const { return d_; }
  void set(int64_t element, double x) {
    if (h_.dtype == Dtype::kI64)
      static_cast<int64_t*>(h_.data)[element] = static_cast<int64_t>(x);
    else if (h_.dtype == Dtype::kBf16)
      static_cast<Bf16*>(h_.data)[element] = to_bf16(static_cast<float>(x));
    else
      static_cast<float*>(h_.data)[element] = static_cast<float>(x);
  }
  void upload() { must(cudaMemcpy(device_->at(), host_.data(), host_.size(), cudaMemcpyHostToDevice)); }
  std::vector<char> download() const {
    std::vector<char> bytes(host_.size());
    must(cudaMemcpy(bytes.data(), device_->at(), bytes.size(), cudaMemcpyDeviceToHost));
    return bytes;
  }
  void expect_equal() const { EXPECT_EQ(std::memcmp(download().data(), host_.data(), host_.size()), 0); }
  // All bytes between rows equal, elements within the dtype's rounding or `tolerance` of (value + size).
  void expect_close(double tolerance = 5e-6, double size = 1) const {
    const std::vector<char> bytes = download();
    const char* got = bytes.data() + (static_cast<const char*>(h_.data) - host_.data());
    const auto value = [&](const void* p, int64_t i) {
      return static_cast<double>(h_.dtype == Dtype::kBf16 ? to_float(static_cast<const Bf16*>(p)[i]) : static_cast<const float*>(p)[i]);
    };
    if (h_.dtype == Dtype::kBf16) tolerance = 8e-3;
    for (int64_t i = 0; i < h_.rows * h_.stride; ++i) {
      const double want = value(h_.data, i);
      ASSERT_NEAR(value(got, i), want, i % h_.stride < h_.columns ? tolerance * (std::abs(want) + size) : 0)
          << "row " << i / h_.stride << " column " << i % h_.stride;
    }
  }

 private:
  std::vector<char> host_;
  std::unique_ptr<Memory> device_;
  Matrix h_, d_;
};

struct Case {
  int64_t rows, columns, gap, shift;
  Dtype activation, weight;
};

class KernelsGpuTest : public testing::TestWithParam<Case> {
 protected:
  Case c = GetParam();
  Mirror random(int64_t rows, int64_t columns, unsigned seed, double scale = 1) const {
    return Mirror(rows, columns, c.activation, c.gap, seed, scale, c.shift);
  }
  Mirror weight(unsigned seed) const { return Mirror(1, c.columns, c.weight, 0, seed); }
  Mirror fp32(int64_t rows, int64_t columns, unsigned seed) const { return Mirror(rows, columns, Dtype::kF32, 0, seed); }
};

INSTANTIATE_TEST_SUITE_P(Shapes, KernelsGpuTest,
                         testing::Values(Case{1, 1, 0, 0, Dtype::kF32, Dtype::kF32}, Case{1, 64, 0, 0, Dtype::kBf16, Dtype::kBf16},
                                         Case{37, 128, 8, 0, Dtype::kBf16, Dtype::kF32}, Case{1000, 128, 0, 0, Dtype::kF32, Dtype::kBf16},
                                         Case{131, 70, 5, 0, Dtype::kF32, Dtype::kF32}, Case{67, 611, 1, 0, Dtype::kBf16, Dtype::kF32},
                                         Case{9, 1024, 0, 1, Dtype::kBf16, Dtype::kBf16}, Case{700, 512, 64, 0, Dtype::kBf16, Dtype::kBf16}));

TEST_P(KernelsGpuTest, RmsNorm) {
  Mirror x = random(c.rows, c.columns, 1), w = weight(2), y = random(c.rows, c.columns, 3), rstd = fp32(c.rows, 1, 4);
  cpu::rms_norm({.y = y.h(), .rstd = rstd.h(), .x = x.h(), .w = w.h()}, 0, c.rows);
  rms_norm({.y = y.d(), .rstd = rstd.d(), .x = x.d(), .w = w.d()}, nullptr);
  y.expect_close(), rstd.expect_close();
}

TEST_P(KernelsGpuTest, RmsNormGrad) {
  Mirror x = random(c.rows, c.columns, 1), w = weight(2), dy = random(c.rows, c.columns, 3), dx = random(c.rows, c.columns, 4), dw = fp32(1, c.columns, 5),
         rstd = fp32(c.rows, 1, 6);
  const Memory scratch(column_sum_scratch_bytes(c.rows, c.columns));
  const RmsNormGradArgs a{.dx = dx.h(), .dw = dw.h(), .dy = dy.h(), .x = x.h(), .rstd = rstd.h(), .w = w.h()};
  cpu::rms_norm_grad_dx(a, 0, c.rows);
  cpu::rms_norm_grad_dw(a, 0, c.columns);
  rms_norm_grad({.dx = dx.d(), .dw = dw.d(), .dy = dy.d(), .x = x.d(), .rstd = rstd.d(), .w = w.d(), .scratch = scratch.at()}, nullptr);
  dx.expect_close(2e-5, 4), dw.expect_close(1e-5, 10);
}

TEST_P(KernelsGpuTest, HeadNormAndItsGradient) {
  const int64_t H = c.columns, n = 3;
  Mirror x = random(c.rows, n * H, 1), w = weight(2), y = random(c.rows, n * H, 3), rstd = fp32(c.rows, n, 4), dx = random(c.rows, n * H, 5),
         dw = fp32(1, H, 6);
  cpu::head_norm({.y = y.h(), .rstd = rstd.h(), .x = x.h(), .w = w.h(), .head_size = H}, 0, c.rows);
  head_norm({.y = y.d(), .rstd = rstd.d(), .x = x.d(), .w = w.d(), .head_size = H}, nullptr);
  y.expect_close(), rstd.expect_close();
  const Memory scratch(column_sum_scratch_bytes(c.rows * n, H));
  const HeadNormGradArgs a{.dx = dx.h(), .dw = dw.h(), .x = x.h(), .rstd = rstd.h(), .w = w.h(), .head_size = H};
  cpu::head_norm_grad_dw(a, 0, H);
  cpu::head_norm_grad_dx(a, 0, c.rows);
  head_norm_grad({.dx = dx.d(), .dw = dw.d(), .x = x.d(), .rstd = rstd.d(), .w = w.d(), .head_size = H, .scratch = scratch.at()}, nullptr);
  dx.expect_close(2e-5, 2), dw.expect_close(1e-5, 20);
}

TEST_P(KernelsGpuTest, RopeTableAndRope) {
  const int64_t H = 2 * c.columns;
  Mirror x = random(c.rows, 3 * H, 1), table(c.rows, H, Dtype::kF32), positions(c.rows, 1, Dtype::kI64), inv_freq(1, c.columns, Dtype::kF32);
  for (int64_t i = 0; i < c.rows; ++i) positions.set(i, static_cast<double>(i * 9973));
  for (int64_t j = 0; j < c.columns; ++j) inv_freq.set(j, std::pow(500000.0, -static_cast<double>(j) / static_cast<double>(c.columns)));
  positions.upload(), inv_freq.upload();
  cpu::rope_table({.table = table.h(), .positions = positions.h(), .inv_freq = static_cast<float*>(inv_freq.h().data), .scaling = 1.25f}, 0, c.rows);
  rope_table({.table = table.d(), .positions = positions.d(), .inv_freq = static_cast<float*>(inv_freq.d().data), .scaling = 1.25f}, nullptr);
  table.expect_close(1e-6);
  for (const int direction : {1, -1}) {
    cpu::rope({.x = x.h(), .table = table.h(), .direction = direction}, 0, c.rows);
    rope({.x = x.d(), .table = table.d(), .direction = direction}, nullptr);
    x.expect_close(1e-5, 4);
    x.upload();
  }
}

TEST_P(KernelsGpuTest, SwigluAndItsGradient) {
  const int64_t F = c.columns;
  Mirror gate_up = random(c.rows, 2 * F, 1, 4), da = random(c.rows, F, 2), a = random(c.rows, F, 3);
  gate_up.set(0, 100);
  if (F > 8) gate_up.set(3, -120), gate_up.set(4, -85);
  gate_up.upload();
  cpu::swiglu({.a = a.h(), .gate_up = gate_up.h()}, 0, c.rows);
  swiglu({.a = a.d(), .gate_up = gate_up.d()}, nullptr);
  a.expect_close();
  const std::vector<char> forward = a.download();
  cpu::swiglu_grad({.gate_up = gate_up.h(), .a = a.h(), .da = da.h()}, 0, c.rows);
  swiglu_grad({.gate_up = gate_up.d(), .a = a.d(), .da = da.d()}, nullptr);
  gate_up.expect_close(), a.expect_close();
  EXPECT_EQ(a.download(), forward) << "the rebuilt a";
}

TEST_P(KernelsGpuTest, CrossEntropyAndSumLoss) {
  const int64_t V = c.columns * 5;
  Mirror logits = random(c.rows, V, 1, 4), loss = fp32(c.rows, 1, 2), labels(c.rows, 1, Dtype::kI64), total(1, 1, Dtype::kF64);
  for (int64_t i = 0; i < c.rows; ++i) labels.set(i, i % 3 == 1 ? static_cast<double>(kIgnoredLabel) : static_cast<double>(i * 31 % V));
  labels.upload();
  cpu::cross_entropy({.logits = logits.h(), .loss = loss.h(), .labels = labels.h(), .scale = 0.25f}, 0, c.rows);
  cross_entropy({.logits = logits.d(), .loss = loss.d(), .labels = labels.d(), .scale = 0.25f}, nullptr);
  logits.expect_close(4e-6, 0.01), loss.expect_close();
  loss.upload();
  cpu::sum_loss({.total = static_cast<double*>(total.h().data), .loss = loss.h(), .scale = 0.5});
  sum_loss({.total = static_cast<double*>(total.d().data), .loss = loss.d(), .scale = 0.5}, nullptr);
  double got = 0;
  std::memcpy(&got, total.download().data(), 8);
  EXPECT_NEAR(got, *static_cast<double*>(total.h().data), 1e-12 * std::abs(got));
}

TEST_P(KernelsGpuTest, EmbedAndItsGradientToTheBit) {
  const int64_t V = 700;
  Mirror table(V, c.columns, c.weight, c.gap, 1), h = random(c.rows, c.columns, 2), dtable(V, c.columns, Dtype::kF32, c.gap, 3), ids(c.rows, 1, Dtype::kI64);
  for (int64_t i = 0; i < c.rows; ++i) ids.set(i, static_cast<double>(i % 4 == 0 ? 5 : i * i % V));
  ids.upload();
  cpu::embed({.h = h.h(), .table = table.h(), .ids = ids.h()}, 0, c.rows);
  embed({.h = h.d(), .table = table.d(), .ids = ids.d()}, nullptr);
  h.expect_equal();
  cpu::embed_grad({.dtable = dtable.h(), .dh = h.h(), .ids = ids.h()}, 0, c.columns);
  embed_grad({.dtable = dtable.d(), .dh = h.d(), .ids = ids.d()}, nullptr);
  dtable.expect_equal();
}

TEST_P(KernelsGpuTest, ZeroCopyAddAndBiasToTheBit) {
  for (const Dtype other : {Dtype::kF32, Dtype::kBf16}) {
    Mirror y = random(c.rows, c.columns, 1), x(c.rows, c.columns, other, c.gap, 2), b(1, c.columns, other, 0, 3);
    const int64_t n = c.rows * c.columns;
    cpu::add({y.h(), x.h()}, 0, n), add({y.d(), x.d()}, nullptr);
    y.expect_equal();
    cpu::add_bias({y.h(), b.h()}, 0, c.rows), add_bias({y.d(), b.d()}, nullptr);
    y.expect_equal();
    cpu::copy({y.h(), x.h()}, 0, n), copy({y.d(), x.d()}, nullptr);
    y.expect_equal();
    cpu::zero(y.h(), 0, n), zero(y.d(), nullptr);
    y.expect_equal();
  }
}

TEST_P(KernelsGpuTest, BiasGrad) {
  Mirror dy = random(c.rows, c.columns, 1), db = fp32(1, c.columns, 2);
  const Memory scratch(column_sum_scratch_bytes(c.rows, c.columns));
  cpu::bias_grad({.db = db.h(), .dy = dy.h()}, 0, c.columns);
  bias_grad({.db = db.d(), .dy = dy.d(), .scratch = scratch.at()}, nullptr);
  db.expect_close(2e-6, 30);
}

TEST_P(KernelsGpuTest, PackAndUnpackToTheBit) {
  const int64_t C = c.columns, s = c.rows, ranks = 70;  // more than one launch
  Mirror x = random(s, 3 * C, 1), packed(1, s * 2 * C * ranks, c.activation, 0, 2), back = random(s, 3 * C, 3);
  std::vector<PackedColumns> ranges;
  for (int64_t r = 0; r < ranks; ++r) {
    ranges.push_back({.first = r % 2 * C, .count = C, .at = r * s * 2 * C, .stride = 2 * C});
    ranges.push_back({.first = C + r % 2 * C, .count = C, .at = r * s * 2 * C + C, .stride = 2 * C});
  }
  const auto args = [&](const Matrix& m, const Matrix& p) {
    return PackArgs{.x = m, .packed = p.data, .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())};
  };
  cpu::pack_columns(args(x.h(), packed.h()), 0, s), pack_columns(args(x.d(), packed.d()), nullptr);
  packed.expect_equal();
  cpu::unpack_columns(args(back.h(), packed.h()), 0, s), unpack_columns(args(back.d(), packed.d()), nullptr);
  back.expect_equal();
}

TEST_P(KernelsGpuTest, SumPiecesToTheBit) {
  const int64_t n = c.rows * c.columns;
  Mirror shard = fp32(1, n, 1), received(1, 3 * n, c.activation, 0, 2);
  cpu::sum_pieces({.shard = shard.h(), .received = received.h(), .pieces = 3}, 0, n);
  sum_pieces({.shard = shard.d(), .received = received.d(), .pieces = 3}, nullptr);
  shard.expect_equal();
}

TEST_P(KernelsGpuTest, SquaredNorm) {
  Mirror x(c.rows, c.columns, c.activation, 0, 1, 1, c.shift), total(1, 1, Dtype::kF64);
  std::vector<double> host_scratch(kNormBlocks);
  const Memory scratch(kNormScratchBytes);
  const SquaredNormArgs a{.total = static_cast<double*>(total.h().data), .x = x.h(), .scratch = host_scratch.data()};
  cpu::squared_norm_blocks(a, 0, kNormBlocks), cpu::squared_norm_total(a);
  squared_norm({.total = static_cast<double*>(total.d().data), .x = x.d(), .scratch = scratch.at()}, nullptr);
  double got = 0;
  std::memcpy(&got, total.download().data(), 8);
  EXPECT_NEAR(got, *a.total, 1e-6 * *a.total);
}

TEST_P(KernelsGpuTest, AdamwToTheBit) {
  const int64_t n = c.rows * c.columns * 7;
  Mirror master = fp32(1, n, 1), m = fp32(1, n, 2), v(1, n, Dtype::kF32), gradient = fp32(1, n, 3), norm(1, 1, Dtype::kF64),
         weight(1, n, c.weight, 0, 4, 1, c.shift);
  *static_cast<double*>(norm.h().data) = 7.3;
  norm.upload();
  const auto args = [&](auto side) {
    AdamwArgs a{.weight = side(weight).data,
                .weight_dtype = c.weight,
                .count = n,
                .squared_norm = static_cast<double*>(side(norm).data),
                .clip = 1.5,
                .learning_rate = 1e-3,
                .weight_decay = 0.1};
    a.master = static_cast<float*>(side(master).data), a.m = static_cast<float*>(side(m).data), a.v = static_cast<float*>(side(v).data);
    a.gradient = static_cast<float*>(side(gradient).data);
    return a;
  };
  const auto host = [](const Mirror& x) { return x.h(); };
  const auto device = [](const Mirror& x) { return x.d(); };
  for (int64_t step = 1; step <= 3; ++step) {
    for (int64_t i = 0; i < n; ++i) gradient.set(i, std::sin(static_cast<double>(i * step)) * std::pow(10.0, static_cast<double>(i % 40 - 30)));
    gradient.upload();
    AdamwArgs on_host = args(host), on_device = args(device);
    on_host.step = on_device.step = step;
    if (step == 3) {  // the weight is the master
      on_host.weight = on_host.master, on_device.weight = on_device.master;
      on_host.weight_dtype = on_device.weight_dtype = Dtype::kF32;
    }
    cpu::adamw(on_host, 0, n), adamw(on_device, nullptr);
    master.expect_equal(), m.expect_equal(), v.expect_equal(), gradient.expect_equal(), weight.expect_equal();
  }
}

// Rows that are checked of a matrix of more than 2^31 elements: around element 2^31, and the last.
class BeyondInt32Test : public testing::Test {
 protected:
  static constexpr int64_t kRows = 600000, kColumns = 4096, kTable = 97;
  const std::vector<int64_t> rows_ = {0, 262143, 262144, 524287, 524288, 524289, kRows - 1};

  Memory x_{kRows * kColumns * 2}, y_{kRows * kColumns * 2};
  Mirror table_{kTable, kColumns, Dtype::kBf16, 0, 1}, ids_{kRows, 1, Dtype::kI64};
  Matrix x{.data = x_.at(), .dtype = Dtype::kBf16, .rows = kRows, .columns = kColumns, .stride = kColumns};
  Matrix y{.data = y_.at(), .dtype = Dtype::kBf16, .rows = kRows, .columns = kColumns, .stride = kColumns};

  void SetUp() override {
    size_t available = 0, all = 0;
    must(cudaMemGetInfo(&available, &all));
    if (x.data == nullptr || y.data == nullptr || available < (size_t{12} << 30)) GTEST_SKIP() << "needs 22 GB of device memory";
    for (int64_t i = 0; i < kRows; ++i) ids_.set(i, static_cast<double>(i % kTable));
    ids_.upload();
    embed({.h = x, .table = table_.d(), .ids = ids_.d()}, nullptr);
  }
  // Compares rows with f(row, the bf16 values that the table gives it), which changes them in place.
  template <typename F>
  void expect_rows(const Matrix& got, double tolerance, F&& f) {
    must(cudaDeviceSynchronize());
    std::vector<Bf16> row(static_cast<size_t>(got.columns)), want(kColumns);
    for (const int64_t i : rows_) {
      must(cudaMemcpy(row.data(), static_cast<char*>(got.data) + i * got.stride * 2, row.size() * 2, cudaMemcpyDeviceToHost));
      std::memcpy(want.data(), static_cast<char*>(table_.h().data) + i % kTable * kColumns * 2, want.size() * 2);
      f(i, want);
      for (size_t j = 0; j < row.size(); ++j)
        ASSERT_NEAR(static_cast<double>(to_float(row[j])), static_cast<double>(to_float(want[j])),
                    tolerance * (1 + std::abs(static_cast<double>(to_float(want[j])))))
            << i << " " << j;
    }
  }
};

Matrix one_row(std::vector<Bf16>& v) {
  const int64_t n = static_cast<int64_t>(v.size());
  return {.data = v.data(), .dtype = Dtype::kBf16, .rows = 1, .columns = n, .stride = n};
}

TEST_F(BeyondInt32Test, EmbedCopyAndAdd) {
  expect_rows(x, 0, [](int64_t, std::vector<Bf16>&) {});
  copy({y, x}, nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>&) {});
  add({y, x}, nullptr);
  expect_rows(y, 0, [](int64_t, std::vector<Bf16>& v) {
    std::vector<Bf16> twin = v;
    cpu::add({one_row(v), one_row(twin)}, 0, kColumns);
  });
}

TEST_F(BeyondInt32Test, RmsNormAndHeadNorm) {
  Mirror w(1, kColumns, Dtype::kBf16, 0, 2);
  const Memory rstd(kRows * 32 * 4);
  Matrix r{.data = rstd.at(), .dtype = Dtype::kF32, .rows = kRows, .columns = 1, .stride = 1};
  rms_norm({.y = y, .rstd = r, .x = x, .w = w.d()}, nullptr);
  float value[32];
  const Matrix host_r{.data = value, .dtype = Dtype::kF32, .rows = 1, .columns = 1, .stride = 32};
  expect_rows(y, 8e-3, [&](int64_t, std::vector<Bf16>& v) { cpu::rms_norm({.y = one_row(v), .rstd = host_r, .x = one_row(v), .w = w.h()}, 0, 1); });
  r.columns = r.stride = 32;
  head_norm({.y = y, .rstd = r, .x = x, .w = w.d(), .head_size = 128}, nullptr);
  expect_rows(y, 8e-3,
              [&](int64_t, std::vector<Bf16>& v) { cpu::head_norm({.y = one_row(v), .rstd = host_r, .x = one_row(v), .w = w.h(), .head_size = 128}, 0, 1); });
}

TEST_F(BeyondInt32Test, SwigluRopeAndCrossEntropy) {
  Matrix half = y;
  half.columns = kColumns / 2;
  swiglu({.a = half, .gate_up = x}, nullptr);
  expect_rows(half, 8e-3, [](int64_t, std::vector<Bf16>& v) {
    std::vector<Bf16> a(kColumns / 2);
    cpu::swiglu({.a = one_row(a), .gate_up = one_row(v)}, 0, 1);
    std::copy(a.begin(), a.end(), v.begin());
  });
  copy({y, x}, nullptr);
  Mirror one(1, 128, Dtype::kF32, 0, 3);
  Matrix table = one.d(), host_table = one.h();
  table.rows = kRows, table.stride = 0;  // the same angles for all
  rope({.x = y, .table = table}, nullptr);
  expect_rows(y, 8e-3, [&](int64_t, std::vector<Bf16>& v) { cpu::rope({.x = one_row(v), .table = host_table}, 0, 1); });
  const Memory loss(kRows * 4);
  cross_entropy({.logits = x, .loss = {.data = loss.at(), .dtype = Dtype::kF32, .rows = kRows, .columns = 1, .stride = 1}, .labels = ids_.d()}, nullptr);
  expect_rows(x, 1e-4, [](int64_t i, std::vector<Bf16>& v) {
    int64_t label = i % kTable;
    float value = 0;
    cpu::cross_entropy({.logits = one_row(v),
                        .loss = {.data = &value, .rows = 1, .columns = 1, .stride = 1},
                        .labels = {.data = &label, .dtype = Dtype::kI64, .rows = 1, .columns = 1, .stride = 1}},
                       0, 1);
  });
}

TEST_F(BeyondInt32Test, PackAndUnpack) {
  const std::vector<PackedColumns> ranges = {{2048, 2048, 0, 2048}, {0, 2048, kRows * 2048, 2048}};
  pack_columns({.x = x, .packed = y.data, .ranges = ranges.data(), .num_ranges = 2}, nullptr);
  zero(x, nullptr);
  unpack_columns({.x = x, .packed = y.data, .ranges = ranges.data(), .num_ranges = 2}, nullptr);
  expect_rows(x, 0, [](int64_t, std::vector<Bf16>&) {});
}

}  // namespace
}  // namespace uly::kernels

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("kernels_gpu_test: no GPU, nothing run");
    return 0;
  }
  return RUN_ALL_TESTS();
}
