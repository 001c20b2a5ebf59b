// Every CPU kernel against its formula in fp64, for ragged shapes with strides, and for any cut into ranges.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "kernels/access.h"
#include "kernels/cpu/exp.h"
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

namespace uly::kernels {
namespace {

// A matrix with its memory; elements between rows hold 7 and must stay so.
class Values {
 public:
  Values(int64_t rows, int64_t columns, Dtype dtype, int64_t gap = 0) : bytes_(static_cast<size_t>((rows * (columns + gap) + 1) * bytes_of(dtype))) {
    m_ = {.data = bytes_.data(), .dtype = dtype, .rows = rows, .columns = columns, .stride = columns + gap};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns + gap; ++j) set(i, j, 7);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, 0);
  }
  Values(const Values& o) : bytes_(o.bytes_), m_(o.m_) { m_.data = bytes_.data(); }
  Values& operator=(const Values&) = delete;

  static Values random(int64_t rows, int64_t columns, Dtype dtype, int64_t gap, unsigned seed, double scale = 1) {
    Values v(rows, columns, dtype, gap);
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) v.set(i, j, normal(engine));
    return v;
  }

  Matrix m() const { return m_; }
  double operator()(int64_t i, int64_t j) const {
    const int64_t at = i * m_.stride + j;
    if (m_.dtype == Dtype::kI64) return static_cast<double>(static_cast<const int64_t*>(m_.data)[at]);
    if (m_.dtype == Dtype::kBf16) return static_cast<double>(to_float(static_cast<const Bf16*>(m_.data)[at]));
    return static_cast<double>(static_cast<const float*>(m_.data)[at]);
  }
  void set(int64_t i, int64_t j, double x) {
    const int64_t at = i * m_.stride + j;
    if (m_.dtype == Dtype::kI64)
      static_cast<int64_t*>(m_.data)[at] = static_cast<int64_t>(x);
    else if (m_.dtype == Dtype::kBf16)
      static_cast<Bf16*>(m_.data)[at] = to_bf16(static_cast<float>(x));
    else
      static_cast<float*>(m_.data)[at] = static_cast<float>(x);
  }
  bool operator==(const Values& o) const { return bytes_ == o.bytes_; }

 private:
  std::vector<char> bytes_;
  Matrix m_;
};

using Reference = std::function<double(int64_t, int64_t)>;

// Compares within the rounding of the dtype, relative to `size`, the size of what was added up; gaps must be untouched.
void expect_close(const Values& got, const Reference& expected, double tolerance = 4e-6, double size = 1) {
  if (got.m().dtype == Dtype::kBf16) tolerance = 5e-3;
  for (int64_t i = 0; i < got.m().rows; ++i) {
    for (int64_t j = 0; j < got.m().columns; ++j) {
      const double want = expected(i, j);
      ASSERT_NEAR(got(i, j), want, tolerance * (std::abs(want) + size)) << "row " << i << " column " << j;
    }
    for (int64_t j = got.m().columns; j < got.m().stride; ++j) ASSERT_EQ(got(i, j), 7) << "between rows " << i << " and " << i + 1;
  }
}

// Runs `f` over [0, n) in one range on a copy of `state`, and in several, and expects the same bits; leaves the result.
void run_in_ranges(std::vector<Values*> state, int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  std::vector<Values> before;
  for (Values* v : state) before.push_back(*v);
  f(0, n);
  const auto restore = [&](size_t k, const Values& from) {
    std::memcpy(state[k]->m().data, from.m().data, static_cast<size_t>(from.m().rows * from.m().stride * bytes_of(from.m().dtype)));
  };
  std::vector<Values> whole;
  for (Values* v : state) whole.push_back(*v);
  for (const int64_t length : {int64_t{1}, int64_t{7}, n / 2 + 1}) {
    for (size_t k = 0; k < state.size(); ++k) restore(k, before[k]);
    for (int64_t first = 0; first < n; first += length) f(first, std::min(n, first + length));
    for (size_t k = 0; k < state.size(); ++k) ASSERT_TRUE(*state[k] == whole[k]) << "ranges of " << length << " differ, state " << k;
  }
}

struct Case {
  int64_t rows, columns, gap;
  Dtype activation, weight;
};

class KernelsTest : public testing::TestWithParam<Case> {
 protected:
  Case c = GetParam();
  Values random(int64_t rows, int64_t columns, unsigned seed, double scale = 1) const {
    return Values::random(rows, columns, c.activation, c.gap, seed, scale);
  }
  Values weight(unsigned seed) const { return Values::random(1, c.columns, c.weight, 0, seed); }
};

INSTANTIATE_TEST_SUITE_P(Shapes, KernelsTest,
                         testing::Values(Case{1, 1, 0, Dtype::kF32, Dtype::kF32}, Case{1, 64, 3, Dtype::kBf16, Dtype::kBf16},
                                         Case{5, 33, 0, Dtype::kF32, Dtype::kBf16}, Case{131, 70, 5, Dtype::kF32, Dtype::kF32},
                                         Case{67, 611, 1, Dtype::kBf16, Dtype::kF32}, Case{3, 2049, 0, Dtype::kBf16, Dtype::kBf16}));

