// Every CUDA kernel against its CPU version on random data: ragged shapes, strides and unaligned addresses, both dtypes;
// AdamW to the bit. Without a GPU nothing is run and the exit is 0.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>
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
  swiglu_grad({.gate_up = gate_up.d(), .a = {}, .da = da.d()}, nullptr);
  const std::vector<char> without = gate_up.download();
  gate_up.upload();
  cpu::swiglu_grad({.gate_up = gate_up.h(), .a = a.h(), .da = da.h()}, 0, c.rows);
  swiglu_grad({.gate_up = gate_up.d(), .a = a.d(), .da = da.d()}, nullptr);
  EXPECT_EQ(gate_up.download(), without) << "a is not wanted";
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
  cpu::embed_grad({.dtable = dtable.h(), .dh = h.h(), .ids = ids.h(), .skip_id = 5}, 0, c.columns);
  embed_grad({.dtable = dtable.d(), .dh = h.d(), .ids = ids.d(), .skip_id = 5}, nullptr);
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

TEST_P(KernelsGpuTest, AdamwWithASplitMasterToTheBitAndNotWhereSomethingIsNotFinite) {
  const int64_t n = c.rows * c.columns * 7;
  Mirror weight(1, n, Dtype::kBf16, 0, 1, 1, c.shift), low(1, n, Dtype::kBf16, 0, 2, 1, c.shift),
      m = fp32(1, n, 3), v(1, n, Dtype::kF32), gradient = fp32(1, n, 4), norm(1, 1, Dtype::kF64), loss(1, 1, Dtype::kF64);
  const auto args = [&](auto side, int64_t step) {
    AdamwArgs a{.weight = side(weight).data,
                .weight_dtype = Dtype::kBf16,
                .low = static_cast<int16_t*>(side(low).data),
                .count = n,
                .squared_norm = static_cast<double*>(side(norm).data),
                .loss = static_cast<double*>(side(loss).data),
                .clip = 1.5,
                .learning_rate = 1e-3,
                .weight_decay = 0.1,
                .step = step};
    a.m = static_cast<float*>(side(m).data), a.v = static_cast<float*>(side(v).data), a.gradient = static_cast<float*>(side(gradient).data);
    return a;
  };
  const auto host = [](const Mirror& x) { return x.h(); };
  const auto device = [](const Mirror& x) { return x.d(); };
  const std::vector<std::pair<double, double>> scalars = {{7.3, 2.0}, {INFINITY, 2.0}, {7.3, NAN}, {-INFINITY, 2.0}, {7.3, INFINITY}, {0.1, 2.0}};
  for (size_t step = 0; step < scalars.size(); ++step) {
    *static_cast<double*>(norm.h().data) = scalars[step].first, *static_cast<double*>(loss.h().data) = scalars[step].second;
    for (int64_t i = 0; i < n; ++i) gradient.set(i, std::sin(static_cast<double>(i * (1 + static_cast<int64_t>(step)))));
    norm.upload(), loss.upload(), gradient.upload();
    cpu::adamw(args(host, static_cast<int64_t>(step) + 1), 0, n), adamw(args(device, static_cast<int64_t>(step) + 1), nullptr);
    weight.expect_equal(), low.expect_equal(), m.expect_equal(), v.expect_equal(), gradient.expect_equal();
  }
}

