#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "base/check.h"
#include "data/batch.h"
#include "data/sampler.h"
#include "data/token_file.h"
#include "plan/plan.h"
#include "token_files.h"

namespace uly::data {
namespace {

// Every sample of the file, each a pack of its own.
Packs unpacked(const TokenFile& file) { return make_packs(file, nullptr, {.max_length = 1000}); }

TEST(SamplerTest, EveryEpochIsAPermutationOfItsOwn) {
  const auto a = permutation(1000, 42, 0), b = permutation(1000, 42, 1), c = permutation(1000, 43, 0);
  EXPECT_EQ(a, permutation(1000, 42, 0));
  EXPECT_NE(a, b);
  EXPECT_NE(a, c);
  EXPECT_EQ(std::set<int64_t>(b.begin(), b.end()).size(), 1000u);
}

TEST(SamplerTest, EverySampleIsSeenOnceAnEpochForAnyMesh) {
  std::vector<int64_t> samples(23);
  std::iota(samples.begin(), samples.end(), 0);
  for (const int64_t replicas : {1, 2, 3})
    for (const int64_t micro_batch : {1, 2})
      for (const int64_t accumulation : {1, 4}) {
        Sampler sampler({.num_samples = 23, .replicas = replicas, .micro_batch_size = micro_batch, .accumulation_steps = accumulation, .seed = 7});
        EXPECT_EQ(sampler.epoch_size(), 23);
        std::vector<int64_t> seen;
        for (int64_t consumed = 0; consumed < 23; consumed += sampler.count(consumed)) {
          EXPECT_EQ(sampler.position(consumed).epoch, 0);
          size_t before = seen.size();
          for (const auto& micro : sampler.window(consumed)) {
            EXPECT_EQ(static_cast<int64_t>(micro.size()), replicas);
            for (const auto& mine : micro) seen.insert(seen.end(), mine.begin(), mine.end());
          }
          EXPECT_EQ(static_cast<int64_t>(seen.size() - before), sampler.count(consumed));
        }
        std::sort(seen.begin(), seen.end());
        EXPECT_EQ(seen, samples);
      }
}

TEST(SamplerTest, AStepHoldsTheSameSamplesOnAnyNumberOfReplicas) {
  const auto step_samples = [&](int64_t replicas, int64_t accumulation) {
    Sampler sampler({.num_samples = 24, .replicas = replicas, .micro_batch_size = 1, .accumulation_steps = accumulation, .seed = 3});
    std::set<int64_t> set;
    for (const auto& micro : sampler.window(8))
      for (const auto& mine : micro) set.insert(mine.begin(), mine.end());
    return set;
  };
  EXPECT_EQ(step_samples(1, 8), step_samples(4, 2));
  EXPECT_EQ(step_samples(1, 8), step_samples(8, 1));
}

// A run that goes on with other ranks, wherever it stopped: what both parts have seen is what one run would have.
TEST(SamplerTest, ARunThatGoesOnWithOtherRanksRepeatsAndSkipsNone) {
  constexpr int64_t kSamples = 61, kEpochs = 3;
  const auto rules = [](int64_t replicas) { return Sampler::Rules{.num_samples = kSamples, .replicas = replicas, .micro_batch_size = 2, .accumulation_steps = 3, .seed = 5}; };
  for (const int64_t before : {1, 2, 4})
    for (const int64_t after : {1, 2, 4})
      for (int64_t steps = 0; steps < 12; ++steps) {
        std::vector<std::vector<int64_t>> order(kEpochs);
        int64_t consumed = 0;
        Sampler first(rules(before)), second(rules(after));
        for (int64_t step = 0; consumed < kEpochs * kSamples; ++step) {
          Sampler& sampler = step < steps ? first : second;
          auto& epoch = order[static_cast<size_t>(sampler.position(consumed).epoch)];
          for (const auto& micro : sampler.window(consumed))
            for (const auto& mine : micro) epoch.insert(epoch.end(), mine.begin(), mine.end());
          consumed += sampler.count(consumed);
        }
        for (int64_t e = 0; e < kEpochs; ++e) ASSERT_EQ(order[static_cast<size_t>(e)], permutation(kSamples, 5, static_cast<uint64_t>(e)));
      }
}

TEST(SamplerTest, StepsAreWhatTheSamplesTook) {
  for (const int64_t accumulation : {1, 2, 4, 30}) {
    Sampler sampler({.num_samples = 23, .replicas = 2, .accumulation_steps = accumulation});
    const int64_t size = sampler.samples_a_step();
    int64_t consumed = 0;
    for (int64_t step = 0; step < 60; ++step, consumed += sampler.count(consumed)) EXPECT_EQ(sampler.steps(consumed, size), step);
    EXPECT_EQ(sampler.steps(23 + 5, 4), 6 + 1) << "an epoch of 6, then one that leaves the 5 that 18 samples take";
  }
}

TEST(SamplerTest, MinStepsRepeatsSamplesWithinAnEpoch) {
  Sampler sampler({.num_samples = 3, .replicas = 2, .accumulation_steps = 2, .min_steps = 5});
  EXPECT_EQ(sampler.epoch_size(), 20);
  std::map<int64_t, int64_t> times;
  for (int64_t consumed = 0; consumed < 20; consumed += sampler.count(consumed))
    for (const auto& micro : sampler.window(consumed))
      for (const auto& mine : micro)
        for (const int64_t i : mine) ++times[i];
  EXPECT_EQ(times, (std::map<int64_t, int64_t>{{0, 7}, {1, 7}, {2, 6}}));
}

TEST(SamplerTest, TheFirstBatchIsTheFirstOfTheFirstEpoch) {
  Sampler sampler({.num_samples = 10, .accumulation_steps = 4, .first_batch_only = true});
  const auto first = sampler.window(0);
  EXPECT_EQ(sampler.count(0), 4);
  for (int64_t consumed = 4; consumed < 40; consumed += sampler.count(consumed)) EXPECT_EQ(sampler.window(consumed), first);
}

TEST(BatchTest, LabelsAreShiftedBeforeTheCutAndNeverCrossADocument) {
  const TokenFile file(write_tokens({{1, 2, 3, 4, 5}, {6, 7, 8}}, {{1, 0, 0, 1, 1}, {1, 1, 1}}));
  const Packs packs = unpacked(file);
  const Batch a = make_batch(file, packs, {0, 1}, 12, 2, 0), b = make_batch(file, packs, {0, 1}, 12, 2, 1);
  EXPECT_EQ(a.ids, (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(b.ids, (std::vector<int64_t>{7, 8, 0, 0, 0, 0}));
  EXPECT_EQ(a.positions, (std::vector<int64_t>{0, 1, 2, 3, 4, 0}));
  EXPECT_EQ(b.positions, (std::vector<int64_t>{1, 2, 0, 1, 2, 3}));
  // Token 6 begins a document: it is nobody's target, though its flag is set; token 7's label comes from the other shard.
  EXPECT_EQ(a.labels, (std::vector<int64_t>{-100, -100, 4, 5, -100, 7}));
  EXPECT_EQ(b.labels, (std::vector<int64_t>{8, -100, -100, -100, -100, -100}));
  EXPECT_EQ(a.document_starts, (std::vector<int64_t>{0, 5, 8, 12}));
  EXPECT_EQ(count_labels(file, packs, {0, 1}, 12, 2, 0), 3);
  EXPECT_EQ(count_labels(file, packs, {0, 1}, 12, 2, 1), 1);
  EXPECT_EQ(a.num_tokens, 8);
  EXPECT_EQ(starts_within_shard(a.document_starts, 12, 2, 0), (std::vector<int64_t>{0, 5, 6}));
  EXPECT_EQ(starts_within_shard(a.document_starts, 12, 2, 1), (std::vector<int64_t>{0, 2, 6}));
}

TEST(BatchTest, AnEmptyMicroBatchIsPaddingWithoutLabels) {
  const TokenFile file(write_tokens({{1}}, {{1}}));
  const Batch batch = make_batch(file, unpacked(file), {}, 4, 4, 3);
  EXPECT_EQ(batch.labels, (std::vector<int64_t>{-100}));
  EXPECT_EQ(batch.document_starts, (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(count_labels(file, unpacked(file), {0}, 4, 1, 0), 0);
}

TEST(TokenFileTest, TokensOutsideTheVocabularyAreRefused) {
  const auto load = [](const std::vector<int32_t>& ids) {
    const TokenFile file(write_tokens({ids}, {std::vector<uint8_t>(ids.size(), 1)}));
    return make_batch(file, unpacked(file), {0}, static_cast<int64_t>(ids.size()), 1, 0);
  };
  EXPECT_THROW(load({1, 100}), UserError);
  EXPECT_THROW(load({-1}), UserError);
  EXPECT_EQ(load({0, 99}).labels[0], 99);
}

TEST(BatchTest, ARankReadsItsOwnTokensAlone) {
  const TokenFile file(write_tokens({{1, 2, 3, 4, 200, 6, 7, 8}}, {std::vector<uint8_t>(8, 1)}));
  const auto load = [&](int64_t p) { return make_batch(file, unpacked(file), {0}, 8, 4, p); };
  EXPECT_EQ(load(0).ids, (std::vector<int64_t>{1, 2}));
  EXPECT_THROW(load(1), UserError);  // its last label is the token that is not there
  EXPECT_THROW(load(2), UserError);
  EXPECT_EQ(load(3).ids, (std::vector<int64_t>{7, 8}));
}

// With min_iterations few samples come several times an epoch: two copies of the longest may meet.
TEST(TokenFileTest, ADigestIsOfEveryTokenAndAFingerprintOfSomeThroughout) {
  std::vector<int32_t> ids(200'000, 7);
  std::vector<uint8_t> trained(ids.size(), 1);
  const std::string path = write_tokens({ids}, {trained});
  const TokenFile before(path), again(write_tokens({ids}, {trained}));
  EXPECT_EQ(again.digest(), before.digest());
  EXPECT_EQ(again.fingerprint(), before.fingerprint());
  ids[40] = 8;  // between two places that are looked at
  const TokenFile one(write_tokens({ids}, {trained}));
  EXPECT_NE(one.digest(), before.digest());
  EXPECT_EQ(one.fingerprint(), before.fingerprint());
  ids[40] = 7, trained[199'999] = 0;
  EXPECT_NE(TokenFile(write_tokens({ids}, {trained})).digest(), before.digest());
  trained[199'999] = 1, ids[0] = 8;
  EXPECT_NE(TokenFile(write_tokens({ids}, {trained})).fingerprint(), before.fingerprint());
}

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
  const Packs packs = make_packs(file, nullptr, {.max_length = 2});
  EXPECT_EQ(packs.size(), 2);
  EXPECT_EQ(packs.dropped.samples, 2);
  EXPECT_EQ(packs.longest, 2);
  EXPECT_EQ(packs.longest_in_file, 4);
  models::Spec spec;
  spec.D = 64, spec.F = 96, spec.N = 4, spec.K = 2, spec.H = 16, spec.V = 100, spec.L = 1, spec.max_positions = 1;
  recipe::Recipe recipe;
  recipe.path = "run.yml", recipe.data.max_length = 2;
  const std::string path = write_tokens({{1, 2, 3}, {4, 5, 6, 7}}, {{0, 0, 0}, {0, 0, 0, 0}});
  try {
    plan::make(recipe, spec, {}, 1, plan::DataFacts{.tokens_path = path});
    FAIL();
  } catch (const UserError& e) {
    EXPECT_STREQ(e.what(), "run.yml: max_length 2 is below every sample: the shortest of 2 has 3 tokens; raise data.max_length");
  }
}

}  // namespace
}  // namespace uly::data