TEST_P(KernelsTest, RmsNormMatchesItsFormula) {
  const Values x = random(c.rows, c.columns, 1), w = weight(2);
  Values y = random(c.rows, c.columns, 3), rstd(c.rows, 1, Dtype::kF32);
  run_in_ranges({&y, &rstd}, c.rows, [&](int64_t b, int64_t e) { cpu::rms_norm({.y = y.m(), .rstd = rstd.m(), .x = x.m(), .w = w.m(), .eps = 1e-3}, b, e); });
  const auto reference = [&](int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < c.columns; ++j) sum += x(i, j) * x(i, j);
    return 1 / std::sqrt(sum / static_cast<double>(c.columns) + 1e-3);
  };
  expect_close(rstd, [&](int64_t i, int64_t) { return reference(i); });
  for (int64_t i = 0; i < c.rows; ++i) rstd.set(i, 0, reference(i));
  expect_close(y, [&](int64_t i, int64_t j) { return x(i, j) * rstd(i, 0) * w(0, j); });
}

TEST_P(KernelsTest, RmsNormGradMatchesItsFormula) {
  const Values x = random(c.rows, c.columns, 1), w = weight(2), dy = random(c.rows, c.columns, 3), dx0 = random(c.rows, c.columns, 4);
  const Values rstd = Values::random(c.rows, 1, Dtype::kF32, 0, 6), dw0 = Values::random(1, c.columns, Dtype::kF32, 0, 5);
  Values dx = dx0, dw = dw0;
  const RmsNormGradArgs a{.dx = dx.m(), .dw = dw.m(), .dy = dy.m(), .x = x.m(), .rstd = rstd.m(), .w = w.m()};
  run_in_ranges({&dx}, c.rows, [&](int64_t b, int64_t e) { cpu::rms_norm_grad_dx(a, b, e); });
  run_in_ranges({&dw}, c.columns, [&](int64_t b, int64_t e) { cpu::rms_norm_grad_dw(a, b, e); });
  std::vector<double> mean(static_cast<size_t>(c.rows));
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.columns; ++j) mean[static_cast<size_t>(i)] += dy(i, j) * w(0, j) * x(i, j) * rstd(i, 0) / static_cast<double>(c.columns);
  expect_close(
      dx, [&](int64_t i, int64_t j) { return dx0(i, j) + rstd(i, 0) * (dy(i, j) * w(0, j) - x(i, j) * rstd(i, 0) * mean[static_cast<size_t>(i)]); }, 2e-5, 2);
  expect_close(
      dw,
      [&](int64_t, int64_t j) {
        double sum = dw0(0, j);
        for (int64_t i = 0; i < c.rows; ++i) sum += dy(i, j) * x(i, j) * rstd(i, 0);
        return sum;
      },
      4e-6, 4);
}

TEST_P(KernelsTest, RopeRotatesPairsAndBack) {
  const int64_t H = 2 * c.columns, n = 2;
  Values positions(c.rows, 1, Dtype::kI64), table(c.rows, H, Dtype::kF32), x = random(c.rows, n * H, 1);
  const Values x0 = x;
  std::vector<float> inv_freq;
  for (int64_t j = 0; j < c.columns; ++j) inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(j) / static_cast<float>(c.columns)));
  for (int64_t i = 0; i < c.rows; ++i) positions.set(i, 0, static_cast<double>(i * 977));
  const RopeTableArgs a{.table = table.m(), .positions = positions.m(), .inv_freq = inv_freq.data(), .scaling = 1.5f};
  run_in_ranges({&table}, c.rows, [&](int64_t b, int64_t e) { cpu::rope_table(a, b, e); });
  expect_close(
      table,
      [&](int64_t i, int64_t j) {
        const double angle = static_cast<double>(static_cast<float>(positions(i, 0)) * inv_freq[static_cast<size_t>(j % c.columns)]);
        return 1.5 * (j < c.columns ? std::cos(angle) : std::sin(angle));
      },
      1e-6);
  run_in_ranges({&x}, c.rows, [&](int64_t b, int64_t e) { cpu::rope({.x = x.m(), .table = table.m()}, b, e); });
  expect_close(x, [&](int64_t i, int64_t j) {
    const int64_t h = j / H * H, k = j % c.columns;
    const double cosine = table(i, k), sine = table(i, c.columns + k), first = x0(i, h + k), second = x0(i, h + c.columns + k);
    return j - h < c.columns ? first * cosine - second * sine : second * cosine + first * sine;
  });
  cpu::rope({.x = x.m(), .table = table.m(), .direction = -1}, 0, c.rows);
  expect_close(
      x, [&](int64_t i, int64_t j) { return 2.25 * x0(i, j); }, 1e-5, 4);
}

class NormRopeTest : public testing::TestWithParam<std::tuple<int64_t, Dtype, Dtype>> {};

INSTANTIATE_TEST_SUITE_P(Heads, NormRopeTest,
                         testing::Combine(testing::Values(2, 8, 70, 96, 256), testing::Values(Dtype::kF32, Dtype::kBf16),
                                          testing::Values(Dtype::kF32, Dtype::kBf16)));

