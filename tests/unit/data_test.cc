#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <set>

#include "base/check.h"
#include "base/safetensors.h"
#include "data/batch.h"
#include "data/sampler.h"
#include "data/token_file.h"
#include "plan/plan.h"

namespace uly::data {
namespace {

std::string write_tokens(const std::vector<std::vector<int32_t>>& documents, const std::vector<std::vector<uint8_t>>& trained, int64_t vocabulary = 100) {
  const std::string path = std::filesystem::temp_directory_path() / fmt::format("data_test_{}_{}.safetensors", getpid(), documents.size());
  std::vector<int32_t> ids;
  std::vector<uint8_t> flags;
  std::vector<int64_t> starts{0};
  for (size_t d = 0; d < documents.size(); ++d) {
    ids.insert(ids.end(), documents[d].begin(), documents[d].end());
    flags.insert(flags.end(), trained[d].begin(), trained[d].end());
    starts.push_back(static_cast<int64_t>(ids.size()));
  }
  const int64_t T = static_cast<int64_t>(ids.size()), n = static_cast<int64_t>(starts.size());
  SafetensorsWriter writer(path, {{"ids", Dtype::kI32, {T}}, {"trained", Dtype::kU8, {T}}, {"starts", Dtype::kI64, {n}}},
                           {{"format", "ulysses-tokens-1"}, {"vocabulary", std::to_string(vocabulary)}});
  writer.append(ids.data(), T * 4);
  writer.append(flags.data(), T);
  writer.append(starts.data(), n * 8);
  writer.finish();
  return path;
}

TEST(SamplerTest, EveryEpochIsAPermutationOfItsOwn) {
  const auto a = permutation(1000, 42, 0), b = permutation(1000, 42, 1), c = permutation(1000, 43, 0);
  EXPECT_EQ(a, permutation(1000, 42, 0));
  EXPECT_NE(a, b);
  EXPECT_NE(a, c);
  EXPECT_EQ(std::set<int64_t>(b.begin(), b.end()).size(), 1000u);
}

TEST(SamplerTest, EverySampleIsSeenOnceAnEpochForAnyMesh) {
  std::vector<int64_t> samples(23);
  std::iota(samples.begin(), samples.end(), 100);
  for (const int64_t replicas : {1, 2, 3})
    for (const int64_t micro_batch : {1, 2})
      for (const int64_t accumulation : {1, 4}) {
        Sampler sampler(samples, {.replicas = replicas, .micro_batch_size = micro_batch, .accumulation_steps = accumulation, .seed = 7});
        std::vector<int64_t> seen;
        for (int64_t step = 0; step < sampler.steps_per_epoch(); ++step)
          for (const auto& micro : sampler.window(0, step)) {
            EXPECT_EQ(static_cast<int64_t>(micro.size()), replicas);
            for (const auto& mine : micro) seen.insert(seen.end(), mine.begin(), mine.end());
          }
        std::sort(seen.begin(), seen.end());
        EXPECT_EQ(seen, samples);
      }
}

TEST(SamplerTest, AStepHoldsTheSameSamplesOnAnyNumberOfReplicas) {
  std::vector<int64_t> samples(24);
  std::iota(samples.begin(), samples.end(), 0);
  const auto step_samples = [&](int64_t replicas, int64_t accumulation) {
    Sampler sampler(samples, {.replicas = replicas, .micro_batch_size = 1, .accumulation_steps = accumulation, .seed = 3});
    std::set<int64_t> set;
    for (const auto& micro : sampler.window(0, 1))
      for (const auto& mine : micro) set.insert(mine.begin(), mine.end());
    return set;
  };
  EXPECT_EQ(step_samples(1, 8), step_samples(4, 2));
  EXPECT_EQ(step_samples(1, 8), step_samples(8, 1));
}

TEST(BatchTest, LabelsAreShiftedBeforeTheCutAndNeverCrossADocument) {
  const TokenFile file(write_tokens({{1, 2, 3, 4, 5}, {6, 7, 8}}, {{1, 0, 0, 1, 1}, {1, 1, 1}}));
  const Batch a = make_batch(file, {0, 1}, 12, 2, 0), b = make_batch(file, {0, 1}, 12, 2, 1);
  EXPECT_EQ(a.ids, (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(b.ids, (std::vector<int64_t>{7, 8, 0, 0, 0, 0}));
  EXPECT_EQ(a.positions, (std::vector<int64_t>{0, 1, 2, 3, 4, 0}));
  EXPECT_EQ(b.positions, (std::vector<int64_t>{1, 2, 0, 1, 2, 3}));
  // Token 6 begins a document: it is nobody's target, though its flag is set; token 7's label comes from the other shard.
  EXPECT_EQ(a.labels, (std::vector<int64_t>{-100, -100, 4, 5, -100, 7}));
  EXPECT_EQ(b.labels, (std::vector<int64_t>{8, -100, -100, -100, -100, -100}));
  EXPECT_EQ(a.document_starts, (std::vector<int64_t>{0, 5, 8, 12}));
  EXPECT_EQ(a.num_trained, 4);
  EXPECT_EQ(a.num_tokens, 8);
  EXPECT_EQ(starts_within_shard(a.document_starts, 12, 2, 0), (std::vector<int64_t>{0, 5, 6}));
  EXPECT_EQ(starts_within_shard(a.document_starts, 12, 2, 1), (std::vector<int64_t>{0, 2, 6}));
}

TEST(BatchTest, AnEmptyMicroBatchIsPaddingWithoutLabels) {
  const TokenFile file(write_tokens({{1}}, {{1}}));
  const Batch batch = make_batch(file, {}, 4, 4, 3);
  EXPECT_EQ(batch.labels, (std::vector<int64_t>{-100}));
  EXPECT_EQ(batch.document_starts, (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(make_batch(file, {0}, 4, 1, 0).num_trained, 0);
}

TEST(TokenFileTest, TokensOutsideTheVocabularyAreRefused) {
  EXPECT_THROW(TokenFile(write_tokens({{1, 100}}, {{0, 1}})), UserError);
  EXPECT_THROW(TokenFile(write_tokens({{-1}}, {{0}})), UserError);
}

// With min_iterations few samples come several times an epoch: two copies of the longest may meet.
TEST(TokenFileTest, ThePlanKnowsThatASampleMayMeetItself) {
  const std::vector<std::vector<int32_t>> documents{std::vector<int32_t>(10, 1), std::vector<int32_t>(4, 1), std::vector<int32_t>(4, 1)};
  const std::string path = write_tokens(documents, {std::vector<uint8_t>(10, 1), std::vector<uint8_t>(4, 1), std::vector<uint8_t>(4, 1)});
  models::Spec spec;
  spec.D = 64, spec.F = 96, spec.N = 4, spec.K = 2, spec.H = 16, spec.V = 100, spec.L = 1;
  recipe::Recipe recipe;
  recipe.data.max_length = 16, recipe.data.div_length = 1, recipe.micro_batch_size = 2;
  const auto planned = [&] { return plan::make(recipe, spec, {}, 1, plan::DataFacts{.tokens_path = path}).planned_length; };
  EXPECT_EQ(planned(), 14);
  recipe.min_iterations = 3;  // six samples: each twice
  EXPECT_EQ(planned(), 20);
}

TEST(TokenFileTest, SamplesBeyondMaxLengthAreDroppedAndCounted) {
  const TokenFile file(write_tokens({{1, 2, 3}, {4}, {5, 6}, {7, 8, 9, 10}}, {{0, 0, 0}, {0}, {0, 0}, {0, 0, 0, 0}}));
  const Selection s = select(file, 2, true, "run.yml:3");
  EXPECT_EQ(s.samples, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(s.num_dropped, 2);
  EXPECT_EQ(s.longest, 2);
  EXPECT_EQ(s.longest_in_file, 4);
  EXPECT_EQ(select(file, 2, false, "").samples.size(), 4u);
  try {
    select(file, 0, true, "run.yml:3");
    FAIL();
  } catch (const UserError& e) {
    EXPECT_STREQ(e.what(), "run.yml:3: max_length 0 is below every sample: the shortest of 4 has 1 tokens; raise data.max_length");
  }
}

}  // namespace
}  // namespace uly::data
