#include <gtest/gtest.h>

#include <random>

#include "plan/plan.h"
#include "step/decoder.h"

namespace uly::plan {
namespace {

models::Spec llama_8b() {
  models::Spec s;
  s.D = 4096, s.F = 14336, s.N = 32, s.K = 8, s.H = 128, s.V = 128256, s.L = 32;
  return s;
}

step::Options resident(const models::Spec& spec, int64_t s, int64_t W = 1, int64_t P = 1) {
  step::Options o;
  o.mesh = {.W = W, .P = P, .rank = 0};
  o.s = s;
  o.mlp_tile = std::min<int64_t>(16384, s);
  o.loss_tile = std::min<int64_t>(8192, s);
  o.keep.assign(static_cast<size_t>(spec.L), {});
  return o;
}

Price price(const models::Spec& spec, const step::Options& o, const Rates& rates = {}) {
  const step::Model model(spec);
  Priced priced({o.mesh.P, o.mesh.W}, o.s, 0, rates);
  const step::States states = step::make_states(priced, model.units, o);
  step::micro_step(priced, model, o, states, {});
  return priced.price();
}

TEST(PlaceTest, NoTwoBuffersThatAreAliveTogetherOverlap) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 20; ++round) {
    std::vector<Lifetime> lives;
    for (int i = 0; i < 200; ++i) {
      const int64_t birth = static_cast<int64_t>(random() % 1000);
      lives.push_back({static_cast<ops::Tier>(random() % 3), static_cast<int64_t>(random() % 100000) + 1, birth, random() % 10 == 0 ? -1 : birth + 1 + static_cast<int64_t>(random() % 50)});
    }
    const Places places = place(lives);
    for (size_t a = 0; a < lives.size(); ++a) {
      EXPECT_LE(places.offset_bytes[a] + lives[a].bytes, places.of(lives[a].tier));
      EXPECT_EQ(places.offset_bytes[a] % ops::place_alignment(lives[a].tier), 0);
      for (size_t b = 0; b < a; ++b) {
        const bool together = lives[a].tier == lives[b].tier && (lives[a].death < 0 || lives[b].birth < lives[a].death) && (lives[b].death < 0 || lives[a].birth < lives[b].death);
        const bool apart = places.offset_bytes[a] + lives[a].bytes <= places.offset_bytes[b] || places.offset_bytes[b] + lives[b].bytes <= places.offset_bytes[a];
        EXPECT_TRUE(!together || apart);
      }
    }
  }
}

TEST(PriceTest, ArithmeticOfAStepIsTheFormula) {
  const models::Spec m = llama_8b();
  const int64_t s = 32768;
  const Price p = price(m, resident(m, s));
  const double D = 4096, F = 14336, S = s, qkv = 6144, V = 128256, L = 32;
  const double layer = 2 * S * (D * qkv + D * D + 3 * F * D), head = 2 * S * D * V;
  // Backward is twice the forward; rebuilt are q, k, v, the output projection and gate | up.
  EXPECT_NEAR(p.gemm_flops, L * (3 * layer + 2 * S * (D * qkv + D * D + 2 * F * D)) + 3 * head, 1e-6 * p.gemm_flops);
  EXPECT_NEAR(p.attention_flops, L * (2.0 + 5.0) * S * S * D, 1e-6 * p.attention_flops);
}

TEST(PriceTest, AttentionOfShortDocumentsIsSlower) {
  const models::Spec m = llama_8b();
  const Rates rates{.attention_forward_flops = 600e12, .attention_backward_flops = 500e12, .attention_half_tokens = 4096};
  const auto seconds = [&](int64_t s, double share) {
    step::Options o = resident(m, s);
    o.attention.document_share = share;
    return price(m, o, rates).busy[0];
  };
  const auto at_full_rate = [](double pairs) { return 32 * 4096 * (2 * pairs / 600e12 + 5 * pairs / 500e12); };
  EXPECT_NEAR(seconds(65536, 1), at_full_rate(65536.0 * 65536) * (1 + 4096.0 / 65536), 1e-9);
  EXPECT_NEAR(seconds(65536, 1.0 / 16), at_full_rate(65536.0 * 65536 / 16) * 2, 1e-9);   // documents of 4,096: half
  EXPECT_NEAR(seconds(65536, 1.0 / 64), at_full_rate(65536.0 * 65536 / 64) * 2, 1e-9);   // of 1,024: no less than half
}

TEST(PriceTest, OnTheCpuExchangesTakeTimeFromCompute) {
  const models::Spec m = llama_8b();
  Rates rates{.gemm_flops = 1e12, .sequence_bytes = 1e9, .gather_bytes = 1e9, .scatter_bytes = 1e9};
  const step::Options o = resident(m, 4096, 2, 2);
  const Price aside = price(m, o, rates);
  rates.shares_cores = true;
  const Price shared = price(m, o, rates);
  const double network = aside.busy[static_cast<size_t>(Stream::kNetwork)];
  EXPECT_GT(network, 0);
  EXPECT_NEAR(shared.busy[0], aside.busy[0] + network, 1e-9 * shared.busy[0]);
  EXPECT_NEAR(shared.seconds, shared.busy[0], 1e-9 * shared.seconds);
  EXPECT_LT(aside.seconds, shared.seconds);
}

