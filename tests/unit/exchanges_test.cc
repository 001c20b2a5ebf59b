// What ranks exchange by, how fast that is taken to be, and heads in parts where that is shorter.
#include "plan/exchanges.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>

#include "base/check.h"
#include "plan/longest.h"
#include "step/ulysses.h"

namespace uly::plan {
namespace {

constexpr double kGiga = 1e9;
constexpr int64_t kGiB = int64_t{1} << 30;

class ExchangesTest : public testing::Test {
 protected:
  ExchangesTest() { ::unsetenv("ULYSSES_COMM"); }
  ~ExchangesTest() override { ::unsetenv("ULYSSES_COMM"); }

  static Machine gpus(int nccl_version, int64_t ranks_a_gpu = 1) {
    Machine m;
    m.cuda = true, m.gpus = 2, m.nccl_version = nccl_version, m.gpu_ranks = ranks_a_gpu;
    if (nccl_version == 0) m.nccl_why = "libnccl.so.2: cannot open shared object file";
    return m;
  }
};

TEST_F(ExchangesTest, NcclWhereItCanBeElseGlooWithTheReason) {
  EXPECT_TRUE(choose_exchanges(gpus(22809), 2).nccl);
  EXPECT_EQ(choose_exchanges(gpus(22809), 2).words, "NCCL 2.28.9, from GPU to GPU");
  EXPECT_FALSE(choose_exchanges(gpus(0), 2).nccl);
  EXPECT_NE(choose_exchanges(gpus(0), 2).words.find("cannot open shared object file"), std::string::npos);
  EXPECT_FALSE(choose_exchanges(gpus(22809, 2), 4).nccl);
  EXPECT_EQ(choose_exchanges(gpus(22809, 2), 4).words, "Gloo, through host memory, which is slow: 2 ranks share a GPU, which NCCL 2.28.9 refuses and 2.30.0 allows");
  EXPECT_TRUE(choose_exchanges(gpus(23003, 2), 4).nccl);
  EXPECT_FALSE(choose_exchanges(gpus(22809), 1).nccl);
  EXPECT_FALSE(choose_exchanges(Machine{}, 2).nccl);
}

TEST_F(ExchangesTest, TheEnvironmentChooses) {
  ::setenv("ULYSSES_COMM", "gloo", 1);
  EXPECT_FALSE(choose_exchanges(gpus(22809), 2).nccl);
  ::setenv("ULYSSES_COMM", "nccl", 1);
  EXPECT_TRUE(choose_exchanges(gpus(22809), 1).nccl);
  EXPECT_THROW(choose_exchanges(gpus(0), 2), UserError);
  EXPECT_THROW(choose_exchanges(gpus(22809, 2), 4), UserError);
  ::setenv("ULYSSES_COMM", "mpi", 1);
  EXPECT_THROW(choose_exchanges(gpus(22809), 2), UserError);
}

TEST_F(ExchangesTest, RatesFollowFromWhereRanksAre) {
  const Rates node = preset_rates("H100", 12, {.W = 8, .P = 8, .node_ranks = 8});
  EXPECT_EQ(node.sequence_bytes, 350 * kGiga);
  EXPECT_EQ(node.gather_bytes, 350 * kGiga);
  EXPECT_EQ(node.scatter_bytes, 350 * kGiga);
  // Sequences inside nodes; of what a rank scatters 24 of 31 parts leave the node, of what it gathers all comes in once by 8 adapters.
  const Rates four = preset_rates("H100", 12, {.W = 32, .P = 8, .node_ranks = 8});
  EXPECT_EQ(four.sequence_bytes, 350 * kGiga);
  EXPECT_EQ(four.gather_bytes, 350 * kGiga);
  EXPECT_NEAR(four.scatter_bytes, 45 * kGiga * 31 / 24, 1);
  EXPECT_NEAR(preset_rates("H100", 12, {.W = 32, .P = 32, .node_ranks = 8}).sequence_bytes, 45 * kGiga * 31 / 24, 1);
  EXPECT_LT(preset_rates("NVIDIA H100 PCIe", 12, {.W = 2, .P = 2, .node_ranks = 2}).sequence_bytes, 50 * kGiga);
  EXPECT_EQ(preset_rates("H100", 12, {.W = 2, .P = 2, .node_ranks = 2, .gpu_ranks = 2}).sequence_bytes, 175 * kGiga);
  EXPECT_EQ(preset_rates("H100", 12, {.W = 2, .P = 2, .node_ranks = 2, .nccl = false}).sequence_bytes, 2 * kGiga);
}

models::Spec llama_8b(int64_t N = 32, int64_t K = 8) {
  models::Spec s;
  s.name = "8b", s.D = 4096, s.F = 14336, s.N = N, s.K = K, s.H = 128, s.V = 128256, s.L = 32, s.max_positions = 131072;
  return s;
}

Plan chosen(const models::Spec& spec, int64_t P, const std::string& gpu = "H100", std::optional<int64_t> node_gpus = {}) {
  Machine m;
  m.cuda = m.imagined = true, m.gpus = node_gpus.value_or(P), m.gpu_major = 9, m.gpu_name = gpu, m.gpu_free_bytes = 140 * kGiB, m.memory_bytes = 1900 * kGiB, m.cores = 16 * P;
  recipe::Recipe r;
  r.path = "run.yml", r.model.dtype = Dtype::kBf16, r.sequence_parallel_size = P, r.data.max_length = 131072;
  Plan plan = sized(r, spec, m, P, 131072);
  choose_kept(step::Model(spec), plan, question(plan, r, m));
  return plan;
}

TEST_F(ExchangesTest, HeadsGoInPartsWhereThatIsShorter) {
  const auto waited = [](const Plan& p) { return p.price.waited[static_cast<size_t>(Stream::kNetwork)]; };
  for (const std::optional<int64_t> node : {std::optional<int64_t>(), std::optional<int64_t>(1)}) {
    const Plan p = chosen(llama_8b(), 2, "H100", node);
    EXPECT_GT(p.options.exchange_parts, 1);
    step::Options whole = p.options;
    whole.exchange_parts = 1;
    const step::Model model(llama_8b());
    const Price one = price_with_places(model, whole, p.rates.gemm_flops > 0 ? p.rates : preset_rates("H100", 16, {.W = 2, .P = 2, .node_ranks = node.value_or(2)}));
    EXPECT_LT(p.seconds, one.seconds);
    EXPECT_LT(waited(p), waited(Plan{.price = one}) * 0.75) << "what is not hidden";
    EXPECT_NEAR(p.price.exchanged_bytes, one.exchanged_bytes, 1) << "the same is sent";
  }
}

// With one key-value head a rank, or parts that are not alike, there is nothing to split.
TEST_F(ExchangesTest, HeadsStayWholeWhereThereIsNothingToSplit) {
  EXPECT_EQ(chosen(llama_8b(), 8).options.exchange_parts, 1);
  EXPECT_EQ(chosen(llama_8b(28, 4), 8).options.exchange_parts, 1);
  EXPECT_EQ(chosen(llama_8b(), 1).options.exchange_parts, 1);
}

TEST_F(ExchangesTest, PartsHaveEachHeadOnce) {
  for (const auto& [N, K, P] : {std::tuple{32, 8, 2}, {32, 8, 8}, {28, 4, 8}, {10, 10, 4}, {14, 7, 4}, {6, 2, 4}, {4, 1, 4}, {4, 4, 8}})
    for (const int64_t parts : {1, 2, 3, 4}) {
      const models::Spec spec = llama_8b(N, K);
      int64_t next = 0;
      for (int64_t p = 0; p < P; ++p) {
        int64_t keys = 0;
        for (int64_t g = 0; g < parts; ++g) {
          const ops::Heads h = step::heads_of_part(spec, P, p, parts, g);
          if (h.n > 0) {
            EXPECT_EQ(h.first_head, next);
          }
          EXPECT_EQ(h.n == 0, h.k == 0);
          next += h.n, keys += h.k;
        }
        EXPECT_EQ(keys, step::heads_of_rank(spec, P, p).k);
      }
      EXPECT_EQ(next, N);
    }
}

}  // namespace
}  // namespace uly::plan