TEST_P(NormRopeTest, MatchesItsFormulaAndSoDoesItsGradient) {
  const auto [H, activation, weight] = GetParam();
  const int64_t rows = 67, n = 3, half = H / 2, gap = 2;
  const Values x = Values::random(rows, n * H, activation, gap, 1), w = Values::random(1, H, weight, 0, 2),
               dy = Values::random(rows, n * H, activation, gap, 3), table = Values::random(rows, H, Dtype::kF32, 5, 4),
               dw0 = Values::random(1, H, Dtype::kF32, 0, 5);
  Values y(rows, n * H, activation, gap), raw = y, rstd(rows, n, Dtype::kF32, 2), dx = dy, dw = dw0, in_place = x;
  const NormRopeArgs a{.y = y.m(), .raw = raw.m(), .rstd = rstd.m(), .x = x.m(), .w = w.m(), .table = table.m(), .head_size = H, .eps = 1e-3};
  run_in_ranges({&y, &raw, &rstd}, rows, [&](int64_t b, int64_t e) { cpu::norm_rope(a, b, e); });
  EXPECT_TRUE(raw == x);
  cpu::norm_rope({.y = in_place.m(), .rstd = rstd.m(), .x = in_place.m(), .w = w.m(), .table = table.m(), .head_size = H, .eps = 1e-3}, 0, rows);
  EXPECT_TRUE(in_place == y) << "where y is x and raw is not asked for";
  const auto reciprocal = [&](int64_t i, int64_t h) {
    double sum = 0;
    for (int64_t j = 0; j < H; ++j) sum += x(i, h * H + j) * x(i, h * H + j);
    return 1 / std::sqrt(sum / static_cast<double>(H) + 1e-3);
  };
  expect_close(rstd, reciprocal);
  // Column j of a head after the rotation by +1 or -1 of what f says it was.
  const auto rotated = [&](int64_t i, int64_t j, double direction, const Reference& f) {
    const int64_t h = j / H * H, k = j % half;
    const double cosine = table(i, k), sine = direction * table(i, half + k);
    return j - h < half ? f(i, h + k) * cosine - f(i, h + half + k) * sine : f(i, h + half + k) * cosine + f(i, h + k) * sine;
  };
  expect_close(y, [&](int64_t i, int64_t j) { return rotated(i, j, 1, [&](int64_t r, int64_t k) { return x(r, k) * rstd(r, k / H) * w(0, k % H); }); });
  const NormRopeGradArgs g{.dx = dx.m(), .dw = dw.m(), .x = x.m(), .rstd = rstd.m(), .w = w.m(), .table = table.m(), .head_size = H};
  run_in_ranges({&dw}, H, [&](int64_t b, int64_t e) { cpu::norm_rope_grad_dw(g, b, e); });
  run_in_ranges({&dx}, rows, [&](int64_t b, int64_t e) { cpu::norm_rope_grad_dx(g, b, e); });
  const auto back = [&](int64_t i, int64_t j) { return rotated(i, j, -1, [&](int64_t r, int64_t k) { return dy(r, k); }); };
  expect_close(
      dw,
      [&](int64_t, int64_t j) {
        double sum = dw0(0, j);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t h = 0; h < n; ++h) sum += back(i, h * H + j) * x(i, h * H + j) * rstd(i, h);
        return sum;
      },
      4e-6, 8);
  std::vector<double> mean(static_cast<size_t>(rows * n));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n * H; ++j)
      mean[static_cast<size_t>(i * n + j / H)] += back(i, j) * w(0, j % H) * x(i, j) * rstd(i, j / H) / static_cast<double>(H);
  expect_close(
      dx,
      [&](int64_t i, int64_t j) {
        const double r = rstd(i, j / H);
        return r * (back(i, j) * w(0, j % H) - x(i, j) * r * mean[static_cast<size_t>(i * n + j / H)]);
      },
      2e-5, 4);
}

TEST(KernelsEdgeTest, NormRopeRefusesOddAndLargeHeads) {
  for (const int64_t H : {0, 7, 258}) {
    Values x(1, 258, Dtype::kF32);
    EXPECT_ANY_THROW(cpu::norm_rope({.y = x.m(), .rstd = x.m(), .x = x.m(), .w = x.m(), .table = x.m(), .head_size = H}, 0, 1)) << H;
  }
}

class MergeTest : public testing::TestWithParam<std::tuple<int64_t, Dtype, Dtype, Dtype>> {};

INSTANTIATE_TEST_SUITE_P(Types, MergeTest,
                         testing::Combine(testing::Values(1, 36, 128), testing::Values(Dtype::kF32, Dtype::kBf16), testing::Values(Dtype::kF32, Dtype::kBf16),
                                          testing::Values(Dtype::kF32, Dtype::kBf16)));

