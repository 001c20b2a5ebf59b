// Causal attention within documents on the CPU: ATen's flash attention, one call a document where this rank's key-value
// heads all have the same number of query heads, else one call a key-value head. Keys and values are never repeated:
// query heads of a group read them through a stride of 0.
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "engine/cpu/cpu_engine.h"

namespace uly::engine {
namespace {

// Views of one document's rows of a matrix as ATen wants them: [groups, queries, rows, H].
struct Views {
  int64_t first_row, rows, H;

  at::Tensor queries(const at::Tensor& x, const ops::HeadSpan& span, int64_t first_column) const {
    return x.narrow(0, first_row, rows).narrow(1, first_column + span.first_query * H, span.groups * span.queries * H).view({rows, span.groups, span.queries, H}).permute({1, 2, 0, 3});
  }
  at::Tensor keys(const at::Tensor& x, const ops::HeadSpan& span, int64_t first_column) const {  // [groups, 1, rows, H]
    return x.narrow(0, first_row, rows).narrow(1, first_column + span.first_kv * H, span.groups * H).view({rows, span.groups, 1, H}).permute({1, 2, 0, 3});
  }
  at::Tensor lse(const at::Tensor& x, const ops::HeadSpan& span) const {  // [groups, queries, rows]
    return x.narrow(0, first_row, rows).narrow(1, span.first_query, span.groups * span.queries).view({rows, span.groups, span.queries}).permute({1, 2, 0});
  }
};

// Calls f(views, span) for every document and span.
template <typename F>
void for_documents(const std::vector<int64_t>& starts, const ops::Heads& h, F&& f) {
  const std::vector<ops::HeadSpan> all = ops::head_spans(h, INT64_MAX);
  for (size_t d = 0; d + 1 < starts.size(); ++d)
    for (const ops::HeadSpan& span : all)
      if (starts[d + 1] > starts[d]) f(Views{starts[d], starts[d + 1] - starts[d], h.H}, span);
}

}  // namespace

void CpuEngine::attention(ops::Buffer o_SnH, ops::Buffer lse_Sn, ops::Buffer qkv_S, ops::Buffer, const ops::Heads& h, const ops::AttentionSchedule&) {
  const at::Tensor qkv = tensor(qkv_S), o = tensor(o_SnH), lse = tensor(lse_Sn);
  const int64_t key_at = h.n * h.H, value_at = (h.n + h.k) * h.H;
  const std::vector<int64_t> starts = documents(qkv_S.rows);
  zero_from(o_SnH, starts.back()), zero_from(lse_Sn, starts.back());
  for_documents(starts, h, [&](const Views& rows, const ops::HeadSpan& span) {
    const at::Tensor q = rows.queries(qkv, span, 0);
    const at::Tensor k = rows.keys(qkv, span, key_at).expand(q.sizes()), v = rows.keys(qkv, span, value_at).expand(q.sizes());
    const auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, /*is_causal=*/true);
    rows.queries(o, span, 0).copy_(out);
    rows.lse(lse, span).copy_(sums);
  });
}

void CpuEngine::attention_grad(ops::Buffer dqkv_S, ops::Buffer do_SnH, ops::Buffer qkv_S, ops::Buffer o_SnH, ops::Buffer lse_Sn, ops::Buffer, const ops::Heads& h, const ops::AttentionSchedule&) {
  const at::Tensor qkv = tensor(qkv_S), o = tensor(o_SnH), d_o = tensor(do_SnH), lse = tensor(lse_Sn), dqkv = tensor(dqkv_S);
  const int64_t key_at = h.n * h.H, value_at = (h.n + h.k) * h.H;
  // Spans of one key-value head write disjoint columns except where uneven spans share none: each local key-value head
  // belongs to exactly one span, so gradients are written, not added.
  const std::vector<int64_t> starts = documents(qkv_S.rows);
  zero_from(dqkv_S, starts.back());
  for_documents(starts, h, [&](const Views& rows, const ops::HeadSpan& span) {
    const at::Tensor q = rows.queries(qkv, span, 0);
    const at::Tensor k = rows.keys(qkv, span, key_at).expand(q.sizes()), v = rows.keys(qkv, span, value_at).expand(q.sizes());
    const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(rows.queries(d_o, span, 0), q, k, v, rows.queries(o, span, 0), rows.lse(lse, span), 0.0, /*is_causal=*/true);
    rows.queries(dqkv, span, 0).copy_(dq);
    at::Tensor dk_out = rows.keys(dqkv, span, key_at), dv_out = rows.keys(dqkv, span, value_at);
    if (span.queries == 1) {
      dk_out.copy_(dk);
      dv_out.copy_(dv);
    } else {
      dk_out.copy_(dk.to(at::kFloat).sum(1, /*keepdim=*/true));
      dv_out.copy_(dv.to(at::kFloat).sum(1, /*keepdim=*/true));
    }
  });
}

}  // namespace uly::engine
