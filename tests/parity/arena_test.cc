// The arena that a step uses is the one that was priced.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "comm/world.h"
#include "engine/make.h"
#include "plan/plan.h"
#include "step/decoder.h"

namespace uly::parity {
namespace {

models::Spec tiny() {
  models::Spec s;
  s.D = 64, s.F = 96, s.N = 6, s.K = 2, s.H = 16, s.V = 500, s.L = 3;
  s.qk_norm = true;
  return s;
}

class ArenaTest : public testing::TestWithParam<step::Keep> {};

TEST_P(ArenaTest, MeasuredPeakEqualsThePricedOne) {
  const step::Model model(tiny());
  step::Options o;
  o.s = 700;
  o.dtype = Dtype::kF32;
  o.mlp_tile = 256, o.loss_tile = 192;
  o.keep.assign(3, {.level = GetParam()});
  const plan::Price price = plan::price_step(model, o);

  comm::World world = std::move(comm::World::threads(1)[0]);
  const std::unique_ptr<comm::Group> sequence = world.subgroup({0}, "sequence");
  const std::unique_ptr<engine::Engine> made = engine::make_cpu_engine(world.all(), *sequence, {});
  engine::Engine& engine = *made;
  engine.begin_run(price.run_places);
  const step::States states = step::make_states(engine, model.units, o);
  const models::RopeTable rope = models::rope_table(model.spec, o.s);
  engine::BatchData batch{.ids = std::vector<int64_t>(700, 3), .labels = std::vector<int64_t>(700, 5), .positions = {}, .document_starts = {0, 300, 700}, .scale = 1.0 / 700, .inverse_frequencies = rope.inverse_frequencies};
  for (int64_t i = 0; i < 700; ++i) batch.positions.push_back(i < 300 ? i : i - 300);
  engine.begin_step(price.step_places, batch, 0);
  step::micro_step(engine, model, o, states, {});

  EXPECT_EQ(engine.peak_alive_bytes(), price.of(ops::Tier::kDevice).peak_bytes);
  EXPECT_EQ(engine.peak_placed_bytes(), price.step_places.of(ops::Tier::kDevice));
  const int64_t touched = engine.touched_step_bytes();
  EXPECT_GT(touched, price.step_places.of(ops::Tier::kDevice) * 9 / 10);
  EXPECT_LE(touched, (price.step_places.of(ops::Tier::kDevice) + (2 << 20)) / (2 << 20) * (2 << 20)) << "whole huge pages";
}

// Gradients of one micro-batch, of all units, with so much kept.
std::vector<std::vector<float>> gradients(step::Keep keep) {
  const step::Model model(tiny());
  step::Options o;
  o.s = 70;
  o.dtype = Dtype::kF32;
  o.mlp_tile = 32, o.loss_tile = 24;
  o.keep.assign(3, {.level = keep});
  const plan::Price price = plan::price_step(model, o);
  comm::World world = std::move(comm::World::threads(1)[0]);
  const std::unique_ptr<comm::Group> sequence = world.subgroup({0}, "sequence");
  const std::unique_ptr<engine::Engine> engine = engine::make_cpu_engine(world.all(), *sequence, {});
  engine->begin_run(price.run_places);
  const step::States states = step::make_states(*engine, model.units, o);
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 0.3f);
  for (const step::UnitState& unit : states.units) {
    std::vector<float> weights(static_cast<size_t>(unit.weight.columns));
    for (float& x : weights) x = normal(random);
    engine->write(unit.weight, weights.data());
    const std::vector<float> stale(static_cast<size_t>(unit.gradient.columns), NAN);  // the first micro-batch writes
    engine->write(unit.gradient, stale.data());
  }
  engine::BatchData batch{.ids = {}, .labels = {}, .positions = {}, .document_starts = {0, 30, 70}, .scale = 1.0 / 70, .inverse_frequencies = models::rope_table(model.spec, o.s).inverse_frequencies};
  for (int64_t i = 0; i < 70; ++i) batch.ids.push_back(i * 7 % 500), batch.labels.push_back(i * 11 % 500), batch.positions.push_back(i < 30 ? i : i - 30);
  step::begin(*engine, states);
  engine->begin_step(price.step_places, batch, 0);
  step::micro_step(*engine, model, o, states, {});
  std::vector<std::vector<float>> all;
  for (const step::UnitState& unit : states.units) {
    all.emplace_back(static_cast<size_t>(unit.gradient.columns));
    engine->read(all.back().data(), unit.gradient);
  }
  return all;
}

TEST(KeptTest, WhatIsKeptChangesNoBit) {
  const auto least = gradients(step::Keep::kInput);
  float largest = 0;
  for (const auto& unit : least)
    for (const float x : unit) largest = std::max(largest, std::abs(x));
  EXPECT_GT(largest, 1e-3f);
  for (const step::Keep keep : {step::Keep::kProjections, step::Keep::kGateUp, step::Keep::kEverything}) EXPECT_EQ(gradients(keep), least) << static_cast<int>(keep);
}

INSTANTIATE_TEST_SUITE_P(Kept, ArenaTest, testing::Values(step::Keep::kInput, step::Keep::kProjections, step::Keep::kGateUp, step::Keep::kEverything));

}  // namespace
}  // namespace uly::parity