TEST_P(MergeTest, WeighsByExponentialsAndNeverMakesNaN) {
  const auto [H, y_type, a_type, b_type] = GetParam();
  const int64_t rows = 23, n = 3;
  Values a = Values::random(rows, n * H, a_type, 1, 1), b = Values::random(rows, n * H, b_type, 2, 2), y(rows, n * H, y_type, 3);
  Values a_lse = Values::random(rows, n, Dtype::kF32, 2, 3, 3), b_lse = Values::random(n, rows, Dtype::kF32, 1, 4, 3), lse(n, rows, Dtype::kF32);
  const double none = -std::numeric_limits<double>::infinity();
  a_lse.set(1, 0, none), b_lse.set(1, 2, none), a_lse.set(3, 2, none), b_lse.set(2, 3, none);
  a_lse.set(4, 0, 80), b_lse.set(0, 4, -80), a_lse.set(5, 0, -1e30);
  for (int64_t j = 0; j < H; ++j) a.set(1, j, NAN), b.set(2, H + H + j, NAN);
  b_lse.set(2, 2, none);
  const auto args = [&](Matrix y_matrix, Matrix lse_matrix, int64_t lse_column_stride) {
    return MergeArgs{.y = y_matrix,
                     .lse = lse_matrix,
                     .a = a.m(),
                     .a_lse = a_lse.m(),
                     .b = b.m(),
                     .b_lse = {.data = b_lse.m().data, .rows = rows, .columns = n, .stride = 1},
                     .head_size = H,
                     .lse_column_stride = lse_column_stride,
                     .b_lse_column_stride = b_lse.m().stride};
  };
  const MergeArgs m = args(y.m(), {.data = lse.m().data, .rows = rows, .columns = n, .stride = 1}, rows);
  run_in_ranges({&y, &lse}, rows, [&](int64_t begin, int64_t end) { cpu::merge(m, begin, end); });
  const auto sum = [&](int64_t i, int64_t h) { return std::exp(a_lse(i, h)) + std::exp(b_lse(h, i)); };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t h = 0; h < n; ++h) {
      if (sum(i, h) == 0)
        ASSERT_EQ(lse(h, i), none);
      else
        ASSERT_NEAR(lse(h, i), std::log(sum(i, h)), 1e-6 * (1 + std::abs(lse(h, i))));
    }
  expect_close(y, [&](int64_t i, int64_t j) {
    const int64_t h = j / H;
    const double from_a = a_lse(i, h) == none ? 0 : a(i, j) * std::exp(a_lse(i, h)), from_b = b_lse(h, i) == none ? 0 : b(i, j) * std::exp(b_lse(h, i));
    return sum(i, h) == 0 ? 0 : (from_a + from_b) / sum(i, h);
  });
  if (y_type != a_type) return;
  cpu::merge(args(a.m(), a_lse.m(), 1), 0, rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n * H; ++j) {
      ASSERT_EQ(a(i, j), y(i, j)) << "in place";
      ASSERT_EQ(a_lse(i, j / H), lse(j / H, i)) << "in place";
    }
}

TEST_P(KernelsTest, SwigluAndItsGradientMatchTheirFormula) {
  const int64_t F = c.columns;
  const Values gate_up = random(c.rows, 2 * F, 1, 3), da = random(c.rows, F, 2);
  Values a(c.rows, F, c.activation, c.gap), again(c.rows, F, c.activation, c.gap), d = gate_up;
  const auto sigmoid = [&](int64_t i, int64_t j) { return 1 / (1 + std::exp(-gate_up(i, j))); };
  run_in_ranges({&a}, c.rows, [&](int64_t b, int64_t e) { cpu::swiglu({.a = a.m(), .gate_up = gate_up.m()}, b, e); });
  expect_close(a, [&](int64_t i, int64_t j) { return gate_up(i, j) * sigmoid(i, j) * gate_up(i, F + j); });
  run_in_ranges({&d, &again}, c.rows, [&](int64_t b, int64_t e) { cpu::swiglu_grad({.gate_up = d.m(), .a = again.m(), .da = da.m()}, b, e); });
  EXPECT_TRUE(a == again) << "the rebuilt a";
  Values without = gate_up;
  run_in_ranges({&without}, c.rows, [&](int64_t b, int64_t e) { cpu::swiglu_grad({.gate_up = without.m(), .a = {}, .da = da.m()}, b, e); });
  EXPECT_TRUE(without == d) << "a is not wanted";
  expect_close(d, [&](int64_t i, int64_t j) {
    const int64_t k = j % F;
    const double s = sigmoid(i, k), g = gate_up(i, k);
    return j < F ? da(i, k) * gate_up(i, F + k) * s * (1 + g * (1 - s)) : da(i, k) * g * s;
  });
}

TEST_P(KernelsTest, CrossEntropyMatchesItsFormula) {
  const int64_t V = c.columns;
  const Values x = random(c.rows, V, 1, 5);
  Values logits = x, loss(c.rows, 1, Dtype::kF32), labels(c.rows, 1, Dtype::kI64);
  for (int64_t i = 0; i < c.rows; ++i) labels.set(i, 0, i % 3 == 1 ? static_cast<double>(kIgnoredLabel) : static_cast<double>(i * 31 % V));
  run_in_ranges({&logits, &loss}, c.rows,
                [&](int64_t b, int64_t e) { cpu::cross_entropy({.logits = logits.m(), .loss = loss.m(), .labels = labels.m(), .scale = 0.25f}, b, e); });
  std::vector<double> lse(static_cast<size_t>(c.rows));
  for (int64_t i = 0; i < c.rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < V; ++j) sum += std::exp(x(i, j));
    lse[static_cast<size_t>(i)] = std::log(sum);
  }
  double total_expected = 1, total = 1;
  expect_close(loss, [&](int64_t i, int64_t) {
    const double l = labels(i, 0) < 0 ? 0 : lse[static_cast<size_t>(i)] - x(i, static_cast<int64_t>(labels(i, 0)));
    total_expected += 0.25 * l;
    return l;
  });
  expect_close(
      logits,
      [&](int64_t i, int64_t j) {
        if (labels(i, 0) < 0) return 0.0;
        return 0.25 * (std::exp(x(i, j) - lse[static_cast<size_t>(i)]) - (static_cast<double>(j) == labels(i, 0) ? 1 : 0));
      },
      2e-6, 0.01);
  cpu::sum_loss({.total = &total, .loss = loss.m(), .scale = 0.25});
  EXPECT_NEAR(total, total_expected, 1e-5 * total_expected);
}

