// P ranks equal one rank: losses and every gradient, over meshes, accumulation, ragged lengths and masks.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include "base/check.h"
#include "grid.h"

namespace uly::parity {
namespace {

void expect_equal(const Result& a, const Result& b, const std::string& what, double tolerance = 1e-5) {
  ASSERT_EQ(a.losses.size(), b.losses.size());
  for (size_t i = 0; i < a.losses.size(); ++i) EXPECT_NEAR(a.losses[i], b.losses[i], tolerance * std::abs(a.losses[i])) << what << ", step " << i + 1;
  EXPECT_LT(gradient_difference(a, b), tolerance) << what;
}

struct Point {
  int64_t W, P, accumulation;
};

class GridTest : public testing::TestWithParam<Point> {};

TEST_P(GridTest, EveryMeshEqualsOneRank) {
  const auto [W, P, accumulation] = GetParam();
  Training run;
  run.shape.N = 8, run.shape.K = 2;
  run.lengths = {37, 5, 64, 1, 50, 23, 41, 16, 29, 33, 2, 60, 18, 44, 7, 12, 3, 27, 55, 31, 9, 48, 21, 39, 26, 62, 14, 8, 35, 52, 11, 19, 6, 45, 24, 17};
  Training one = run;
  one.accumulation = accumulation * W / P;
  run.W = W, run.P = P, run.accumulation = accumulation;
  if (accumulation * W / P > 18) run.steps = one.steps = 1;
  expect_equal(train(one), train(run), fmt::format("W {} P {} accumulation {}", W, P, accumulation));
}

INSTANTIATE_TEST_SUITE_P(Meshes, GridTest,
                         testing::Values(Point{1, 1, 4}, Point{2, 1, 1}, Point{2, 1, 4}, Point{2, 2, 1}, Point{2, 2, 4}, Point{4, 1, 1}, Point{4, 1, 4}, Point{4, 2, 1}, Point{4, 2, 4}, Point{4, 4, 1},
                                         Point{4, 4, 4}, Point{8, 1, 1}, Point{8, 1, 4}, Point{8, 2, 1}, Point{8, 2, 4}, Point{8, 4, 1}, Point{8, 4, 4}, Point{8, 8, 1}, Point{8, 8, 4}),
                         [](const auto& p) { return fmt::format("W{}P{}A{}", p.param.W, p.param.P, p.param.accumulation); });

TEST(ParityTest, UnevenHeads28On8Ranks) {
  Training one;
  one.shape.N = 28, one.shape.K = 4, one.shape.D = 56;
  Training eight = one;
  eight.W = eight.P = 8;
  expect_equal(train(one), train(eight), "28:4 heads");
}

TEST(ParityTest, UnevenHeads6On4RanksWithEveryFamily) {
  for (const char* family : {"llama", "qwen2", "qwen3", "mistral"}) {
    Training one;
    one.shape.family = family;
    one.shape.N = 6, one.shape.K = 2, one.shape.tied = std::string(family) == "qwen2";
    Training four = one;
    four.W = four.P = 4;
    expect_equal(train(one), train(four), family);
  }
}

TEST(ParityTest, NodesWithACopyOfTheWeightsAreOneNode) {
  Training one;
  one.W = 4, one.P = 2, one.accumulation = 2;
  Training nodes = one;
  nodes.node = 2;
  const Result a = train(one), b = train(nodes);
  EXPECT_EQ(a.losses, b.losses);
  EXPECT_EQ(a.gradients, b.gradients);
}

TEST(ParityTest, MultiQueryOnTwoRanksWithTiedEmbeddings) {
  Training one;
  one.shape.K = 1, one.shape.tied = true;
  Training two = one;
  two.W = two.P = 2;
  expect_equal(train(one), train(two), "MQA, tied");
}

TEST(ParityTest, AMicroBatchOfSeveralSamplesEqualsAccumulation) {
  Training accumulated, together;
  accumulated.accumulation = 4;
  together.micro_batch = 4;
  expect_equal(train(accumulated), train(together), "micro_batch_size 4");
  together.W = together.P = 2;
  expect_equal(train(accumulated), train(together), "micro_batch_size 4 on two ranks");
}

TEST(ParityTest, PaddingChangesNothing) {
  Training plain, padded;
  padded.div_length = 64;
  expect_equal(train(plain), train(padded), "padded to 64");
  Training other = plain;
  other.W = other.P = 2;
  expect_equal(train(plain), train(other), "lengths that do not divide by P");
}

TEST(ParityTest, EveryTileSizeMatchesTheWhole) {
  Training whole;
  const Result expected = train(whole);
  for (const char* tile : {"1KiB", "2500", "10000", "20KiB"}) {  // one token to most of a sample
    Training tiled = whole;
    tiled.extra = fmt::format("memory: {{tile: '{}'}}\n", tile);
    expect_equal(expected, train(tiled), tile);
    tiled.W = tiled.P = 2;
    expect_equal(expected, train(tiled), fmt::format("{} on two ranks", tile));
  }
}

TEST(ParityTest, RebuiltEqualsKept) {
  for (const char* family : {"llama", "qwen2", "qwen3"}) {
    Training kept;
    kept.shape.family = family;
    kept.shape.L = 4;
    const Result expected = train(kept);
    int64_t last = -1;
    for (int64_t kib = 560; kib <= 880; kib += 40) {  // from hardly enough to enough for everything
      Training rebuilt = kept;
      rebuilt.extra = fmt::format("memory: {{device: {}}}\n", device_bytes_for(kept, kib * 1024));
      try {
        expect_equal(expected, train(rebuilt), fmt::format("{} in {} KiB", family, kib));
        last = kib;
      } catch (const WillNotFit&) {
        EXPECT_EQ(last, -1) << "what fits in less fits in more";
      }
    }
    EXPECT_GT(last, 0);
  }
}

TEST(ParityTest, Bf16OnTheWireRoundsEachRanksGradientOnce) {
  Training fp32, bf16;
  fp32.W = fp32.P = bf16.W = bf16.P = 4;
  fp32.steps = bf16.steps = 1;
  fp32.micro_batch = bf16.micro_batch = 8;
  bf16.wire = "bf16";
  const Result a = train(fp32), b = train(bf16);
  EXPECT_EQ(a.losses[0], b.losses[0]);
  const double difference = gradient_difference(a, b);
  EXPECT_LT(difference, 1.0 / 256);  // half a unit in the last place of bf16, and the sum itself is fp32
  EXPECT_GT(difference, 1e-5);
}

TEST(ParityTest, Bf16TrainingOnTwoRanksStaysCloseToOne) {
  Training one, two;
  one.dtype = two.dtype = "bf16";
  two.W = two.P = 2;
  const Result a = train(one), b = train(two);
  EXPECT_NEAR(a.losses[0], b.losses[0], 2e-3 * a.losses[0]);
  EXPECT_LT(gradient_difference(a, b), 5e-2);
}

TEST(ParityTest, SampleReductionIsTheMeanOfSampleMeans) {
  Training one, four;
  one.accumulation = 8;
  one.steps = four.steps = 1;
  one.extra = four.extra = "loss_reduction: sample\n";
  four.W = 4, four.accumulation = 2;
  expect_equal(train(one), train(four), "loss_reduction: sample");
  Training token = one;
  token.extra = "";
  EXPECT_GT(std::abs(train(one).losses[0] - train(token).losses[0]), 1e-4);
}

}  // namespace
}  // namespace uly::parity
