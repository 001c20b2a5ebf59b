#include "data/pack.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "base/check.h"
#include "data/batch.h"
#include "data/random.h"
#include "plan/plan.h"
#include "token_files.h"

namespace uly::data {
namespace {

using recipe::Overlong;
using recipe::PackStrategy;

std::vector<int64_t> ragged(size_t count, uint64_t seed, int64_t most) {
  std::vector<int64_t> lengths;
  for (size_t i = 0; i < count; ++i) lengths.push_back(static_cast<int64_t>(hash(seed, i) % static_cast<uint64_t>(most)));  // some are empty
  return lengths;
}

// How often each token of the file is in a pack.
std::vector<int> times_packed(const TokenFile& file, const Packs& packs) {
  std::vector<int> times(static_cast<size_t>(file.start(file.num_samples())));
  for (int64_t i = 0; i < packs.size(); ++i)
    for (const Piece& p : packs.pieces(i))
      for (int64_t t = p.first; t < p.first + p.count; ++t) ++times[static_cast<size_t>(t)];
  return times;
}

void expect_consistent(const Packs& packs) {
  int64_t tokens = 0, longest = 0;
  for (int64_t i = 0; i < packs.size(); ++i) {
    int64_t sum = 0;
    for (const Piece& p : packs.pieces(i)) {
      EXPECT_GT(p.count, 0);
      sum += p.count;
    }
    EXPECT_EQ(sum, packs.tokens(i));
    EXPECT_GT(sum, 0);
    tokens += sum, longest = std::max(longest, sum);
  }
  EXPECT_EQ(tokens, packs.num_tokens);
  EXPECT_EQ(longest, packs.longest);
}

TEST(PackTest, EveryTokenIsPackedOnceAndNoPackIsLongerThanMaxLength) {
  for (const int64_t most : {1, 7, 40, 64, 100, 129, 1000})
    for (const auto& [strategy, exactly] : {std::pair(PackStrategy::kInOrder, false), std::pair(PackStrategy::kBestFit, false), std::pair(PackStrategy::kInOrder, true)}) {
      const TokenFile file(write_lengths(ragged(300, static_cast<uint64_t>(most), 130)));
      const Packs packs = make_packs(file, nullptr, {.max_length = most, .overlong = Overlong::kSplit, .pack = true, .strategy = strategy, .always_max_length = exactly});
      expect_consistent(packs);
      for (const int times : times_packed(file, packs)) ASSERT_EQ(times, 1);
      EXPECT_LE(packs.longest, most);
      if (exactly)
        for (int64_t i = 0; i + 1 < packs.size(); ++i) EXPECT_EQ(packs.tokens(i), most);
      else
        EXPECT_EQ(packs.num_cut, 0);
    }
}

TEST(PackTest, BestFitWastesNextToNothingWhereDocumentsAreShort) {
  std::vector<int64_t> lengths = ragged(20000, 3, 900);
  for (size_t i = 0; i < lengths.size(); i += 50) lengths[i] = 1 + static_cast<int64_t>(hash(4, i) % 9999);
  const TokenFile file(write_lengths(lengths));
  const auto fill = [&](PackStrategy strategy) {
    const Packs packs = make_packs(file, nullptr, {.max_length = 10000, .pack = true, .strategy = strategy});
    return static_cast<double>(packs.num_tokens) / static_cast<double>(packs.size() * 10000);
  };
  EXPECT_GT(fill(PackStrategy::kBestFit), 0.995);
  EXPECT_LT(fill(PackStrategy::kInOrder), 0.99);
}

TEST(PackTest, BestFitTakesTheFullestPackThatHasRoom) {
  // 70, 60 and 50 begin packs; 35 does not fit beside 70 and leaves less beside 60 than beside 50; 30 then fills 70.
  const TokenFile file(write_lengths({60, 35, 70, 50, 30}));
  const Packs packs = make_packs(file, nullptr, {.max_length = 100, .pack = true, .strategy = PackStrategy::kBestFit});
  std::multiset<int64_t> tokens;
  for (int64_t i = 0; i < packs.size(); ++i) tokens.insert(packs.tokens(i));
  EXPECT_EQ(tokens, (std::multiset<int64_t>{50, 95, 100}));
}

TEST(PackTest, WhatIsTooLongIsDroppedCutSplitOrKept) {
  const TokenFile file(write_lengths({3, 10, 4}));
  const auto pieces = [&](Overlong overlong, Packs& packs) {
    packs = make_packs(file, nullptr, {.max_length = 4, .overlong = overlong});
    std::vector<Piece> all;
    for (int64_t i = 0; i < packs.size(); ++i) all.insert(all.end(), packs.pieces(i).begin(), packs.pieces(i).end());
    return all;
  };
  Packs packs;
  EXPECT_EQ(pieces(Overlong::kDrop, packs), (std::vector<Piece>{{0, 3}, {13, 4}}));
  EXPECT_EQ(packs.dropped.samples, 1);
  EXPECT_EQ(packs.dropped.tokens, 10);
  EXPECT_EQ(packs.longest_in_file, 10);
  EXPECT_EQ(pieces(Overlong::kTruncateRight, packs), (std::vector<Piece>{{0, 3}, {3, 4}, {13, 4}}));
  EXPECT_EQ(packs.truncated.tokens, 6);
  EXPECT_EQ(pieces(Overlong::kTruncateLeft, packs), (std::vector<Piece>{{0, 3}, {9, 4}, {13, 4}}));
  EXPECT_EQ(packs.truncated.samples, 1);
  EXPECT_EQ(pieces(Overlong::kSplit, packs), (std::vector<Piece>{{0, 3}, {3, 4}, {7, 4}, {11, 2}, {13, 4}}));
  EXPECT_EQ(packs.split.tokens, 10);
  EXPECT_EQ(pieces(Overlong::kKeep, packs), (std::vector<Piece>{{0, 3}, {3, 10}, {13, 4}}));
  EXPECT_EQ(packs.longest, 10);
}

TEST(PackTest, ASampleThatIsKeptWholeHasAPackOfItsOwn) {
  const TokenFile file(write_lengths({3, 10, 4, 3, 200}));
  for (const PackStrategy strategy : {PackStrategy::kInOrder, PackStrategy::kBestFit}) {
    const Packs packs = make_packs(file, nullptr, {.max_length = 8, .overlong = Overlong::kKeep, .pack = true, .strategy = strategy});
    for (int64_t i = 0; i < packs.size(); ++i)
      if (packs.tokens(i) > 8) {
        EXPECT_EQ(packs.pieces(i).size(), 1u);
      }
    EXPECT_EQ(packs.longest, 200);
    EXPECT_EQ(packs.num_tokens, 220);
  }
}

// 25 tokens in packs of 10: two full ones, and 5 that are counted.
TEST(PackTest, DropLastLeavesOutWhatFillsNoPackAndCountsIt) {
  const TokenFile file(write_lengths({12, 3, 7, 3}));
  const PackRules rules{.max_length = 10, .overlong = Overlong::kSplit, .pack = true, .always_max_length = true, .drop_last = true};
  const Packs packs = make_packs(file, nullptr, rules);
  EXPECT_EQ(packs.size(), 2);
  EXPECT_EQ(packs.num_tokens, 20);
  EXPECT_EQ(packs.left_out.tokens, 5);
  PackRules too_long = rules;
  too_long.max_length = 26;
  EXPECT_EQ(make_packs(file, nullptr, too_long).size(), 0);
  // A pack that is full stays, be it the last.
  PackRules whole = rules;
  whole.max_length = 25;
  EXPECT_EQ(make_packs(file, nullptr, whole).size(), 1);
}

TEST(PackTest, ASmallDataSetIsRepeatedUpToMaxLength) {
  const TokenFile file(write_lengths({12, 3, 7}));
  const Packs packs = make_packs(file, nullptr, {.max_length = 60, .pack = true, .repeat = true});
  EXPECT_EQ(packs.size(), 1);
  EXPECT_EQ(packs.num_tokens, 22 * 2 + 12 + 3);
  EXPECT_EQ(packs.repeated.samples, 5);
  EXPECT_EQ(make_packs(file, nullptr, {.max_length = 22, .pack = true, .repeat = true}).repeated.samples, 0);
}

TEST(PackTest, WhichPacksAreFusedDependsOnSeedAndPackAlone) {
  const TokenFile file(write_lengths(std::vector<int64_t>(2000, 5)));
  const auto packs = [&](double prob, uint64_t seed = 42) { return make_packs(file, nullptr, {.max_length = 10, .pack = true, .fuse_prob = prob, .seed = seed}); };
  const Packs half = packs(0.5), again = packs(0.5), more = packs(0.75), other = packs(0.5, 7);
  EXPECT_NEAR(static_cast<double>(half.num_fused), 500, 80);
  int64_t differ = 0;
  for (int64_t i = 0; i < half.size(); ++i) {
    EXPECT_EQ(half.fused(i), again.fused(i));
    EXPECT_LE(half.fused(i), more.fused(i));  // more are added to the same
    differ += half.fused(i) != other.fused(i);
    EXPECT_EQ(half.squared_lengths(i), half.fused(i) ? 100 : 50);
  }
  EXPECT_GT(differ, 300);
  EXPECT_EQ(packs(0).num_fused, 0);
  EXPECT_EQ(packs(1).num_fused, 1000);
  EXPECT_EQ(packs(1).longest_document, 10);
}

TEST(PackTest, AFusedPackIsOneDocumentWhoseTargetsStayWithinTheirSamples) {
  const TokenFile file(write_tokens({{1, 2, 3}, {4, 5}}, {{1, 1, 1}, {1, 1}}));
  const Packs apart = make_packs(file, nullptr, {.max_length = 5, .pack = true}), fused = make_packs(file, nullptr, {.max_length = 5, .pack = true, .fuse_prob = 1});
  const Batch a = make_batch(file, apart, {0}, 6, 1, 0), f = make_batch(file, fused, {0}, 6, 1, 0);
  EXPECT_EQ(a.ids, f.ids);
  EXPECT_EQ(a.labels, f.labels);
  EXPECT_EQ(std::count(a.labels.begin(), a.labels.end(), kNoLabel), 3);
  EXPECT_EQ(a.document_starts.size(), 4u);
  EXPECT_EQ(f.document_starts, (std::vector<int64_t>{0, 5, 6}));
  EXPECT_EQ(f.positions, (std::vector<int64_t>{0, 1, 2, 3, 4, 0}));
  EXPECT_EQ(f.longest_document, 5);
}

TEST(PackTest, ARestBeginsAsADocumentOfItsOwn) {
  const TokenFile file(write_tokens({{1, 2, 3, 4, 5}}, {{1, 1, 1, 1, 1}}));
  const Packs packs = make_packs(file, nullptr, {.max_length = 3, .overlong = Overlong::kSplit});
  const Batch rest = make_batch(file, packs, {1}, 2, 1, 0);
  EXPECT_EQ(rest.positions, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(rest.labels, (std::vector<int64_t>{5, kNoLabel}));
  EXPECT_EQ(count_labels(file, packs, {0, 1}, 5, 1, 0), 3);  // 2, 3 and 5: nobody has seen what comes before 4
}

TEST(PackTest, ShardsCountTheLabelsThatTheyHave) {
  const TokenFile file(write_lengths(ragged(40, 9, 20)));
  const Packs packs = make_packs(file, nullptr, {.max_length = 50, .pack = true});
  std::vector<int64_t> all(static_cast<size_t>(packs.size()));
  std::iota(all.begin(), all.end(), 0);
  const int64_t S = (packs.num_tokens + 23) / 12 * 12;
  const int64_t whole = count_labels(file, packs, all, S, 1, 0);
  for (const int64_t P : {2, 3, 4, 12}) {
    int64_t sum = 0;
    for (int64_t p = 0; p < P; ++p) {
      const Batch batch = make_batch(file, packs, all, S, P, p);
      const int64_t mine = count_labels(file, packs, all, S, P, p);
      EXPECT_EQ(mine, static_cast<int64_t>(batch.labels.size()) - std::count(batch.labels.begin(), batch.labels.end(), kNoLabel));
      sum += mine;
    }
    EXPECT_EQ(sum, whole);
  }
}

TEST(SplitTest, NoSampleIsOnBothSidesAndTheCountIsExact) {
  for (const auto& [n, share, wanted] : {std::tuple(1000, 0.1, 100), std::tuple(7, 0.5, 4), std::tuple(3, 0.01, 0), std::tuple(5, 1.0, 5)}) {
    const Split split = split_samples(n, share, 42);
    EXPECT_EQ(static_cast<int64_t>(split.eval.size()), wanted);
    std::vector<int64_t> both = split.train;
    both.insert(both.end(), split.eval.begin(), split.eval.end());
    std::sort(both.begin(), both.end());
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(both[static_cast<size_t>(i)], i);
  }
  EXPECT_NE(split_samples(1000, 0.1, 42).eval, split_samples(1000, 0.1, 43).eval);
}

recipe::Recipe small_recipe() {
  recipe::Recipe r;
  r.data.max_length = 64, r.data.div_length = 1;
  return r;
}

models::Spec small_model() {
  models::Spec spec;
  spec.D = 64, spec.F = 96, spec.N = 4, spec.K = 2, spec.H = 16, spec.V = 100, spec.L = 1;
  return spec;
}

// How often each sample is seen, by its length.
std::map<int64_t, int64_t> seen(const Packs& packs) {
  std::map<int64_t, int64_t> out;
  for (int64_t i = 0; i < packs.size(); ++i)
    for (const Piece& p : packs.pieces(i)) ++out[p.count];
  return out;
}

TEST(WeightTest, EachSampleOfASourceIsSeenAsOftenAsItsWeightSays) {
  // Sources of 4, 3 and 2 samples, told apart by their lengths.
  const TokenFile file(write_lengths({10, 11, 12, 13, 20, 21, 22, 30, 31}, "4,3,2"));
  for (const bool pack : {false, true}) {
    PackRules rules{.max_length = 100, .pack = pack, .weights = {0.5, 2, 1}};
    const Packs packs = make_packs(file, nullptr, rules);
    auto times = seen(packs);
    EXPECT_EQ(times[10] + times[11] + times[12] + times[13], 2);
    EXPECT_LE(std::max({times[10], times[11], times[12], times[13]}), 1);
    for (const int64_t length : {20, 21, 22}) EXPECT_EQ(times[length], 2);
    for (const int64_t length : {30, 31}) EXPECT_EQ(times[length], 1);
    EXPECT_EQ(packs.weighed_again.samples, 3);
    EXPECT_EQ(packs.weighed_again.tokens, 63);
    EXPECT_EQ(packs.weighed_out.samples, 2);
    EXPECT_EQ(seen(make_packs(file, nullptr, rules)), seen(packs)) << "the same for everybody";
    rules.weights = {0, 1.67, 0};
    times = seen(make_packs(file, nullptr, rules));
    EXPECT_EQ(times.size(), 3u);
    EXPECT_EQ(times[20] + times[21] + times[22], 5) << "round(1.67 * 3)";
  }
  // Another seed draws others.
  std::set<std::map<int64_t, int64_t>> drawn;
  for (uint64_t seed = 0; seed < 20; ++seed) drawn.insert(seen(make_packs(file, nullptr, {.max_length = 100, .seed = seed, .weights = std::vector<double>{0.5, 1, 1}})));
  EXPECT_GT(drawn.size(), 2);
}

// A sample that is seen twice stays on its side, and evaluation sees each once.
TEST(WeightTest, SharesToEvaluateOnAreDrawnBeforeWeights) {
  std::vector<int64_t> lengths;
  for (int64_t i = 1; i <= 60; ++i) lengths.push_back(i);
  const std::string path = write_lengths(lengths, "40,20");
  recipe::Recipe r = small_recipe();
  r.data.sources = {{.name_or_path = "a", .weight = 3}, {.name_or_path = "b", .weight = 0.5}};
  r.data.eval_share = 0.3, r.eval_interval = 1;
  const plan::Plan plan = plan::make(r, small_model(), {}, 1, plan::DataFacts{.tokens_path = path});
  const auto train = seen(*plan.train.packs), eval = seen(*plan.eval.packs);
  EXPECT_EQ(eval.size(), 18);
  int64_t halves = 0, of = 0;
  for (int64_t i = 1; i <= 60; ++i) {
    if (eval.contains(i)) {
      EXPECT_EQ(eval.at(i), 1);
      EXPECT_FALSE(train.contains(i)) << i;
    } else if (i <= 40) {
      EXPECT_EQ(train.at(i), 3);
    } else {
      ++of, halves += train.contains(i);
    }
  }
  EXPECT_EQ(halves, std::llround(0.5 * static_cast<double>(of)));
}

// Whatever the ranks are, the same packs; documents and attention's share are priced by them.
TEST(PackTest, ThePlanPacksAlikeForAnyMesh) {
  const std::string path = write_lengths(ragged(500, 11, 40));
  recipe::Recipe r = small_recipe();
  r.data.pack_samples = true, r.data.pack_strategy = PackStrategy::kBestFit;
  const auto plan_for = [&](int64_t W, int64_t P) {
    r.sequence_parallel_size = P;
    return plan::make(r, small_model(), {}, W, plan::DataFacts{.tokens_path = path});
  };
  const plan::Plan one = plan_for(1, 1);
  for (const auto& [W, P] : {std::pair(2, 1), std::pair(2, 2), std::pair(4, 2), std::pair(4, 4)}) {
    const plan::Plan other = plan_for(W, P);
    ASSERT_EQ(other.train.packs->size(), one.train.packs->size());
    for (int64_t i = 0; i < one.train.packs->size(); ++i)
      EXPECT_TRUE(std::equal(one.train.packs->pieces(i).begin(), one.train.packs->pieces(i).end(), other.train.packs->pieces(i).begin(), other.train.packs->pieces(i).end()));
  }
  EXPECT_LE(one.planned_length, 64);
  EXPECT_LT(one.document_share, 0.7);
  EXPECT_GT(one.document_share, 0.2);
  r.data.pack_samples = false;
  const plan::Plan apart = plan_for(1, 1);
  EXPECT_EQ(apart.document_share, 1);
  EXPECT_EQ(apart.price.attention_flops / apart.planned_length / apart.planned_length, one.price.attention_flops / one.planned_length / one.planned_length / one.document_share);
}

TEST(PackTest, NothingLeftIsSaid) {
  const std::string path = write_lengths({5, 6, 7});
  recipe::Recipe r = small_recipe();
  r.data.pack_samples = r.data.always_max_length = r.data.drop_last = true;
  const auto error = [&] {
    try {
      plan::make(r, small_model(), {}, 1, plan::DataFacts{.tokens_path = path});
    } catch (const UserError& e) {
      return std::string(e.what());
    }
    return std::string("none");
  };
  EXPECT_NE(error().find("data.drop_last (): expected texts for a pack of max_length 64 at least, found 18 tokens: lower data.max_length, or give more data"), std::string::npos) << error();
  r.data.drop_last = false;
  EXPECT_EQ(error(), "none");
  r.data.eval_share = 0.1, r.eval_interval = 1;
  EXPECT_NE(error().find("data.train_eval_split (): expected samples on both sides, found 3 to train on and 0 to evaluate on"), std::string::npos) << error();
}

}  // namespace
}  // namespace uly::data