TEST_P(KernelsTest, EmbedAndItsGradientFollowTheIds) {
  const int64_t V = 6;
  const Values table = Values::random(V, c.columns, c.weight, 1, 1), dh = random(c.rows, c.columns, 2),
               dtable0 = Values::random(V, c.columns, Dtype::kF32, 2, 3);
  Values h(c.rows, c.columns, c.activation, c.gap), ids(c.rows, 1, Dtype::kI64, 1), dtable = dtable0;
  for (int64_t i = 0; i < c.rows; ++i) ids.set(i, 0, static_cast<double>(i * i % V));
  run_in_ranges({&h}, c.rows, [&](int64_t b, int64_t e) { cpu::embed({.h = h.m(), .table = table.m(), .ids = ids.m()}, b, e); });
  expect_close(h, [&](int64_t i, int64_t j) { return table(i * i % V, j); });
  run_in_ranges({&dtable}, c.columns, [&](int64_t b, int64_t e) { cpu::embed_grad({.dtable = dtable.m(), .dh = dh.m(), .ids = ids.m()}, b, e); });
  Values in_order = dtable0;
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.columns; ++j)
      in_order.set(i * i % V, j, static_cast<double>(static_cast<float>(in_order(i * i % V, j)) + static_cast<float>(dh(i, j))));
  EXPECT_TRUE(dtable == in_order);
  Values skipping = dtable0;
  cpu::embed_grad({.dtable = skipping.m(), .dh = dh.m(), .ids = ids.m(), .skip_id = 4}, 0, c.columns);
  for (int64_t r = 0; r < V; ++r)
    for (int64_t j = 0; j < c.columns; ++j) ASSERT_EQ(skipping(r, j), r == 4 ? dtable0(r, j) : in_order(r, j));
}

TEST_P(KernelsTest, ZeroCopyAndAddReachEveryElement) {
  for (const Dtype other : {Dtype::kF32, Dtype::kBf16}) {
    const Values x = Values::random(c.rows, c.columns, other, c.gap / 2, 1), y0 = random(c.rows, c.columns, 2);
    Values y = y0;
    const int64_t n = c.rows * c.columns;
    run_in_ranges({&y}, n, [&](int64_t b, int64_t e) { cpu::add({y.m(), x.m()}, b, e); });
    expect_close(y, [&](int64_t i, int64_t j) { return y0(i, j) + x(i, j); });
    run_in_ranges({&y}, n, [&](int64_t b, int64_t e) { cpu::copy({y.m(), x.m()}, b, e); });
    Values rounded = y;
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t j = 0; j < c.columns; ++j) rounded.set(i, j, x(i, j));
    EXPECT_TRUE(y == rounded);
    run_in_ranges({&y}, n, [&](int64_t b, int64_t e) { cpu::zero(y.m(), b, e); });
    expect_close(
        y, [](int64_t, int64_t) { return 0.0; }, 0, 0);
  }
}

TEST_P(KernelsTest, BiasIsAddedAndItsGradientIsTheColumnSum) {
  const Values b = weight(1), y0 = random(c.rows, c.columns, 2), db0 = Values::random(1, c.columns, Dtype::kF32, 0, 3);
  Values y = y0, db = db0;
  run_in_ranges({&y}, c.rows, [&](int64_t first, int64_t last) { cpu::add_bias({y.m(), b.m()}, first, last); });
  expect_close(y, [&](int64_t i, int64_t j) { return y0(i, j) + b(0, j); });
  run_in_ranges({&db}, c.columns, [&](int64_t first, int64_t last) { cpu::bias_grad({.db = db.m(), .dy = y0.m()}, first, last); });
  expect_close(
      db,
      [&](int64_t, int64_t j) {
        double sum = db0(0, j);
        for (int64_t i = 0; i < c.rows; ++i) sum += y0(i, j);
        return sum;
      },
      2e-6, 10);
}