TEST(KernelsGpuWideTest, RmsNormAndItsGradient) {
  for (const Dtype activation : {Dtype::kBf16, Dtype::kF32})
    for (const int64_t D : {2048, 4096, 5120, 8192, 12288}) {
      SCOPED_TRACE(D);
      const int64_t rows = 540;  // three rows for some blocks, two for others
      Mirror x(rows, D, activation, 0, 1), w(1, D, activation, 0, 2), y(rows, D, activation), dy(rows, D, activation, 0, 3), dx(rows, D, activation, 0, 4),
          dw(1, D, Dtype::kF32, 0, 5), rstd(rows, 1, Dtype::kF32);
      const Memory scratch(column_sum_scratch_bytes(rows, D));
      cpu::rms_norm({.y = y.h(), .rstd = rstd.h(), .x = x.h(), .w = w.h()}, 0, rows);
      rms_norm({.y = y.d(), .rstd = rstd.d(), .x = x.d(), .w = w.d()}, nullptr);
      y.expect_close(), rstd.expect_close();
      rstd.upload();
      const RmsNormGradArgs a{.dx = dx.h(), .dw = dw.h(), .dy = dy.h(), .x = x.h(), .rstd = rstd.h(), .w = w.h()};
      cpu::rms_norm_grad_dx(a, 0, rows);
      cpu::rms_norm_grad_dw(a, 0, D);
      rms_norm_grad({.dx = dx.d(), .dw = dw.d(), .dy = dy.d(), .x = x.d(), .rstd = rstd.d(), .w = w.d(), .scratch = scratch.at()}, nullptr);
      dx.expect_close(2e-5, 4), dw.expect_close(1e-5, 30);
    }
}

class NormRopeGpuTest : public testing::TestWithParam<std::tuple<int64_t, int64_t, Dtype, Dtype>> {};

INSTANTIATE_TEST_SUITE_P(Heads, NormRopeGpuTest,
                         testing::Combine(testing::Values(2, 8, 16, 64, 70, 80, 96, 128, 256), testing::Values(1, 5, 8),
                                          testing::Values(Dtype::kF32, Dtype::kBf16), testing::Values(Dtype::kF32, Dtype::kBf16)));

TEST_P(NormRopeGpuTest, MatchesTheCpuAndRepeats) {
  const auto [H, n, activation, weight] = GetParam();
  for (const int64_t rows : {1, 37, 6000})
    for (const int64_t shift : {0, 1}) {
      if (rows == 6000 && n == 8 && H > 128) continue;  // takes the CPU long
      SCOPED_TRACE(testing::Message() << rows << " rows, shift " << shift);
      const int64_t gap = rows == 37 ? 16 : 0;
      Mirror x(rows, n * H, activation, gap, 1, 1, shift), w(1, H, weight, 0, 2), y(rows, n * H, activation, gap, 3, 1, shift),
          raw(rows, n * H, activation, gap, 4, 1, shift), rstd(rows, n, Dtype::kF32, gap, 5), table(rows, H, Dtype::kF32, 0, 6),
          dx(rows, n * H, activation, gap, 7, 1, shift), dw(1, H, Dtype::kF32, 0, 8);
      cpu::norm_rope({.y = y.h(), .raw = raw.h(), .rstd = rstd.h(), .x = x.h(), .w = w.h(), .table = table.h(), .head_size = H}, 0, rows);
      norm_rope({.y = y.d(), .raw = raw.d(), .rstd = rstd.d(), .x = x.d(), .w = w.d(), .table = table.d(), .head_size = H}, nullptr);
      y.expect_close(1e-5, 4), rstd.expect_close(), raw.expect_equal();
      const std::vector<char> separate = y.download();
      copy({y.d(), x.d()}, nullptr);
      norm_rope({.y = y.d(), .rstd = rstd.d(), .x = y.d(), .w = w.d(), .table = table.d(), .head_size = H}, nullptr);
      EXPECT_EQ(y.download(), separate) << "where y is x and raw is not asked for";
      rstd.upload();
      const Memory scratch(column_sum_scratch_bytes(rows * n, H));
      const NormRopeGradArgs host{.dx = dx.h(), .dw = dw.h(), .x = x.h(), .rstd = rstd.h(), .w = w.h(), .table = table.h(), .head_size = H};
      const NormRopeGradArgs device{
          .dx = dx.d(), .dw = dw.d(), .x = x.d(), .rstd = rstd.d(), .w = w.d(), .table = table.d(), .head_size = H, .scratch = scratch.at()};
      norm_rope_grad(device, nullptr);
      const std::vector<char> dx_once = dx.download(), dw_once = dw.download();
      dx.upload(), dw.upload();
      norm_rope_grad(device, nullptr);
      EXPECT_TRUE(dx.download() == dx_once && dw.download() == dw_once) << "the same bits again";
      cpu::norm_rope_grad_dw(host, 0, H);
      cpu::norm_rope_grad_dx(host, 0, rows);
      dx.expect_close(4e-5, 4), dw.expect_close(1e-5, 100);
    }
}

