// A rehearsal has the buffers and copies of a training step, and of its arithmetic the first tile.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <random>

#include "comm/world.h"
#include "engine/make.h"
#include "plan/plan.h"
#include "step/decoder.h"

namespace uly::parity {
namespace {

using ops::Tier;

constexpr int64_t kTokens = 700, kRows = engine::Engine::kRehearsedRows, kDocument = engine::Engine::kRehearsedDocument;

models::Spec tiny() {
  models::Spec s;
  s.D = 64, s.F = 96, s.N = 6, s.K = 2, s.H = 16, s.V = 500, s.L = 3;
  s.qk_norm = true;
  return s;
}

// One rank on the CPU.
struct Rank {
  comm::World world = std::move(comm::World::threads(1)[0]);
  std::unique_ptr<comm::Group> sequence = world.subgroup({0}, "sequence");
  std::unique_ptr<engine::Engine> engine;
  explicit Rank(bool rehearsal) : engine(engine::make_cpu_engine(world.all(), *sequence, {.disk_folders = {std::filesystem::temp_directory_path()}, .rehearsal = rehearsal})) {}
};

engine::BatchData batch_of(const models::Spec& spec, std::vector<int64_t> starts) {
  engine::BatchData b{.ids = {}, .labels = {}, .positions = {}, .document_starts = std::move(starts), .scale = 1.0 / kTokens, .inverse_frequencies = models::rope_table(spec, kTokens).inverse_frequencies};
  for (int64_t i = 0; i < kTokens; ++i) b.ids.push_back(i * 7 % spec.V), b.labels.push_back(i * 11 % spec.V), b.positions.push_back(i);
  return b;
}

std::vector<float> noise(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = std::normal_distribution<float>(0, 1)(random);
  return x;
}

// --- which arithmetic

// What linear maps and attention write where everything was NaN before: their results, one after the other.
std::vector<std::vector<float>> results(bool rehearsal, std::vector<int64_t> starts) {
  constexpr int64_t kI = 20, kO = 30, kHeads = 3, kH = 16;
  const ops::Heads heads{.n = kHeads, .k = 1, .H = kH, .G = kHeads};
  std::vector<std::vector<float>> out;
  const auto program = [&](ops::Ops& ops, engine::Engine* engine) {
    unsigned seed = 0;
    const auto make = [&](int64_t rows, int64_t columns, bool result = false) {
      const ops::Buffer b = ops.make(rows, columns, Dtype::kF32, ops::Kind::kActivations, "x", ops::Life::kStep, Tier::kDevice);
      if (engine) engine->write(b, (result ? std::vector<float>(static_cast<size_t>(b.elements()), NAN) : noise(b.elements(), ++seed)).data());
      return b;
    };
    const auto note = [&](const ops::Buffer& b) {
      if (!engine) return;
      out.emplace_back(static_cast<size_t>(b.elements()));
      engine->read(out.back().data(), b);
    };
    const ops::Buffer x = make(kTokens, kI), w = make(kO, kI), r = make(kTokens, kO), dy = make(kTokens, kO);
    const ops::Buffer y = make(kTokens, kO, true), sum = make(kTokens, kO, true), dx = make(kTokens, kI, true), dw = make(kO, kI, true);
    ops.linear(y, x, w), note(y);
    ops.linear_add(sum, x, w, r), note(sum);
    ops.linear_dx(dx, dy, w), note(dx);
    ops.linear_dw(dw, dy, x, false), note(dw);
    const ops::Buffer qkv = make(kTokens, (kHeads + 2) * kH), d_o = make(kTokens, kHeads * kH);
    const ops::Buffer o = make(kTokens, kHeads * kH, true), lse = make(kTokens, kHeads, true), dqkv = make(kTokens, (kHeads + 2) * kH, true);
    ops.attention(o, lse, qkv, {}, heads, {}), note(o), note(lse);
    ops.attention_grad(dqkv, d_o, qkv, o, lse, {}, heads, {}), note(dqkv);
  };
  plan::Priced priced({1, 1}, kTokens, 0);
  program(priced, nullptr);
  Rank rank(rehearsal);
  const ops::Places places = priced.price().step_places;
  rank.engine->begin_step(places, batch_of(tiny(), std::move(starts)), 0);
  program(*rank.engine, rank.engine.get());
  return out;
}

TEST(RehearsalTest, ComputesTheFirstTileAndEmptiesTheRest) {
  const auto whole = results(false, {0, 500, kTokens}), rehearsed = results(true, {0, 500, kTokens});
  ASSERT_EQ(whole.size(), 7u);
  for (const size_t i : {0u, 1u, 2u, 4u, 5u, 6u}) {  // a row a token
    SCOPED_TRACE(i);
    const size_t columns = whole[i].size() / static_cast<size_t>(kTokens), rows = static_cast<size_t>(i < 4 ? kRows : kDocument);
    // Gradients of a document that ends earlier are others, its results are not.
    const size_t compared = i == 6 ? 0 : rows * columns;
    for (size_t j = 0; j < compared; ++j) ASSERT_NEAR(rehearsed[i][j], whole[i][j], 1e-4) << j;
    for (size_t j = 0; j < rows * columns; ++j) ASSERT_TRUE(std::isfinite(rehearsed[i][j])) << j;
    for (size_t j = 1; j <= columns; ++j) ASSERT_NE(rehearsed[i][rows * columns - j], 0) << "the last row";
    for (size_t j = rows * columns; j < whole[i].size(); ++j) ASSERT_EQ(rehearsed[i][j], 0) << j;
    EXPECT_NE(whole[i][rows * columns], 0);
  }
  for (const float x : rehearsed[3]) EXPECT_TRUE(std::isfinite(x) && x != 0);
  EXPECT_NE(rehearsed[3], whole[3]);
}

TEST(RehearsalTest, AShortFirstDocumentIsTakenWhole) {
  const auto rehearsed = results(true, {0, 100, kTokens});
  EXPECT_NE(rehearsed[4][100 * 48 - 1], 0);
  EXPECT_EQ(rehearsed[4][100 * 48], 0);
}

TEST(RehearsalTest, OfTilesTheFirstIsComputed) {
  std::vector<std::vector<float>> tiles;
  const auto program = [&](ops::Ops& ops, engine::Engine* engine) {
    const auto make = [&](int64_t rows, int64_t columns, unsigned seed) {
      const ops::Buffer b = ops.make(rows, columns, Dtype::kF32, ops::Kind::kActivations, "x", ops::Life::kStep, Tier::kDevice);
      if (engine) engine->write(b, noise(b.elements(), seed).data());
      return b;
    };
    const ops::Buffer x = make(50, 20, 1), w = make(30, 20, 2), other = make(30, 20, 3), y = make(50, 30, 4), dw = make(30, 20, 5);
    const auto note = [&](const ops::Buffer& b) {
      if (!engine) return;
      tiles.emplace_back(static_cast<size_t>(b.elements()));
      engine->read(tiles.back().data(), b);
    };
    for (const ops::Buffer& matrix : {w, w, other}) ops.linear(y, x, matrix), note(y);
    ops.mark("another layer", 1);
    ops.linear(y, x, w), note(y);
    for (const bool add : {false, true}) ops.linear_dw(dw, y, x, add), note(dw);
  };
  plan::Priced priced({1, 1}, kTokens, 0);
  program(priced, nullptr);
  Rank rank(true);
  const ops::Places places = priced.price().step_places;
  rank.engine->begin_step(places, batch_of(tiny(), {0, kTokens}), 0);
  program(*rank.engine, rank.engine.get());
  const std::vector<float> nothing(tiles[0].size());
  EXPECT_NE(tiles[0], nothing);
  EXPECT_EQ(tiles[1], nothing);
  EXPECT_NE(tiles[2], nothing);
  EXPECT_EQ(tiles[3], tiles[0]);
  EXPECT_EQ(tiles[5], tiles[4]) << "of a gradient, what is there stays";
}

// --- which bytes

// What the system has given to each tier after two steps.
std::array<int64_t, ops::kNumTiers> held(bool rehearsal, const step::Options& o) {
  const step::Model model(tiny());
  Rank rank(rehearsal);
  engine::Engine& engine = *rank.engine;
  engine.begin_run(plan::price_step(model, o).run_places);
  const step::States states = step::make_states(engine, model.units, o);
  const std::vector<float> zeros(1 << 20);
  for (const step::UnitState& u : states.units)
    for (const ops::Buffer& b : {u.weight, u.m, u.v}) engine.write(b, zeros.data());
  const bool deferred = o.defers_updates();
  const plan::Price without = plan::price_micro_step(model, o, {}), with = plan::price_micro_step(model, o, {.update = deferred});
  engine.reserve_step(plan::price_step(model, o).step_places);
  for (const int64_t step : {1, 2}) {
    const bool update = deferred && step == 2;
    step::begin(engine, states);
    engine.begin_step((update ? with : without).step_places, batch_of(model.spec, {0, 300, kTokens}), 0);
    step::micro_step(engine, model, o, states, {.update = update});
    step::finish_gradients(engine, o, states);
    engine.set_update({.learning_rate = 1e-3, .step = step});
    if (!deferred) step::update(engine, model, o, states);
  }
  engine.finish();
  return engine.held_bytes();
}

TEST(RehearsalTest, TakesTheBytesOfAStepInEveryTier) {
  for (const step::Keep level : {step::Keep::kInput, step::Keep::kEverything})
    for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kDisk}) {
      SCOPED_TRACE(fmt::format("level {}, {}", static_cast<int>(level), ops::name_of(tier)));
      step::Options o;
      o.s = kTokens;
      o.dtype = Dtype::kF32;
      o.mlp_tile = 256, o.loss_tile = 192;
      o.keep.assign(3, {.level = level, .input_tier = tier, .output_tier = tier});
      o.tiers.assign(5, {.optimizer = tier, .gradient = tier == Tier::kHost ? tier : Tier::kDevice, .update_on_host = tier == Tier::kHost});
      const auto trained = held(false, o), rehearsed = held(true, o);
      EXPECT_EQ(rehearsed, trained);
      const plan::Price price = plan::price_step(step::Model(tiny()), o);
      for (const Tier t : {Tier::kDevice, Tier::kHost, Tier::kDisk}) EXPECT_NEAR(static_cast<double>(rehearsed[static_cast<size_t>(t)]), static_cast<double>(price.total_bytes(t)), static_cast<double>(price.total_bytes(t)) / 50 + 8192) << ops::name_of(t);
      EXPECT_EQ(rehearsed[1] > 0, tier == Tier::kHost);
      EXPECT_EQ(rehearsed[2] > 0, tier == Tier::kDisk);
    }
}

}  // namespace
}  // namespace uly::parity