TEST_P(KernelsTest, UnpackSumsWhatPackSentTwice) {
  const int64_t C = c.columns, s = c.rows;
  const std::vector<PackedColumns> ranges = {{0, C, 0, C + (C + 1) / 2}, {C / 2, C - C / 2, C, C + (C + 1) / 2}};
  const Values x = random(s, C, 1);
  Values packed(s, C + (C + 1) / 2, c.activation), back(s, C, c.activation, c.gap);
  const PackArgs pack{.x = x.m(), .packed = packed.m().data, .ranges = ranges.data(), .num_ranges = 2};
  run_in_ranges({&packed}, s, [&](int64_t b, int64_t e) { cpu::pack_columns(pack, b, e); });
  expect_close(
      packed, [&](int64_t i, int64_t j) { return j < C ? x(i, j) : x(i, C / 2 + j - C); }, 0, 0);
  const PackArgs unpack{.x = back.m(), .packed = packed.m().data, .ranges = ranges.data(), .num_ranges = 2};
  run_in_ranges({&back}, s, [&](int64_t b, int64_t e) { cpu::unpack_columns(unpack, b, e); });
  for (int64_t i = 0; i < s; ++i)
    for (int64_t j = 0; j < C; ++j) ASSERT_EQ(back(i, j), x(i, j) * (j < C / 2 ? 1 : 2));
}

TEST_P(KernelsTest, SumPiecesAddsInOrder) {
  const int64_t n = c.rows * c.columns, pieces = 3;
  const Values received = Values::random(pieces, n, c.activation, 0, 1), shard0 = Values::random(1, n, Dtype::kF32, 0, 2);
  Values shard = shard0, expected = shard0;
  run_in_ranges({&shard}, n, [&](int64_t b, int64_t e) { cpu::sum_pieces({.shard = shard.m(), .received = received.m(), .pieces = pieces}, b, e); });
  for (int64_t p = 0; p < pieces; ++p)
    for (int64_t i = 0; i < n; ++i) expected.set(0, i, static_cast<double>(static_cast<float>(expected(0, i)) + static_cast<float>(received(p, i))));
  EXPECT_TRUE(shard == expected);
}

TEST_P(KernelsTest, SquaredNormAddsUp) {
  const Values x = Values::random(c.rows, c.columns, c.activation, 0, 1);
  std::vector<double> scratch(kNormBlocks);
  double total = 3, expected = 3, again = 3;
  const auto args = [&](double* t) { return SquaredNormArgs{.total = t, .x = x.m(), .scratch = scratch.data()}; };
  for (int64_t b = 0; b < kNormBlocks; b += 100) cpu::squared_norm_blocks(args(&total), b, std::min(kNormBlocks, b + 100));
  cpu::squared_norm_total(args(&total));
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.columns; ++j) expected += x(i, j) * x(i, j);
  EXPECT_NEAR(total, expected, 1e-6 * expected);
  cpu::squared_norm_blocks(args(&again), 0, kNormBlocks);
  cpu::squared_norm_total(args(&again));
  EXPECT_EQ(total, again);
}

TEST_P(KernelsTest, AdamwFollowsTheFormulaAndRoundsTheWeight) {
  const int64_t n = c.rows * c.columns;
  const auto flat = [&](unsigned seed, double scale) { return Values::random(1, n, Dtype::kF32, 0, seed, scale); };
  const auto address = [](const Values& v) { return static_cast<float*>(v.m().data); };
  Values master = flat(1, 1), m = flat(2, 0.01), v = flat(3, 0.01), gradient = flat(4, 1), weight(1, n, c.weight);
  for (int64_t i = 0; i < n; ++i) v.set(0, i, v(0, i) * v(0, i));
  const Values p0 = master, m0 = m, v0 = v, g0 = gradient;
  const double squared_norm = 16, lr = 1e-3, decay = 0.1;
  AdamwArgs a{.weight = weight.m().data,
              .weight_dtype = c.weight,
              .count = n,
              .squared_norm = &squared_norm,
              .clip = 1,
              .learning_rate = lr,
              .weight_decay = decay,
              .step = 3};
  a.master = address(master), a.m = address(m), a.v = address(v), a.gradient = address(gradient);
  run_in_ranges({&master, &m, &v, &gradient, &weight}, n, [&](int64_t b, int64_t e) { cpu::adamw(a, b, e); });
  const auto g = [&](int64_t j) { return g0(0, j) / (4 + 1e-6); };
  const auto m_next = [&](int64_t j) { return 0.9 * m0(0, j) + 0.1 * g(j); };
  const auto v_next = [&](int64_t j) { return 0.999 * v0(0, j) + 0.001 * g(j) * g(j); };
  expect_close(
      m, [&](int64_t, int64_t j) { return m_next(j); }, 1e-6, 0.1);
  expect_close(
      v, [&](int64_t, int64_t j) { return v_next(j); }, 1e-6, 1e-4);
  expect_close(
      master,
      [&](int64_t, int64_t j) {
        const double p = p0(0, j) * (1 - lr * decay);
        return p - lr / (1 - std::pow(0.9, 3)) * m_next(j) / (std::sqrt(v_next(j)) / std::sqrt(1 - std::pow(0.999, 3)) + 1e-8);
      },
      1e-6);
  for (int64_t j = 0; j < n; ++j) {
    ASSERT_EQ(weight(0, j), c.weight == Dtype::kBf16 ? static_cast<double>(to_float(to_bf16(static_cast<float>(master(0, j))))) : master(0, j));
  }
  Values alone = p0, m1 = m0, v1 = v0, g1 = g0;
  a.master = address(alone), a.m = address(m1), a.v = address(v1), a.gradient = address(g1);
  a.weight = a.master, a.weight_dtype = Dtype::kF32;
  cpu::adamw(a, 0, n);
  EXPECT_TRUE(alone == master) << "where the weight is the master";
}