TEST(PriceTest, KeepingEverythingRebuildsNothing) {
  const models::Spec m = llama_8b();
  step::Options o = resident(m, 4096);
  const Price rebuilt = price(m, o);
  o.keep.assign(o.keep.size(), {.level = step::Keep::kGateUp});
  const Price kept = price(m, o);
  const double D = 4096, F = 14336, S = 4096, L = 32;
  EXPECT_NEAR(rebuilt.gemm_flops - kept.gemm_flops, L * 2 * S * (D * 6144 + D * D + 2 * F * D), 1e-3 * kept.gemm_flops * 1e-3);
  EXPECT_GT(kept.of(ops::Tier::kDevice).peak_bytes, rebuilt.of(ops::Tier::kDevice).peak_bytes);
}

TEST(PriceTest, PlacesWasteLittle) {
  const models::Spec m = llama_8b();
  for (const int64_t W : {1, 8}) {
    const Price p = price(m, resident(m, 65536, W, W));
    EXPECT_LT(static_cast<double>(p.step_places.of(ops::Tier::kDevice)), 1.005 * static_cast<double>(p.of(ops::Tier::kDevice).peak_bytes));
  }
}

TEST(PriceTest, StatesAreSharded) {
  const models::Spec m = llama_8b();
  const Price one = price(m, resident(m, 1024)), eight = price(m, resident(m, 1024, 8, 8));
  const double parameters = static_cast<double>(models::num_parameters(m));
  EXPECT_NEAR(static_cast<double>(one.of(ops::Tier::kDevice).run_bytes), 18 * parameters, 1e-3 * 18 * parameters);
  EXPECT_NEAR(static_cast<double>(eight.of(ops::Tier::kDevice).run_bytes), 18 * parameters / 8, 1e-3 * 18 * parameters / 8);
  EXPECT_EQ(one.gathered_bytes, 0);
  EXPECT_GT(eight.gathered_bytes, 0);
}

TEST(UlyssesTest, HeadsOfAllRanksAreAllHeadsOnce) {
  for (const auto& [N, K] : std::vector<std::pair<int64_t, int64_t>>{{32, 8}, {28, 4}, {6, 2}, {8, 1}, {64, 8}, {5, 5}})
    for (int64_t P = 1; P <= N; ++P) {
      models::Spec spec;
      spec.N = N, spec.K = K, spec.H = 16;
      int64_t next = 0;
      for (int64_t p = 0; p < P; ++p) {
        const ops::Heads h = step::heads_of_rank(spec, P, p);
        EXPECT_EQ(h.first_head, next);
        EXPECT_GE(h.n, 1);
        next += h.n;
        EXPECT_EQ(h.k, (h.first_head + h.n - 1) / h.G - h.first_head / h.G + 1);
        EXPECT_LE(h.n, (N + P - 1) / P);
      }
      EXPECT_EQ(next, N);
    }
}

// What is kept must fit on the rank with most heads, not on the first.
TEST(ChooseTest, UnevenHeadsFitWhereTheLeastKeptDoes) {
  Machine machine;
  machine.cuda = true, machine.gpu_major = 9, machine.gpu_free_bytes = int64_t{139} << 30;
  recipe::Recipe recipe;
  recipe.model.dtype = Dtype::kBf16, recipe.sequence_parallel_size = 3;
  for (const int64_t length : {150000, 225000, 300000}) {
    Plan plan;
    plan.mesh = {.W = 3, .P = 3, .rank = 0};
    plan.planned_length = length;
    choose(plan, recipe, llama_8b(), machine, 3);
    EXPECT_TRUE(plan.fits) << length;
    EXPECT_LE(total_bytes(plan), plan.room.device_bytes);
  }
}

TEST(OptimizerTest, UpdateRangesCoverEveryElementOnceWithItsTensorsRule) {
  models::Spec spec = llama_8b();
  spec.D = 64, spec.F = 96, spec.N = 4, spec.K = 2, spec.H = 16, spec.V = 97, spec.L = 1, spec.qkv_bias = true, spec.qk_norm = true;
  for (const models::Unit& unit : models::units(spec))
    for (const int64_t W : {1, 3, 8}) {
      const int64_t n = step::shard_elements(unit, W);
      std::vector<int> times(static_cast<size_t>(n * W)), decays(static_cast<size_t>(n * W));
      for (int64_t r = 0; r < W; ++r)
        for (const ops::UpdateRange& range : step::update_ranges(unit, {.W = W, .P = 1, .rank = r}))
          for (int64_t i = range.first; i < range.first + range.count; ++i) ++times.at(static_cast<size_t>(r * n + i)), decays[static_cast<size_t>(r * n + i)] = range.decays;
      EXPECT_TRUE(std::all_of(times.begin(), times.end(), [](int t) { return t == 1; }));
      for (const models::Tensor& t : unit.tensors)
        for (int64_t i = t.offset; i < t.offset + t.elements(); ++i) ASSERT_EQ(decays[static_cast<size_t>(i)] != 0, t.decays) << t.name;
    }
}

}  // namespace
}  // namespace uly::plan