class MergeGpuTest : public testing::TestWithParam<std::tuple<Dtype, Dtype, Dtype>> {};

INSTANTIATE_TEST_SUITE_P(Types, MergeGpuTest,
                         testing::Combine(testing::Values(Dtype::kF32, Dtype::kBf16), testing::Values(Dtype::kF32, Dtype::kBf16),
                                          testing::Values(Dtype::kF32, Dtype::kBf16)));

TEST_P(MergeGpuTest, MatchesTheCpuInPlaceToo) {
  const auto [y_type, a_type, b_type] = GetParam();
  for (const int64_t H : {1, 36, 64, 128, 512})
    for (const bool transposed : {false, true})
      for (const int64_t shift : {0, 1}) {
        SCOPED_TRACE(testing::Message() << "head " << H << " transposed " << transposed << " shift " << shift);
        const int64_t rows = 301, n = 5;
        Mirror y(rows, n * H, y_type, 8, 1, 1, shift), a(rows, n * H, a_type, 16, 2, 1, shift), b(rows, n * H, b_type, 0, 3, 1, shift);
        const auto make_lse = [&](unsigned seed) { return transposed ? Mirror(n, rows, Dtype::kF32, 3, seed, 3) : Mirror(rows, n, Dtype::kF32, 3, seed, 3); };
        Mirror lse = make_lse(4), a_lse = make_lse(5), b_lse = make_lse(6);
        const int64_t stride = a_lse.h().stride, row_stride = transposed ? 1 : stride, column_stride = transposed ? stride : 1;
        const auto place = [&](int64_t row, int64_t head) { return row * row_stride + head * column_stride; };
        a_lse.set(place(7, 1), -INFINITY), b_lse.set(place(7, 2), -INFINITY), a_lse.set(place(8, 0), -INFINITY), b_lse.set(place(8, 0), -INFINITY);
        a_lse.set(place(9, 0), 90), b_lse.set(place(10, 0), -1e30);
        for (int64_t j = 0; j < H; ++j) a.set(7 * a.h().stride + H + j, NAN), b.set(7 * b.h().stride + 2 * H + j, NAN);
        a.upload(), b.upload(), a_lse.upload(), b_lse.upload();
        const auto as_rows = [&](Matrix m) {
          m.rows = rows, m.columns = n, m.stride = row_stride;
          return m;
        };
        const auto args = [&](Matrix my_y, Matrix my_lse, Matrix my_a, Matrix my_a_lse, Matrix my_b, Matrix my_b_lse) {
          return MergeArgs{.y = my_y,
                           .lse = as_rows(my_lse),
                           .a = my_a,
                           .a_lse = as_rows(my_a_lse),
                           .b = my_b,
                           .b_lse = as_rows(my_b_lse),
                           .head_size = H,
                           .lse_column_stride = column_stride,
                           .a_lse_column_stride = column_stride,
                           .b_lse_column_stride = column_stride};
        };
        cpu::merge(args(y.h(), lse.h(), a.h(), a_lse.h(), b.h(), b_lse.h()), 0, rows);
        merge(args(y.d(), lse.d(), a.d(), a_lse.d(), b.d(), b_lse.d()), nullptr);
        y.expect_close(), lse.expect_close();
        if (y_type == a_type) {
          cpu::merge(args(a.h(), a_lse.h(), a.h(), a_lse.h(), b.h(), b_lse.h()), 0, rows);
          merge(args(a.d(), a_lse.d(), a.d(), a_lse.d(), b.d(), b_lse.d()), nullptr);
          a.expect_close(), a_lse.expect_close();
        } else if (y_type == b_type) {
          cpu::merge(args(b.h(), b_lse.h(), a.h(), a_lse.h(), b.h(), b_lse.h()), 0, rows);
          merge(args(b.d(), b_lse.d(), a.d(), a_lse.d(), b.d(), b_lse.d()), nullptr);
          b.expect_close(), b_lse.expect_close();
        }
      }
}