// The compiler may not fuse or reorder anything: plain code that calls std::fma gives the same bits.
TEST(AdamwTest, BitsAreThoseOfTheWrittenFormula) {
  const int64_t n = 1000;
  Values master = Values::random(1, n, Dtype::kF32, 0, 1), m = Values::random(1, n, Dtype::kF32, 0, 2), v(1, n, Dtype::kF32),
         gradient = Values::random(1, n, Dtype::kF32, 0, 3);
  const Values p0 = master, m0 = m, g0 = gradient;
  AdamwArgs a{.weight = master.m().data, .count = n, .learning_rate = 0.01, .weight_decay = 0.01, .step = 1};
  a.master = static_cast<float*>(master.m().data), a.m = static_cast<float*>(m.m().data), a.v = static_cast<float*>(v.m().data),
  a.gradient = static_cast<float*>(gradient.m().data);
  cpu::adamw(a, 0, n);
  const AdamwConstants k = adamw_constants(a);
  for (int64_t i = 0; i < n; ++i) {
    volatile float g = static_cast<float>(g0(0, i)), rest = k.rest1 * g, square = g * g, rest2 = k.rest2 * square, root = 0, bias = 0, ratio = 0;
    const float m1 = std::fma(k.beta1, static_cast<float>(m0(0, i)), rest), v1 = std::fma(k.beta2, 0.0f, rest2);
    root = std::sqrt(v1);
    bias = root / k.root_correction2;
    bias = bias + k.eps;
    ratio = m1 / bias;
    const float p = static_cast<float>(p0(0, i)), decayed = std::fma(k.decay, p, p);
    ASSERT_EQ(static_cast<float>(m(0, i)), m1);
    ASSERT_EQ(static_cast<float>(v(0, i)), v1);
    ASSERT_EQ(static_cast<float>(master(0, i)), std::fma(k.step_size, ratio, decayed));
  }
}

TEST(AdamwTest, ChangesNothingWhereTheNormOrTheLossIsNotFinite) {
  const int64_t n = 100;
  for (const bool splits : {false, true})
    for (const double bad :
         {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN(), 1.0}) {
      for (const bool in_loss : {false, true}) {
        Values weight = Values::random(1, n, Dtype::kBf16, 0, 1), low = Values::random(1, n, Dtype::kBf16, 0, 2),
               master = Values::random(1, n, Dtype::kF32, 0, 3), m = Values::random(1, n, Dtype::kF32, 0, 4), v(1, n, Dtype::kF32),
               gradient = Values::random(1, n, Dtype::kF32, 0, 5);
        const Values weight0 = weight, low0 = low, master0 = master, m0 = m, v0 = v, gradient0 = gradient;
        const double norm = in_loss ? 1 : bad, loss = in_loss ? bad : 1;
        AdamwArgs a{.weight = weight.m().data, .weight_dtype = Dtype::kBf16, .count = n, .squared_norm = &norm, .loss = &loss, .learning_rate = 0.1};
        a.master = splits ? nullptr : static_cast<float*>(master.m().data), a.low = splits ? static_cast<int16_t*>(low.m().data) : nullptr;
        a.m = static_cast<float*>(m.m().data), a.v = static_cast<float*>(v.m().data), a.gradient = static_cast<float*>(gradient.m().data);
        cpu::adamw(a, 0, n);
        const bool same = weight == weight0 && low == low0 && master == master0 && m == m0 && v == v0 && gradient == gradient0;
        EXPECT_EQ(same, bad != 1.0) << bad << (in_loss ? " loss" : " norm");
      }
    }
}

TEST(AdamwTest, ASplitMasterIsTheMasterToTheBit) {
  const int64_t n = 1000;
  Values master = Values::random(1, n, Dtype::kF32, 0, 1), m = Values::random(1, n, Dtype::kF32, 0, 2), v(1, n, Dtype::kF32), rounded(1, n, Dtype::kBf16);
  std::vector<uint16_t> weight(n);
  std::vector<int16_t> low(n);
  for (int64_t i = 0; i < n; ++i) {
    const SplitFloat x = split(static_cast<float>(master(0, i)));
    weight[static_cast<size_t>(i)] = x.weight, low[static_cast<size_t>(i)] = x.low;
  }
  Values m1 = m, v1 = v;
  for (int64_t step = 1; step <= 3; ++step) {
    Values gradient = Values::random(1, n, Dtype::kF32, 0, static_cast<unsigned>(step) + 2), gradient1 = gradient;
    AdamwArgs whole{.weight = rounded.m().data, .weight_dtype = Dtype::kBf16, .count = n, .learning_rate = 0.01, .weight_decay = 0.1, .step = step};
    AdamwArgs halves = whole;
    whole.master = static_cast<float*>(master.m().data), whole.m = static_cast<float*>(m.m().data), whole.v = static_cast<float*>(v.m().data);
    whole.gradient = static_cast<float*>(gradient.m().data);
    halves.weight = weight.data(), halves.low = low.data(), halves.m = static_cast<float*>(m1.m().data), halves.v = static_cast<float*>(v1.m().data);
    halves.gradient = static_cast<float*>(gradient1.m().data);
    cpu::adamw(whole, 0, n);
    cpu::adamw(halves, 0, 7), cpu::adamw(halves, 7, n);
    EXPECT_TRUE(m == m1 && v == v1 && gradient == gradient1);
    for (int64_t i = 0; i < n; ++i)
      ASSERT_EQ(static_cast<double>(join(weight[static_cast<size_t>(i)], low[static_cast<size_t>(i)])), master(0, i)) << "step " << step << " element " << i;
  }
}

