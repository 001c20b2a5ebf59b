// Documents that share a sequence do not see each other: not in loss, not in gradients, at any degree of parallelism. And evaluation is
// the loss of the same tokens on any mesh.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "grid.h"

namespace uly::parity {
namespace {

const std::vector<int64_t> kLengths = {37, 5, 64, 1, 50, 23, 41, 16, 29, 33, 2, 60, 18, 44, 7, 12, 3, 27, 55, 31, 9, 48, 21, 39, 26, 62, 14, 8, 35, 52, 11, 19, 6, 45, 24, 17};

void expect_equal(const Result& a, const Result& b, const std::string& what, double tolerance = 1e-5) {
  ASSERT_EQ(a.losses.size(), b.losses.size());
  for (size_t i = 0; i < a.losses.size(); ++i) EXPECT_NEAR(a.losses[i], b.losses[i], tolerance * std::abs(a.losses[i])) << what << ", step " << i + 1;
  EXPECT_LT(gradient_difference(a, b), tolerance) << what;
}

void expect_same_bits(const Result& a, const Result& b, const std::string& what) {
  EXPECT_EQ(a.losses, b.losses) << what;
  for (const auto& [name, g] : a.gradients[0]) EXPECT_EQ(g, b.gradients[0].at(name)) << what << ", " << name;
}

// One step over all documents.
Training whole_epoch(int64_t W, int64_t P) {
  Training run;
  run.shape.N = 6, run.shape.K = 2;  // uneven on four ranks
  run.lengths = kLengths;
  run.W = W, run.P = P, run.steps = 1, run.accumulation = 64;
  return run;
}

struct Point {
  int64_t W, P;
};

class PackedTest : public testing::TestWithParam<Point> {};

TEST_P(PackedTest, PacksEqualTheirDocumentsAlone) {
  static const Result alone = train(whole_epoch(1, 1));
  const auto [W, P] = GetParam();
  for (const char* strategy : {"in_order", "best_fit"}) {
    Training packed = whole_epoch(W, P);
    packed.overrides = {"data.pack_samples=true", fmt::format("data.pack_strategy={}", strategy)};
    expect_equal(alone, train(packed), fmt::format("W {} P {} {}", W, P, strategy));
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, PackedTest, testing::Values(Point{1, 1}, Point{2, 1}, Point{2, 2}, Point{4, 1}, Point{4, 2}, Point{4, 4}), [](const auto& p) { return fmt::format("W{}P{}", p.param.W, p.param.P); });

class LeakTest : public testing::TestWithParam<int64_t> {};

// With only document b trained, the loss and every gradient are b's: with what they are multiplied in lm_head's gradient so are its logits,
// and a row of the embedding's gradient is the gradient at the one output that has that token.
TEST_P(LeakTest, AChangedTokenChangesNoBitOfAnotherDocument) {
  const int64_t P = GetParam();
  Training base;
  base.shape.N = 6, base.shape.K = 2, base.shape.V = 90;
  base.lengths = {9, 14, 5, 20, 16};
  base.W = base.P = P, base.steps = 1, base.distinct = true;
  base.overrides = {"data.pack_samples=true", "data.div_length=16"};
  int64_t token = 0;
  for (int64_t a = 0; a < 5; token += base.lengths[static_cast<size_t>(a++)]) {
    if (a % 2 == 1) continue;  // the first, one in the middle, the last
    for (int64_t b = 0; b < 5; ++b) {
      Training before = base;
      before.trained_documents = {b};
      Training after = before;
      after.changed = token + 2;
      const Result x = train(before), y = train(after);
      ASSERT_GT(x.losses[0], 0);
      if (a == b) EXPECT_NE(x.losses[0], y.losses[0]) << "a document sees itself";
      else expect_same_bits(x, y, fmt::format("P {}: document {} changed, seen by {}", P, a, b));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, LeakTest, testing::Values(1, 2, 4), [](const auto& p) { return fmt::format("P{}", p.param); });

TEST(PackedTest, AFusedPackIsOneDocumentOnAnyMesh) {
  Training one = whole_epoch(1, 1);
  one.overrides = {"data.pack_samples=true", "data.fuse_positions_prob=0.5"};
  const Result fused = train(one);
  Training apart = one;
  apart.overrides.pop_back();
  EXPECT_GT(gradient_difference(fused, train(apart)), 1e-3);
  for (const auto& [W, P] : {Point{2, 2}, Point{4, 2}}) {
    Training other = one;
    other.W = W, other.P = P;
    expect_equal(fused, train(other), fmt::format("W {} P {}", W, P));
  }
}

// Nothing is learned of the token that fills what is left, though it stands there hundreds of times; nor does it stand in the loss.
TEST(PackedTest, PaddingTeachesNothing) {
  Training run;
  run.lengths = {9, 14, 5}, run.shape.V = 64, run.steps = 1, run.distinct = true, run.trained_documents = {0, 1, 2};
  run.overrides = {"data.pack_samples=true"};
  Training padded = run;
  padded.overrides.push_back("data.pad_to=max_length");
  for (const int64_t P : {1, 2, 4}) {
    padded.W = padded.P = P;
    const Result result = train(padded);
    const std::vector<float>& rows = result.gradients[0].at("model.embed_tokens.weight");
    for (int64_t i = 0; i < run.shape.D; ++i) EXPECT_EQ(rows[static_cast<size_t>(i)], 0) << "id 0";
    EXPECT_NE(rows[static_cast<size_t>(run.shape.D)], 0) << "id 1";
    expect_equal(train(run), result, fmt::format("padded, P {}", P));
  }
}

// Also where it is the id that fills up: 0.
TEST(PackedTest, TheValueOfThePadIdChangesNothing) {
  Training run;
  run.lengths = {9, 14, 5}, run.shape.V = 64, run.steps = 1, run.distinct = true, run.trained_documents = {0, 1, 2};
  run.overrides = {"data.pack_samples=true", "data.pad_to=max_length"};
  for (const int64_t P : {1, 2}) {
    run.W = run.P = P, run.config = "{}";
    const Result none = train(run);
    for (const int64_t id : {0, 40, 63}) {
      run.config = fmt::format("{{\"pad_token_id\": {}}}", id);
      const Result with = train(run);
      EXPECT_EQ(none.losses, with.losses) << id << " P " << P;
      EXPECT_EQ(none.gradients, with.gradients) << id << " P " << P;
    }
  }
}

TEST(PackedTest, CutPacksAndTextsTrainAlikeOnAnyMesh) {
  for (const std::vector<std::string>& overrides : {std::vector<std::string>{"data.pack_samples=true", "data.always_max_length=true", "data.overlong=split", "data.max_length=60"}, std::vector<std::string>{"type=causal", "data.max_length=60"},
                                                    std::vector<std::string>{"data.overlong=truncate_left", "data.max_length=20"}}) {
    Training one = whole_epoch(1, 1);
    one.overrides = overrides;
    Training four = whole_epoch(4, 2);
    four.overrides = overrides;
    expect_equal(train(one), train(four), overrides[0]);
  }
}

// All documents make one step, so the loss after an update is that of the next step: also where the update was still to be made.
TEST(EvaluationTest, ItIsTheLossThatTheNextStepBeginsWith) {
  for (const auto& [W, P] : {Point{1, 1}, Point{2, 1}, Point{4, 2}})
    for (const bool packed : {false, true}) {
      Training run = whole_epoch(W, P);
      run.steps = 3, run.evaluates = true;
      run.overrides = {"epochs=4"};
      if (packed) run.overrides.push_back("data.pack_samples=true");
      const Result result = train(run);
      ASSERT_EQ(result.eval_losses.size(), 3u);
      for (size_t i = 0; i < 2; ++i) EXPECT_NEAR(result.eval_losses[i], result.losses[i + 1], 1e-6 * result.losses[i + 1]) << "W " << W << " P " << P << (packed ? ", packed" : "");
      EXPECT_GT(std::abs(result.eval_losses[0] - result.eval_losses[1]), 1e-5) << "the weights have changed";
    }
}

TEST(EvaluationTest, UpdatesThatWaitForTheNextStepAreMadeBefore) {
  Training run = whole_epoch(2, 2);
  run.steps = 3, run.evaluates = true;
  run.overrides = {"epochs=4", "data.pack_samples=true", fmt::format("memory.device={}", device_bytes_for(run, 360 * 1024)), "memory.host=64MiB"};
  testing::internal::CaptureStderr();
  const Result result = train(run);
  ASSERT_NE(testing::internal::GetCapturedStderr().find("updates run under the next step's forward"), std::string::npos);
  for (size_t i = 0; i < 2; ++i) EXPECT_NEAR(result.eval_losses.at(i), result.losses[i + 1], 1e-6 * result.losses[i + 1]);
}

TEST(EvaluationTest, ItChangesNoBitOfTraining) {
  Training run = whole_epoch(2, 2);
  run.steps = 3, run.accumulation = 4;
  Training evaluated = run;
  evaluated.evaluates = true;
  const Result a = train(run), b = train(evaluated);
  EXPECT_EQ(a.losses, b.losses);
  EXPECT_EQ(a.gradients, b.gradients);
}

TEST(EvaluationTest, ASplitIsTheSameOnAnyMesh) {
  Result one;
  for (const auto& [W, P] : {Point{1, 1}, Point{2, 1}, Point{4, 2}}) {
    Training run = whole_epoch(W, P);
    run.steps = 2, run.evaluates = true;
    run.overrides = {"data.train_eval_split=[0.75, 0.25]", "data.pack_samples=true", "epochs=2"};
    const Result result = train(run);
    if (W == 1) one = result;
    expect_equal(one, result, "split");
    for (size_t i = 0; i < 2; ++i) EXPECT_NEAR(result.eval_losses[i], one.eval_losses[i], 1e-6 * one.eval_losses[i]);
    EXPECT_GT(std::abs(result.eval_losses[0] - result.losses[1]), 1e-4) << "other documents";
  }
}

}  // namespace
}  // namespace uly::parity
