// Where things lie, and when they travel, changes no bit: each tier and option against everything on the device, with copies
// and updates delayed at random.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <filesystem>
#include <random>
#include <thread>

#include "comm/world.h"
#include "engine/make.h"
#include "kernels/bf16.h"
#include "models/spec.h"
#include "plan/plan.h"
#include "step/decoder.h"

namespace uly::parity {
namespace {

using ops::Tier;

struct Variant {
  std::string name;
  std::function<void(step::Options&)> change;
  std::function<void(step::Options&, int64_t program)> replan = {};  // before each micro-batch and the last update; states stay where they are
};

struct Shape {
  std::string name;
  int64_t W = 1, P = 1;
  bool tied = false, qk_norm = false;
  Dtype dtype = Dtype::kF32;
  int64_t N = 4, K = 2;
  int64_t node = 1;
};

models::Spec spec_of(const Shape& shape) {
  models::Spec m;
  m.L = 5, m.D = 32, m.F = 48, m.N = shape.N, m.K = shape.K, m.H = 16, m.V = 64;
  m.tied_embeddings = shape.tied, m.qk_norm = shape.qk_norm;
  m.norm_eps = 1e-5;
  return m;
}

step::Options options_of(const Shape& shape, int64_t rank) {
  step::Options o;
  o.mesh = {.W = shape.W, .P = shape.P, .rank = rank};
  o.dtype = shape.dtype;
  o.s = 48 / shape.P;
  o.mlp_tile = 16, o.loss_tile = 20;
  o.keep.assign(5, {});
  o.update_piece = 1024;
  return o;
}

// What a rank has after three steps of two micro-batches: losses, norms, its shards of weights, masters and moments.
std::vector<std::vector<uint8_t>> train(const Shape& shape, const Variant& variant, comm::World& world, uint64_t delays) {
  const step::Model model(spec_of(shape));
  step::Options o = options_of(shape, world.rank());
  o.tiers.assign(model.units.size(), {});
  variant.change(o);
  const bool defers = o.defers_updates();
  std::vector<int64_t> peers;
  for (int64_t p = 0; p < o.mesh.P; ++p) peers.push_back(o.mesh.replica() * o.mesh.P + p);
  const auto sequence = world.subgroup(peers, "sequence");
  std::unique_ptr<comm::Group> node;
  if (o.mesh.node > 1) {
    std::vector<int64_t> near;
    for (int64_t i = 0; i < o.mesh.node; ++i) near.push_back(o.mesh.rank / o.mesh.node * o.mesh.node + i);
    node = world.subgroup(near, "node");
  }
  const auto engine = engine::make_cpu_engine(world.all(), *sequence, {.node = node.get(), .disk_folders = {std::filesystem::temp_directory_path()}, .delays = delays});
  engine->begin_run(plan::price_step(model, o).run_places);
  const step::States states = step::make_states(*engine, model.units, o);
  for (size_t u = 0; u < model.units.size(); ++u) {
    const step::UnitState& unit = states.units[u];
    const int64_t n = unit.m.columns;
    std::vector<float> values(static_cast<size_t>(n));
    std::mt19937 random(static_cast<unsigned>(100 * u) + static_cast<unsigned>(world.rank()));
    for (float& x : values) x = std::normal_distribution<float>(0, 0.3f)(random);
    engine->write(unit.master, values.data());
    if (unit.weight.dtype == Dtype::kBf16) {
      std::vector<kernels::Bf16> rounded;
      for (const float x : values) rounded.push_back(kernels::to_bf16(x));
      engine->write(unit.weight, rounded.data());
    } else if (unit.weight.id != unit.master.id) {
      engine->write(unit.weight, values.data());
    }
  }
  std::vector<std::vector<uint8_t>> out;
  const auto note = [&](const ops::Buffer& b) {
    if (!b.exists()) return;
    out.emplace_back(static_cast<size_t>(b.bytes()));
    engine->read(out.back().data(), b);
  };
  bool pending = false;
  int64_t program = 0;
  const auto replanned = [&] {
    step::Options now = o;
    if (variant.replan) variant.replan(now, program++);
    return now;
  };
  for (int64_t step = 1; step <= 3; ++step) {
    step::begin(*engine, states);
    for (int64_t micro = 0; micro < 2; ++micro) {
      engine::BatchData batch{.ids = {}, .labels = {}, .positions = {}, .document_starts = {0, 20, o.S()}, .scale = 1.0 / 96, .inverse_frequencies = models::rope_table(model.spec, o.S()).inverse_frequencies};
      for (int64_t i = 0; i < o.s; ++i) {
        const int64_t at = o.mesh.p() * o.s + i;
        batch.ids.push_back((at * 7 + step * 3 + micro + o.mesh.replica()) % 64), batch.labels.push_back(at * 5 % 64), batch.positions.push_back(at < 20 ? at : at - 20);
      }
      const step::Phase phase{.first = micro == 0, .last = micro == 1, .update = pending};
      const step::Options now = replanned();
      const plan::Price price = plan::price_micro_step(model, now, phase);
      engine->begin_step(price.step_places, batch, 0);
      step::micro_step(*engine, model, now, states, phase);
      pending = false;
    }
    step::finish_gradients(*engine, o, states);
    note(states.loss_total), note(states.norm_total);
    engine->set_update({.learning_rate = 1e-2, .weight_decay = 0.1, .clip = 1.0, .step = step});
    pending = defers;
    if (!defers) step::update(*engine, model, o, states);
  }
  if (pending) {
    const step::Options now = replanned();
    const plan::Price price = plan::price_update(model, now);
    engine->begin_step(price.step_places, {}, 0);
    step::update(*engine, model, now, states);
  }
  for (const step::UnitState& unit : states.units) note(unit.weight), note(unit.m), note(unit.v);
  return out;
}

std::vector<std::vector<std::vector<uint8_t>>> train_all(const Shape& shape, const Variant& variant, uint64_t delays) {
  std::vector<comm::World> worlds = comm::World::threads(shape.W, std::chrono::seconds(60));
  std::vector<std::vector<std::vector<uint8_t>>> results(worlds.size());
  std::vector<std::exception_ptr> failures(worlds.size());
  std::vector<std::thread> ranks;
  for (size_t r = 0; r < worlds.size(); ++r)
    ranks.emplace_back([&, r] {
      try {
        results[r] = train(shape, variant, worlds[r], delays == 0 ? 0 : delays + r);
      } catch (...) {
        failures[r] = std::current_exception();
      }
    });
  for (std::thread& t : ranks) t.join();
  for (const std::exception_ptr& f : failures)
    if (f) std::rethrow_exception(f);
  return results;
}

void all_layers(step::Options& o, const std::function<void(step::LayerKeep&, size_t)>& change) {
  for (size_t l = 0; l < o.keep.size(); ++l) change(o.keep[l], l);
}

void all_units(step::Options& o, step::UnitTiers tiers) { o.tiers.assign(o.tiers.size(), tiers); }

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {"output and input on the host", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t) { k.input_tier = k.output_tier = Tier::kHost; }); }},
      {"output and input on the disk", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t) { k.input_tier = k.output_tier = Tier::kDisk; }); }},
      {"projections and gate and up on host and disk",
       [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.level = step::Keep::kGateUp, k.projections_tier = l % 2 ? Tier::kDisk : Tier::kHost, k.gate_up_tier = l % 2 ? Tier::kHost : Tier::kDisk; }); }},
      {"a mixture of all", [](step::Options& o) {
         o.keep[0].level = step::Keep::kEverything;
         o.keep[1] = {.level = step::Keep::kProjections, .output_tier = Tier::kHost, .projections_tier = Tier::kHost};
         o.keep[2] = {.input = false, .output_tier = Tier::kDisk};
         o.keep[3] = {.input = false, .output = false};
         o.keep[4] = {.level = step::Keep::kGateUp, .input_tier = Tier::kDisk, .gate_up_tier = Tier::kHost};
       }},
      {"inputs of every third layer", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l % 3 == 0; }), o.rebuilt_inputs = 8; }},
      {"inputs of the first layer alone, rebuilt by halves, on the host", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l == 0, k.input_tier = k.output_tier = Tier::kHost; }), o.rebuilt_inputs = 1; }},
      {"attention again in all, rebuilt two at a time", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l == 0, k.output = false; }), o.rebuilt_inputs = 2; }},
      {"lean, inputs on the host and rebuilt", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l % 2 == 0, k.input_tier = Tier::kHost, k.output_tier = l == 1 ? Tier::kDisk : Tier::kDevice; }), o.lean = true, o.rebuilt_tier = Tier::kHost; }},
      {"lean, rebuilt by halves, waiting on the host", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l == 0, k.output = false; }), o.lean = true, o.rebuilt_tier = Tier::kHost; }},
      {"lean, with much kept", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.level = static_cast<step::Keep>(l % 4); }), o.lean = true; }},
      {"optimizer on the host, updated there", [](step::Options& o) { all_units(o, {.optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true}); }},
      {"optimizer on the host, updated on the device", [](step::Options& o) { all_units(o, {.optimizer = Tier::kHost}); }},
      {"optimizer and gradients on the host, updated on the device", [](step::Options& o) { all_units(o, {.optimizer = Tier::kHost, .gradient = Tier::kHost}); }},
      {"optimizer on the disk", [](step::Options& o) { all_units(o, {.optimizer = Tier::kDisk}); }},
      {"all on the host, updated there", [](step::Options& o) { all_units(o, {.weight = Tier::kHost, .optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true}); }},
      {"all on the host, updated on the device", [](step::Options& o) { all_units(o, {.weight = Tier::kHost, .optimizer = Tier::kHost, .gradient = Tier::kHost}); }},
      {"units here and there", [](step::Options& o) {
         o.tiers[1] = {.optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true};
         o.tiers[2] = {.optimizer = Tier::kDisk, .gradient = Tier::kHost};
         o.tiers[3] = {.weight = Tier::kHost};
         o.tiers[4] = {.gradient = Tier::kHost};
         o.tiers[6] = {.optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true};
       }},
  };
  return all;
}