TEST(SplitFloatTest, JoinsToEveryNumberItCameFrom) {
  std::vector<uint32_t> highs = {0x0000, 0x0001, 0x007f, 0x0080, 0x7f7f, 0x7f00, 0x3f80, 0x3fff, 0x4000, 0x1234, 0x5555};
  for (uint32_t exponent = 1; exponent < 255; exponent += 23) highs.push_back(exponent << 7), highs.push_back((exponent << 7) - 1);
  for (const uint32_t sign : {0u, 0x8000u})
    for (const uint32_t high : highs)
      for (uint32_t low = 0; low < 65536; ++low) {
        const uint32_t bits = (sign | high) << 16 | low;
        const float x = std::bit_cast<float>(bits);
        const SplitFloat s = split(x);
        ASSERT_EQ(std::bit_cast<uint32_t>(join(s.weight, s.low)), bits) << std::hex << bits;
        const bool halfway = low == 0x8000;
        ASSERT_EQ(s.weight, halfway ? (sign | high) + 1 : to_bf16(x).bits) << std::hex << bits;
      }
  for (const float x : {INFINITY, -INFINITY}) EXPECT_EQ(join(split(x).weight, split(x).low), x);
  for (const uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xffc00000u}) {
    const SplitFloat s = split(std::bit_cast<float>(bits));
    EXPECT_TRUE(std::isnan(join(s.weight, s.low)) && std::isnan(to_float(Bf16{s.weight}))) << std::hex << bits;
  }
}

TEST(KernelsEdgeTest, ExpIsWithinTwoUlp) {
  double worst = 0;
  for (float x = -87.0f; x < 88.5f; x += 0.000977f) {
    const double exact = std::exp(static_cast<double>(x));
    const float nearest = static_cast<float>(exact);
    const double ulp = static_cast<double>(std::nextafter(nearest, INFINITY)) - static_cast<double>(nearest);
    worst = std::max(worst, std::abs(static_cast<double>(cpu::exp_f32(x)) - exact) / ulp);
  }
  EXPECT_LT(worst, 2) << worst;
  EXPECT_EQ(cpu::exp_f32(0.0f), 1.0f);
  EXPECT_EQ(cpu::exp_f32(-INFINITY), 0.0f);
  EXPECT_EQ(cpu::exp_f32(-200.0f), 0.0f);
  EXPECT_EQ(cpu::exp_f32(INFINITY), INFINITY);
  EXPECT_NEAR(cpu::exp_f32(-100.0f) / std::exp(-100.0f), 1, 0.05);
  EXPECT_TRUE(std::isnan(cpu::exp_f32(NAN)));
}

TEST(Bf16Test, RoundsToNearestEven) {
  const auto bits = [](uint32_t u) { return to_bf16(std::bit_cast<float>(u)).bits; };
  EXPECT_EQ(bits(0x3f808000), 0x3f80);  // halfway, even below
  EXPECT_EQ(bits(0x3f818000), 0x3f82);  // halfway, even above
  EXPECT_EQ(bits(0x3f808001), 0x3f81);
  EXPECT_EQ(bits(0x7f7fffff), 0x7f80);  // the largest number becomes infinity
  EXPECT_EQ(bits(0x7f800001) & 0x7fc0, 0x7fc0);
  EXPECT_EQ(bits(0xff800000), 0xff80);
}

TEST(KernelsEdgeTest, CrossEntropyKeepsLargeLogitsFinite) {
  Values logits(1, 3000, Dtype::kF32), loss(1, 1, Dtype::kF32), labels(1, 1, Dtype::kI64);
  for (int64_t j = 0; j < 3000; ++j) logits.set(0, j, j < 2000 ? -INFINITY : 1e4 + static_cast<double>(j));
  labels.set(0, 0, 2999);
  cpu::cross_entropy({.logits = logits.m(), .loss = loss.m(), .labels = labels.m()}, 0, 1);
  EXPECT_NEAR(loss(0, 0), 0.45867514, 1e-6);
  EXPECT_EQ(logits(0, 0), 0);
  EXPECT_NEAR(logits(0, 2999), -0.36787944, 1e-6);
}

TEST(KernelsEdgeTest, NoKernelTakesAnUnknownDtype) {
  Values x(1, 4, Dtype::kI64);
  EXPECT_ANY_THROW(cpu::add({x.m(), x.m()}, 0, 4));
  EXPECT_ANY_THROW(cpu::swiglu({.a = x.m(), .gate_up = x.m()}, 0, 1));
}

}  // namespace
}  // namespace uly::kernels
