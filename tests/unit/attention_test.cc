// What the plan promises of attention on a GPU: head spans, buckets of lengths, bounded workspace.
#include "ops/attention.h"

#include <gtest/gtest.h>

#include "plan/plan.h"

namespace uly::ops {
namespace {

TEST(HeadSpansTest, CoverEveryHeadOnceWithEquallyManyQueriesAKey) {
  for (const Heads& h : {Heads{.n = 32, .k = 8, .H = 128, .G = 4}, Heads{.n = 7, .k = 3, .H = 64, .G = 3, .first_head = 2}, Heads{.n = 5, .k = 5, .H = 64, .G = 1}, Heads{.n = 3, .k = 1, .H = 96, .G = 8, .first_head = 8}})
    for (const int64_t most : {int64_t{1}, int64_t{2}, INT64_MAX}) {
      int64_t query = 0;
      for (const HeadSpan& s : head_spans(h, most)) {
        EXPECT_EQ(s.first_query, query);
        EXPECT_LE(s.groups, most);
        EXPECT_EQ(s.first_kv, (h.first_head + query) / h.G - h.first_head / h.G);
        for (int64_t i = 0; i < s.n(); ++i) EXPECT_EQ((h.first_head + query + i) / h.G - h.first_head / h.G, s.first_kv + i / s.queries);
        query += s.n();
      }
      EXPECT_EQ(query, h.n);
    }
}

TEST(DocumentBucketTest, HoldsTheDocumentWithAtMostAHalfMore) {
  for (int64_t tokens = 1; tokens < 300000; tokens += tokens < 3000 ? 1 : 997) {
    const int64_t bucket = document_bucket(tokens);
    ASSERT_GE(bucket, tokens);
    ASSERT_LE(bucket, std::max<int64_t>(128, tokens <= 32768 ? tokens * 3 / 2 : tokens + 8191));
  }
}

recipe::Recipe bf16_recipe(bool deterministic) {
  recipe::Recipe r;
  r.model.dtype = Dtype::kBf16;
  r.deterministic = deterministic;
  return r;
}

models::Spec shape(int64_t N, int64_t K, int64_t H) {
  models::Spec s;
  s.D = N * H, s.F = 3 * s.D, s.N = N, s.K = K, s.H = H, s.V = 128256, s.L = 1;
  return s;
}

TEST(AttentionWorkspaceTest, StaysUnderSixGiBAtAnyLength) {
  plan::Machine machine;
  machine.cuda = true, machine.gpu_major = 9;
  for (const bool deterministic : {false, true})
    for (const models::Spec& spec : {shape(32, 8, 128), shape(64, 8, 128), shape(32, 32, 128), shape(16, 1, 128), shape(64, 1, 128), shape(32, 8, 64), shape(16, 4, 256)})
      for (int64_t S = 1024; S <= int64_t{1} << 24; S *= 4) {
        plan::Plan p;
        p.planned_length = S;
        plan::choose(p, bf16_recipe(deterministic), spec, machine, 1);
        const Heads heads{.n = spec.N, .k = spec.K, .H = spec.H, .G = spec.N / spec.K};
        EXPECT_LE(attention_workspace_bytes(p.options.attention, heads, S), int64_t{6} << 30) << S;
        EXPECT_LE(attention_grad_workspace_bytes(p.options.attention, heads, S), int64_t{6} << 30) << S << " tokens, heads " << spec.N << ":" << spec.K << " of " << spec.H << (deterministic ? ", deterministic" : "");
      }
}

// As engine/cuda/attention.cc cuts them: slots x longest, with the gradient of the queries in fp32, those of keys and values
// for every query head in bf16 and a number a row; in a fixed order besides what is quadratic in the longest.
TEST(AttentionWorkspaceTest, HoldsEveryCallThatDocumentsShare) {
  plan::Machine machine;
  machine.cuda = true, machine.gpu_major = 9;
  for (const bool deterministic : {false, true})
    for (const models::Spec& spec : {shape(32, 8, 128), shape(64, 8, 128), shape(32, 32, 128), shape(16, 1, 128), shape(32, 8, 64)})
      for (int64_t S = 1024; S <= int64_t{1} << 24; S *= 2) {
        plan::Plan p;
        p.planned_length = S;
        plan::choose(p, bf16_recipe(deterministic), spec, machine, 1);
        const AttentionSchedule& s = p.options.attention;
        const Heads heads{.n = spec.N, .k = spec.K, .H = spec.H, .G = spec.N / spec.K};
        const int64_t n = heads.G * std::min(heads.k, s.kv_heads_at_once), tokens = shared_tokens(s, S);
        const int64_t ordered = deterministic ? 2 * n * std::min(document_bucket(S), s.backward_queries) * std::min(document_bucket(S), s.backward_keys) : 0;
        EXPECT_GE(attention_grad_workspace_bytes(s, heads, S), tokens * n * (spec.H * 8 + 4) + ordered) << S << (deterministic ? ", deterministic" : "");
        const int64_t alone = s.backward_queries > 0 ? std::min({S, s.backward_queries, s.backward_keys}) : S;  // longer ones go in blocks
        EXPECT_GE(tokens, alone);
      }
}

TEST(AttentionWorkspaceTest, TheCpuNeedsNone) {
  const Heads heads{.n = 32, .k = 8, .H = 128, .G = 4};
  EXPECT_EQ(attention_workspace_bytes({}, heads, 1 << 20), 0);
  EXPECT_EQ(attention_grad_workspace_bytes({}, heads, 1 << 20), 0);
  EXPECT_EQ(document_table_bytes({}, 1 << 20), 0);
}

TEST(AttentionScheduleTest, WhatTheCpusAttentionAllocatesIsPriced) {
  const Heads heads{.n = 32, .k = 8, .H = 128, .G = 4}, alone{.n = 8, .k = 8, .H = 128, .G = 1};
  const int64_t S = 4096;
  EXPECT_EQ(attention_besides_bytes({}, alone, S, Dtype::kF32), 4 * S * 8 * 128 * 4);              // the gradient that comes in, and of q, k and v
  EXPECT_EQ(attention_besides_bytes({}, heads, S, Dtype::kF32), 4 * S * 32 * 128 * 4 + S * 8 * 128 * 4);  // and a sum over groups
  EXPECT_EQ(attention_besides_bytes({}, heads, S, Dtype::kBf16), 4 * S * 32 * 128 * 2 + S * 32 * 128 * 4 + S * 8 * 128 * 4);
  plan::Machine machine;
  machine.memory_bytes = int64_t{64} << 30, machine.cores = 2;
  plan::Plan shorter, longer;
  shorter.max_length = shorter.planned_length = 8192, longer.max_length = longer.planned_length = 16384;
  recipe::Recipe recipe;
  recipe.model.dtype = Dtype::kF32;
  plan::choose(shorter, recipe, shape(32, 8, 128), machine, 1);
  plan::choose(longer, recipe, shape(32, 8, 128), machine, 1);
  EXPECT_EQ(longer.besides_bytes - shorter.besides_bytes, attention_besides_bytes({}, heads, 8192, Dtype::kF32));
}

TEST(AttentionScheduleTest, OlderGpusGetFlashAttention) {
  plan::Machine machine;
  machine.cuda = true, machine.gpu_major = 8;
  plan::Plan p;
  p.planned_length = 4096;
  plan::choose(p, bf16_recipe(false), shape(32, 8, 128), machine, 1);
  EXPECT_EQ(p.options.attention.backend, AttentionBackend::kFlash);
}

TEST(AttentionScheduleTest, WhatFlashAttentionAllocatesIsPriced) {
  plan::Machine machine;
  machine.cuda = true, machine.gpu_major = 8;
  const models::Spec spec = shape(32, 8, 128);
  plan::Plan flash, cudnn;
  flash.planned_length = cudnn.planned_length = 65536;
  plan::choose(flash, bf16_recipe(false), spec, machine, 1);
  machine.gpu_major = 9;
  plan::choose(cudnn, bf16_recipe(false), spec, machine, 1);
  EXPECT_GT(flash.besides_bytes - cudnn.besides_bytes, int64_t{65536} * 32 * 128 * 10);  // fp32 for queries, bf16 for q, k and v
}

}  // namespace
}  // namespace uly::ops