class TiersTest : public testing::TestWithParam<Shape> {};

TEST_P(TiersTest, WhereThingsLieChangesNoBit) {
  const auto resident = train_all(GetParam(), {"resident", [](step::Options&) {}}, 0);
  for (const Variant& variant : variants()) {
    SCOPED_TRACE(variant.name);
    EXPECT_TRUE(train_all(GetParam(), variant, 0) == resident);
    EXPECT_TRUE(train_all(GetParam(), variant, 17) == resident) << "with delays";
  }
}

// What is kept where changes with every micro-batch, with each place of the states.
TEST_P(TiersTest, AnotherPlanForEachMicroBatchChangesNoBit) {
  const auto resident = train_all(GetParam(), {"resident", [](step::Options&) {}}, 0);
  std::vector<const Variant*> states{nullptr}, kept;
  for (const Variant& v : variants()) {
    step::Options o = options_of(GetParam(), 0);
    o.tiers.assign(7, {});
    const std::vector<step::UnitTiers> before = o.tiers;
    v.change(o);
    (o.tiers == before ? kept : states).push_back(&v);
  }
  ASSERT_GE(kept.size(), 8u);
  ASSERT_GE(states.size(), 6u);
  for (size_t at = 0; at < states.size(); ++at) {
    SCOPED_TRACE(states[at] ? states[at]->name : "states on the device");
    const Variant changing{.name = "", .change = [&](step::Options& o) { if (states[at]) states[at]->change(o); }, .replan = [&](step::Options& o, int64_t program) { kept[(static_cast<size_t>(program) * 3 + at) % kept.size()]->change(o); }};
    EXPECT_TRUE(train_all(GetParam(), changing, 0) == resident);
    EXPECT_TRUE(train_all(GetParam(), changing, 23) == resident) << "with delays";
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, TiersTest,
                         testing::Values(Shape{.name = "OneRank"}, Shape{.name = "OneRankTiedBf16", .tied = true, .qk_norm = true, .dtype = Dtype::kBf16}, Shape{.name = "TwoShareASequence", .W = 2, .P = 2},
                                         Shape{.name = "FourTiedInTwoReplicas", .W = 4, .P = 2, .tied = true, .qk_norm = true}),
                         [](const auto& info) { return info.param.name; });

class NodesTest : public testing::TestWithParam<Shape> {};

// With all states on the device, and in every other way; ranks of a sequence in one node or in two.
TEST_P(NodesTest, ACopyOfTheWeightsInEachNodeChangesNoBit) {
  Shape plain = GetParam();
  plain.node = 1;
  const auto one = train_all(plain, {"one copy", [](step::Options&) {}}, 0);
  EXPECT_TRUE(train_all(plain, {"nodes", [&](step::Options& o) { o.mesh.node = GetParam().node; }}, 0) == one);
  for (const Variant& variant : variants()) {
    SCOPED_TRACE(variant.name);
    const Variant nodes{"", [&](step::Options& o) { variant.change(o), o.mesh.node = GetParam().node; }};
    EXPECT_TRUE(train_all(plain, nodes, 31) == one);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, NodesTest,
                         testing::Values(Shape{.name = "TwoNodesOfTwo", .W = 4, .P = 2, .node = 2}, Shape{.name = "SequencesOverTwoNodesTiedBf16", .W = 4, .P = 4, .tied = true, .qk_norm = true, .dtype = Dtype::kBf16, .N = 8, .K = 4, .node = 2}),
                         [](const auto& info) { return info.param.name; });

class ExchangePartsTest : public testing::TestWithParam<Shape> {};

// In as many parts as a rank has key-value heads, or more; where nothing is kept, something, everything; lean; with attention again.
TEST_P(ExchangePartsTest, HeadsInPartsChangeNoBit) {
  const std::vector<Variant> kept = {{"inputs and outputs kept", [](step::Options&) {}},
                                     {"levels of all kinds", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.level = static_cast<step::Keep>(l % 4), k.projections_tier = l % 3 ? Tier::kHost : Tier::kDevice; }); }},
                                     {"attention again, lean", [](step::Options& o) { all_layers(o, [](step::LayerKeep& k, size_t l) { k.input = l == 0, k.output = false; }), o.rebuilt_inputs = 2, o.lean = true, o.rebuilt_tier = Tier::kHost; }}};
  for (const Variant& variant : kept) {
    const auto whole = train_all(GetParam(), variant, 0);
    for (const int64_t parts : {2, 3, 8}) {
      SCOPED_TRACE(fmt::format("{}, {} parts", variant.name, parts));
      const Variant split{"", [&](step::Options& o) { variant.change(o), o.exchange_parts = parts; }};
      EXPECT_TRUE(train_all(GetParam(), split, 23) == whole);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ExchangePartsTest,
                         testing::Values(Shape{.name = "TwoRanksFourOfEight", .W = 2, .P = 2, .N = 16, .K = 8}, Shape{.name = "FourRanksBf16", .W = 4, .P = 4, .tied = true, .qk_norm = true, .dtype = Dtype::kBf16, .N = 16, .K = 8},
                                         Shape{.name = "FourRanksUnevenHeads", .W = 4, .P = 4, .N = 10, .K = 10}, Shape{.name = "FourRanksSharedKeyValueHeads", .W = 4, .P = 4, .qk_norm = true, .N = 14, .K = 7},
                                         Shape{.name = "FourRanksThreeOfWhichShareAHead", .W = 4, .P = 4, .N = 4, .K = 1}, Shape{.name = "TwoReplicasOfTwo", .W = 4, .P = 2, .N = 6, .K = 6}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace uly::parity