TEST(KernelsGpuEdgeTest, EmptyMatricesAreLeftAlone) {
  const auto empty = [](Dtype dtype, int64_t columns) { return Matrix{.data = nullptr, .dtype = dtype, .rows = 0, .columns = columns, .stride = columns}; };
  const Matrix x = empty(Dtype::kBf16, 256), f = empty(Dtype::kF32, 256), one = empty(Dtype::kF32, 1), ids = empty(Dtype::kI64, 1);
  zero(x, nullptr), copy({x, x}, nullptr), copy({f, x}, nullptr), add({x, x}, nullptr), add_bias({x, x}, nullptr);
  bias_grad({.db = f, .dy = x}, nullptr);
  rms_norm({.y = x, .rstd = one, .x = x, .w = x}, nullptr);
  rms_norm_grad({.dx = x, .dw = f, .dy = x, .x = x, .rstd = one, .w = x}, nullptr);
  norm_rope({.y = x, .rstd = one, .x = x, .w = x, .table = f, .head_size = 128}, nullptr);
  norm_rope_grad({.dx = x, .dw = f, .x = x, .rstd = one, .w = x, .table = f, .head_size = 128}, nullptr);
  rope_table({.table = f, .positions = ids}, nullptr), rope({.x = x, .table = f}, nullptr);
  swiglu({.a = x, .gate_up = x}, nullptr), swiglu_grad({.gate_up = x, .a = x, .da = x}, nullptr);
  cross_entropy({.logits = x, .loss = one, .labels = ids}, nullptr);
  embed({.h = x, .table = x, .ids = ids}, nullptr), embed_grad({.dtable = f, .dh = x, .ids = ids}, nullptr);
  const PackedColumns range{0, 8, 0, 8};
  pack_columns({.x = x, .packed = nullptr, .ranges = &range, .num_ranges = 1}, nullptr);
  unpack_columns({.x = x, .packed = nullptr, .ranges = &range, .num_ranges = 1}, nullptr);
  sum_pieces({.shard = f, .received = x, .pieces = 2}, nullptr);
  merge({.y = x, .lse = one, .a = x, .a_lse = one, .b = x, .b_lse = one, .head_size = 128}, nullptr);
  adamw({}, nullptr);
  Mirror total(1, 1, Dtype::kF64);
  const Memory scratch(kNormScratchBytes);
  squared_norm({.total = static_cast<double*>(total.d().data), .x = f, .scratch = scratch.at()}, nullptr);
  sum_loss({.total = static_cast<double*>(total.d().data), .loss = one}, nullptr);
  must(cudaDeviceSynchronize());
  total.expect_equal();
}

TEST(KernelsGpuEdgeTest, StridedCopiesOfEveryUnit) {
  for (const Dtype dtype : {Dtype::kU8, Dtype::kI16, Dtype::kBf16, Dtype::kF32, Dtype::kI64})
    for (const int64_t columns : {16, 24, 6, 7})
      for (const int64_t shift : {0, 1, 4}) {
        SCOPED_TRACE(testing::Message() << static_cast<int>(dtype) << " " << columns << " " << shift);
        const int64_t rows = 70, gap = columns == 16 ? 16 : 3, bytes = bytes_of(dtype), all = (rows * (columns + gap) + shift) * bytes;
        std::vector<char> from(static_cast<size_t>(all)), to(from.size());
        for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<char>(i * 37 % 251);
        const Memory x(all), y(all);
        must(cudaMemcpy(x.at(), from.data(), from.size(), cudaMemcpyHostToDevice)), must(cudaMemset(y.at(), 0, to.size()));
        const auto matrix = [&](char* data) {
          return Matrix{.data = data + shift * bytes, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns + gap};
        };
        copy({matrix(y.at()), matrix(x.at())}, nullptr);
        std::vector<char> got(to.size());
        must(cudaMemcpy(got.data(), y.at(), got.size(), cudaMemcpyDeviceToHost));
        cpu::copy({matrix(to.data()), matrix(from.data())}, 0, rows * columns);
        ASSERT_TRUE(got == to);
      }
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
