// How attention is computed: chosen by the plan, read by pricing (workspace) and by the engine (schedule).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "base/shapes.h"

namespace uly::ops {

// The heads this rank attends with: local query head i is global head first_head + i and belongs to key-value head
// (first_head + i) / G, which is local key-value head (first_head + i) / G - first_head / G.
struct Heads {
  int64_t n = 0, k = 0, H = 0;
  int64_t G = 1;            // query heads per key-value head, N / K
  int64_t first_head = 0;
};

// `groups` key-value heads in a row, each with `queries` query heads; counted locally.
struct HeadSpan {
  int64_t first_query = 0, queries = 0, first_kv = 0, groups = 0;
  int64_t n() const { return queries * groups; }
};

// Cuts heads into spans of at most `most` key-value heads with equally many query heads each. More than one even without
// a limit where a rank's heads begin or end within a group.
std::vector<HeadSpan> head_spans(const Heads& heads, int64_t most);

enum class AttentionBackend : uint8_t { kCpu, kCudnn, kFlash };

struct AttentionSchedule {
  AttentionBackend backend = AttentionBackend::kCpu;
  int64_t kv_heads_at_once = INT64_MAX;  // key-value heads a call, with their query heads
  int64_t forward_block = 0;             // longer documents go in causal blocks of so many tokens, merged by log-sum-exp
  int64_t backward_queries = 0, backward_keys = 0;  // longer documents go in blocks of queries x keys; 0: in one call
  int64_t summed_bytes = int64_t{2} << 30;  // of keys' and values' gradients in fp32, where the backward goes in blocks
  bool deterministic = false;            // fixed order of all sums
  double document_share = 1;             // of the arithmetic of one document of S tokens: what the documents take that are expected. Only priced

  // Whether the backward of a document, or of documents of so many tokens in all, may go in blocks.
  bool backward_in_blocks(int64_t tokens) const { return backward_queries > 0 && tokens > std::min(backward_queries, backward_keys); }
};

// Keys whose gradients are summed in fp32 at a time where the backward goes in blocks, for `columns` columns of keys: a
// multiple of backward_keys within summed_bytes, or all of S. Beyond, the gradient of the queries is rounded to bf16 once for each
// so many keys.
int64_t summed_keys(const AttentionSchedule& schedule, int64_t columns, int64_t S);

// Tokens that a plan for documents of up to `tokens` tokens is made for: few different ones, at most 1/2 more up to 32K,
// beyond to a multiple of 8K.
int64_t document_bucket(int64_t tokens);

// Tokens of a call that documents share, slots times the longest, at most: where the backward goes in blocks, the workspace
// does not grow with the sequence.
int64_t shared_tokens(const AttentionSchedule& schedule, int64_t S);

// Bytes of workspace for heads over documents of S tokens in all, any layout; 0 on the CPU.
int64_t attention_workspace_bytes(const AttentionSchedule& schedule, const Heads& heads, int64_t S);
int64_t attention_grad_workspace_bytes(const AttentionSchedule& schedule, const Heads& heads, int64_t S);

// Bytes that ATen's attention allocates besides its results' buffers: on a GPU over S tokens, about (documents of less than a few
// hundred tokens take more: it rounds each up to 128 tokens), on the CPU over one document of S. 0 for cuDNN.
int64_t attention_besides_bytes(const AttentionSchedule& schedule, const Heads& heads, int64_t S, Dtype dtype);

// Bytes of the table of documents that a sequence of S tokens may need at most on a GPU; 0 on the CPU.
int64_t document_table_bytes(const AttentionSchedule& schedule, int64_t S);

}  // namespace uly::ops
