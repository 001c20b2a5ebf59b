#include "ops/attention.h"

namespace uly::ops {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kBf16 = 2, kF32 = 4;

int64_t padded(int64_t bytes) { return round_up(bytes, 256); }

// What cuDNN itself asks for in the backward of `tokens` queries and keys (slots times the longest): the gradient of the
// queries in fp32, those of keys and values for every query head in bf16, and a number a row.
int64_t cudnn_grad_bytes(int64_t n, int64_t H, int64_t queries, int64_t keys) {
  return queries * n * (H * kF32 + kF32) + keys * n * H * 2 * kBf16 + 4 * kMiB;
}

// The widest span's query heads.
HeadSpan widest(const AttentionSchedule& s, const Heads& heads) {
  HeadSpan most;
  for (const HeadSpan& span : head_spans(heads, s.kv_heads_at_once))
    if (span.n() > most.n()) most = span;
  return most;
}

}  // namespace

std::vector<HeadSpan> head_spans(const Heads& h, int64_t most) {
  std::vector<HeadSpan> out;
  for (int64_t i = 0; i < h.n;) {
    const int64_t global = h.first_head + i, kv = global / h.G, count = std::min(h.n - i, (kv + 1) * h.G - global);
    const int64_t local_kv = kv - h.first_head / h.G;
    if (!out.empty() && out.back().queries == count && out.back().groups < most) {
      ++out.back().groups;
    } else {
      out.push_back({.first_query = i, .queries = count, .first_kv = local_kv, .groups = 1});
    }
    i += count;
  }
  return out;
}

int64_t summed_keys(const AttentionSchedule& s, int64_t columns, int64_t S) {
  const int64_t most = s.summed_bytes / (2 * columns * kF32) / s.backward_keys * s.backward_keys;
  return std::min(S, std::max(most, s.backward_keys));
}

int64_t document_bucket(int64_t tokens) {
  if (tokens > 32768) return round_up(tokens, 8192);
  int64_t bucket = 128;
  while (bucket < tokens) bucket = bucket % 3 == 0 ? bucket / 3 * 4 : bucket / 2 * 3;  // 128, 192, 256, 384, ...
  return bucket;
}

int64_t shared_tokens(const AttentionSchedule& s, int64_t S) {
  constexpr int64_t kLeast = 32768;  // enough for every multiprocessor
  return document_bucket(s.backward_in_blocks(S) ? std::min(S, std::max(s.backward_queries, kLeast)) : S);
}

int64_t attention_workspace_bytes(const AttentionSchedule& s, const Heads& heads, int64_t S) {
  if (s.backend != AttentionBackend::kCudnn || heads.n == 0) return 0;
  const HeadSpan span = widest(s, heads);
  int64_t bytes = 4 * kMiB;
  if (S > s.forward_block)  // a block's result in bf16, the sum so far in fp32, both with their log-sum-exp
    bytes += padded(s.forward_block * span.n() * heads.H * kBf16) + padded(s.forward_block * span.n() * heads.H * kF32) + 2 * padded(s.forward_block * span.n() * kF32);
  return bytes;
}

int64_t attention_grad_workspace_bytes(const AttentionSchedule& s, const Heads& heads, int64_t S) {
  if (s.backend != AttentionBackend::kCudnn || heads.n == 0) return 0;
  const HeadSpan span = widest(s, heads);
  const int64_t n = span.n(), H = heads.H;
  if (!s.backward_in_blocks(S)) {
    const int64_t tokens = document_bucket(S), dp = s.deterministic ? 2 * n * tokens * round_up(tokens, 128) : 0;
    return cudnn_grad_bytes(n, H, tokens, tokens) + dp;
  }
  // A block's gradients in bf16; those of the block's queries and of many keys and values in fp32.
  const int64_t queries = s.backward_queries, keys = s.backward_keys, dp = s.deterministic ? 2 * n * queries * keys : 0;
  const int64_t blocks = padded(queries * n * H * kBf16) + padded(queries * n * H * kF32) + 2 * padded(keys * span.groups * H * kBf16) + 2 * padded(summed_keys(s, span.groups * H, S) * span.groups * H * kF32) + padded(queries * n * kF32);
  const int64_t shared = shared_tokens(s, S);
  return std::max(cudnn_grad_bytes(n, H, queries, keys) + blocks, cudnn_grad_bytes(n, H, shared, shared)) + dp;
}

int64_t attention_besides_bytes(const AttentionSchedule& s, const Heads& heads, int64_t S, Dtype dtype) {
  if (s.backend == AttentionBackend::kCudnn) return 0;
  if (s.backend == AttentionBackend::kCpu) {
    // The backward's: the gradient that comes in, contiguous, and those of queries, keys and values for every query head of a span; where
    // query heads share keys, the sum of one of the latter in fp32, and in bf16 an fp32 copy of what is summed.
    int64_t most = 0;
    for (const HeadSpan& span : head_spans(heads, INT64_MAX)) {
      const int64_t sums = span.queries == 1 ? 0 : span.groups * kF32 + (dtype == Dtype::kBf16 ? span.n() * kF32 : 0);
      most = std::max(most, (4 * span.n() * bytes_of(dtype) + sums) * heads.H);
    }
    return S * most;
  }
  // The backward's: gradients of the queries in fp32 and of queries, keys and values in bf16, the latter two for every query
  // head as well, and a number a row; of heads that it does not take, padded copies of all that it reads.
  const int64_t n = heads.n, k = heads.k, H = round_up(heads.H, 8);
  int64_t token = n * (round_up(H, 32) * kF32 + 3 * H * kBf16 + 2 * kF32) + 2 * k * H * kBf16;
  if (heads.H != H) token += (3 * n + 2 * k) * H * kBf16;
  return S * token / 8 * 9;
}

int64_t document_table_bytes(const AttentionSchedule& s, int64_t S) { return s.backend == AttentionBackend::kCpu ? 0 : 64 * S + 65536; }

}  // namespace uly::ops
