#include "engine/cuda/attention.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "base/check.h"
#include "engine/cuda/memory.h"
#include "kernels/elementwise.h"
#include "kernels/merge.h"

namespace uly::engine::cuda {
namespace {

using kernels::Matrix;

constexpr int64_t kBf16 = 2;
// A document this long is worth a plan of its own; so is a length that is likely to come again.
constexpr int64_t kAlone = 98304, kAloneMultiple = 2048;
constexpr int64_t kMostSlotHeads = 65535;  // a dimension of a grid

int64_t power_of_two_at_least(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

Matrix at(const Matrix& m, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  Matrix part = m;
  part.data = static_cast<std::byte*>(m.data) + (row * m.stride + column) * bytes_of(m.dtype);
  part.rows = rows, part.columns = columns;
  return part;
}

bool stands_alone(const ops::AttentionSchedule& s, int64_t tokens) {
  return tokens >= kAlone || (tokens >= kAloneMultiple && tokens % kAloneMultiple == 0) || s.backward_in_blocks(tokens);
}

}  // namespace

// The columns of one head span in rows of a document.
struct Attention::View {
  Matrix q, k, v, o, dq, dk, dv, d_o;
  float* lse = nullptr;  // of the document and the span
  int64_t n = 0, kv = 0, H = 0;

  View(const AttentionArgs& a, const ops::HeadSpan& span, int64_t row, int64_t rows) : n(span.n()), kv(span.groups), H(a.heads.H) {
    const int64_t q_at = span.first_query * H, k_at = (a.heads.n + span.first_kv) * H, v_at = (a.heads.n + a.heads.k + span.first_kv) * H;
    q = at(a.qkv, row, q_at, rows, n * H), k = at(a.qkv, row, k_at, rows, kv * H), v = at(a.qkv, row, v_at, rows, kv * H);
    o = at(a.o, row, q_at, rows, n * H);
    if (a.dqkv.data) dq = at(a.dqkv, row, q_at, rows, n * H), dk = at(a.dqkv, row, k_at, rows, kv * H), dv = at(a.dqkv, row, v_at, rows, kv * H);
    if (a.d_o.data) d_o = at(a.d_o, row, q_at, rows, n * H);
  }
  View rows(int64_t query, int64_t queries, int64_t key, int64_t keys) const {
    View w = *this;
    for (Matrix* m : {&w.q, &w.o, &w.dq, &w.d_o})
      if (m->data) *m = at(*m, query, 0, queries, n * H);
    for (Matrix* m : {&w.k, &w.v, &w.dk, &w.dv})
      if (m->data) *m = at(*m, key, 0, keys, kv * H);
    return w;
  }
  SdpaShape shape(Mask mask) const {
    return {.slots = 1, .queries = q.rows, .keys = k.rows, .n = n, .k = kv, .H = H, .q_stride = q.stride, .kv_stride = k.stride, .o_stride = o.stride, .dkv_stride = dk.stride, .dq_stride = dq.stride, .mask = mask};
  }
  SdpaPointers pointers() const {
    SdpaPointers p;
    p.q = q.data, p.k = k.data, p.v = v.data, p.o = o.data, p.lse = lse, p.d_o = d_o.data, p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
    return p;
  }
};

// Cuts pieces off the workspace; what is left is cuDNN's.
class Attention::Workspace {
 public:
  explicit Workspace(const Matrix& m) : at_(static_cast<std::byte*>(m.data)), left_(m.columns) {}
  Matrix matrix(int64_t rows, int64_t columns, Dtype dtype) {
    Matrix m{.data = at_, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns};
    const int64_t bytes = round_up(rows * columns * bytes_of(dtype), 256);
    ULY_CHECK(bytes <= left_, "attention's workspace is large enough");
    at_ += bytes, left_ -= bytes;
    return m;
  }
  void* rest() const { return at_; }
  int64_t left() const { return left_; }

 private:
  std::byte* at_;
  int64_t left_;
};

std::vector<std::byte> Attention::plan(const std::vector<int64_t>& starts, const AttentionArgs& shapes, std::byte* table) {
  const ops::Heads& h = shapes.heads;
  ULY_CHECK(!starts.empty() && starts.back() == shapes.qkv.rows, "document starts end with the sequence");
  calls_.clear();
  std::vector<std::byte> image;
  std::map<int64_t, std::vector<size_t>> by_length;  // bucket -> documents that share calls
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    const int64_t tokens = starts[d + 1] - starts[d];
    if (tokens == 0) continue;
    if (stands_alone(shapes.schedule, tokens)) calls_.push_back({.longest = tokens, .first_row = starts[d], .alone = true});
    else by_length[ops::document_bucket(tokens)].push_back(d);
  }
  const auto append = [&](const auto& values) {
    const size_t from = round_up(static_cast<int64_t>(image.size()), 16), bytes = values.size() * sizeof values[0];
    image.resize(from + bytes);
    std::memcpy(image.data() + from, values.data(), bytes);
    return reinterpret_cast<const std::remove_cvref_t<decltype(values[0])>*>(table + from);
  };
  const int64_t capacity = ops::shared_tokens(shapes.schedule, shapes.qkv.rows);
  for (const auto& [longest, documents] : by_length) {
    int64_t most = std::max<int64_t>(1, std::min(capacity / longest, kMostSlotHeads / std::max<int64_t>(1, h.n)));
    if (shapes.schedule.deterministic) most = std::max<int64_t>(1, std::min(most, std::min(shapes.schedule.backward_queries, capacity) * std::min(shapes.schedule.backward_keys, capacity) / (longest * longest)));
    most = power_of_two_at_least(most + 1) / 2;  // round down
    for (size_t from = 0; from < documents.size(); from += static_cast<size_t>(most)) {
      const size_t count = std::min(documents.size() - from, static_cast<size_t>(most));
      Call call{.slots = std::min(most, power_of_two_at_least(static_cast<int64_t>(count))), .longest = longest};
      std::vector<int64_t> qkv_offsets, o_offsets, lse_offsets;
      std::vector<int32_t> lengths;
      for (int64_t slot = 0; slot <= call.slots; ++slot) {
        const bool used = slot < static_cast<int64_t>(count);
        const size_t d = documents[from + std::min(static_cast<size_t>(slot), count - 1)];
        const int64_t row = used ? starts[d] : starts[d + 1];
        qkv_offsets.push_back(row * shapes.qkv.stride), o_offsets.push_back(row * shapes.o.stride), lse_offsets.push_back(row * h.n);
        if (slot < call.slots) lengths.push_back(used ? static_cast<int32_t>(starts[d + 1] - starts[d]) : 0);
      }
      call.qkv_offsets = append(qkv_offsets), call.o_offsets = append(o_offsets), call.lse_offsets = append(lse_offsets), call.lengths = append(lengths);
      calls_.push_back(call);
    }
  }
  ULY_CHECK(static_cast<int64_t>(image.size()) <= ops::document_table_bytes(shapes.schedule, shapes.qkv.rows), "the table of documents has room");
  return image;
}

// Calls alone(view, call) for documents that stand alone, shared(shape, pointers) for those that share a call; head span
// after head span.
template <typename Alone, typename Shared>
void Attention::for_calls(const AttentionArgs& a, Alone&& alone, Shared&& shared) {
  for (const ops::HeadSpan& span : ops::head_spans(a.heads, a.schedule.kv_heads_at_once))
    for (const Call& c : calls_) {
      View v(a, span, c.first_row, c.alone ? c.longest : a.qkv.rows);
      v.lse = static_cast<float*>(a.lse.data) + c.first_row * a.heads.n + span.first_query * (c.alone ? c.longest : 1);
      if (c.alone) {
        alone(v, c);
        continue;
      }
      SdpaShape shape = v.shape(Mask::kCausal);
      shape.slots = c.slots, shape.queries = shape.keys = c.longest, shape.lse_stride = a.heads.n, shape.ragged = true;
      SdpaPointers p = v.pointers();
      p.q_offsets = p.kv_offsets = c.qkv_offsets, p.o_offsets = c.o_offsets, p.lse_offsets = c.lse_offsets, p.q_lengths = p.kv_lengths = c.lengths;
      shared(shape, p);
    }
}

void Attention::forward(const AttentionArgs& a) {
  for_calls(a, [&](const View& v, const Call& c) { forward_alone(a, v, c); }, [&](const SdpaShape& shape, const SdpaPointers& p) { sdpa_.forward(shape, p, a.workspace.data, a.workspace.columns); });
}

// Block by block of queries: the block itself under the causal mask, then the blocks of keys before it, merged.
void Attention::forward_alone(const AttentionArgs& a, const View& v, const Call& c) {
  const int64_t block = a.schedule.forward_block, tokens = c.longest;
  if (tokens <= block) {
    sdpa_.forward(v.shape(Mask::kCausal), v.pointers(), a.workspace.data, a.workspace.columns);
    return;
  }
  Workspace workspace(a.workspace);
  const Matrix partial = workspace.matrix(block, v.n * v.H, Dtype::kBf16), sum = workspace.matrix(block, v.n * v.H, Dtype::kF32);
  const Matrix partial_lse = workspace.matrix(block, v.n, Dtype::kF32), sum_lse = workspace.matrix(block, v.n, Dtype::kF32);
  const auto lse_of = [&](const Matrix& m, int64_t rows) { return Matrix{.data = m.data, .dtype = Dtype::kF32, .rows = rows, .columns = v.n, .stride = 1}; };
  for (int64_t query = 0; query < tokens; query += block) {
    const int64_t queries = std::min(block, tokens - query);
    View own = v.rows(query, queries, query, queries);
    own.lse = static_cast<float*>(sum_lse.data);
    sdpa_.forward(own.shape(Mask::kCausal), own.pointers(), workspace.rest(), workspace.left());
    if (query == 0) {
      check(cudaMemcpy2DAsync(v.lse, static_cast<size_t>(tokens * 4), sum_lse.data, static_cast<size_t>(queries * 4), static_cast<size_t>(queries * 4), static_cast<size_t>(v.n), cudaMemcpyDeviceToDevice, stream_),
            "copy of the log-sum-exp");
      continue;
    }
    for (int64_t key = 0; key < query; key += block) {
      View earlier = v.rows(query, queries, key, block);
      earlier.o = partial, earlier.lse = static_cast<float*>(partial_lse.data);
      sdpa_.forward(earlier.shape(Mask::kFull), earlier.pointers(), workspace.rest(), workspace.left());
      const bool first = key == 0, last = key + block == query;
      const Matrix rows_sum = at(sum, 0, 0, queries, v.n * v.H);
      Matrix final_lse = lse_of(sum_lse, queries);
      if (last) final_lse.data = v.lse + query;
      kernels::merge({.y = last ? own.o : rows_sum, .lse = final_lse, .a = first ? own.o : rows_sum, .a_lse = lse_of(sum_lse, queries), .b = at(partial, 0, 0, queries, v.n * v.H), .b_lse = lse_of(partial_lse, queries),
                      .head_size = v.H, .lse_column_stride = last ? tokens : queries, .a_lse_column_stride = queries, .b_lse_column_stride = queries},
                     stream_);
    }
  }
}

void Attention::backward(const AttentionArgs& a) {
  for_calls(a, [&](const View& v, const Call& c) { backward_alone(a, v, c); },
            [&](SdpaShape shape, const SdpaPointers& p) {
              shape.deterministic = a.schedule.deterministic;
              sdpa_.backward(shape, p, a.workspace.data, a.workspace.columns);
            });
}

void Attention::backward_alone(const AttentionArgs& a, const View& v, const Call& c) {
  if (a.schedule.backward_in_blocks(c.longest)) return backward_blocks(a, v, c);
  SdpaShape shape = v.shape(Mask::kCausal);
  shape.deterministic = a.schedule.deterministic;
  sdpa_.backward(shape, v.pointers(), a.workspace.data, a.workspace.columns);
}

// For each block of queries: the blocks of keys before it, what lies between the last of them and the queries, and the
// queries' own keys under the causal mask. Each call gives gradients in bf16, which are summed in fp32, in this order. Of
// very long documents ops::summed_keys at a time. cuDNN refuses one query with one key: a last query that is alone in its
// block takes its own key together with those before.
void Attention::backward_blocks(const AttentionArgs& a, const View& v, const Call& c) {
  const int64_t most_queries = a.schedule.backward_queries, most_keys = a.schedule.backward_keys, tokens = c.longest, NH = v.n * v.H, KH = v.kv * v.H;
  const int64_t summed = ops::summed_keys(a.schedule, KH, tokens);
  ULY_CHECK(most_keys % most_queries == 0, "blocks of the backward fit into each other");
  Workspace workspace(a.workspace);
  const Matrix dq = workspace.matrix(most_queries, NH, Dtype::kBf16), dq_sum = workspace.matrix(most_queries, NH, Dtype::kF32);
  const Matrix dk = workspace.matrix(most_keys, KH, Dtype::kBf16), dv = workspace.matrix(most_keys, KH, Dtype::kBf16);
  const Matrix dk_sum = workspace.matrix(summed, KH, Dtype::kF32), dv_sum = workspace.matrix(summed, KH, Dtype::kF32);
  const Matrix lse = workspace.matrix(most_queries, v.n, Dtype::kF32);
  for (int64_t begin = 0, end = 0; begin < tokens; begin = end) {
    end = std::min(tokens, begin + summed);
    if (tokens - end == 1 && summed > most_queries) end -= most_queries;
    for (int64_t query = begin; query < tokens; query += most_queries) {
      const int64_t queries = std::min(most_queries, tokens - query);
      const Matrix rows_sum = at(dq_sum, 0, 0, queries, NH), rows = v.rows(query, queries, 0, 0).dq;
      check(cudaMemcpy2DAsync(lse.data, static_cast<size_t>(queries * 4), v.lse + query, static_cast<size_t>(tokens * 4), static_cast<size_t>(queries * 4), static_cast<size_t>(v.n), cudaMemcpyDeviceToDevice, stream_),
            "copy of the log-sum-exp");
      if (begin > 0) kernels::copy({rows_sum, rows}, stream_);  // what earlier keys gave
      const auto block = [&](int64_t key, int64_t keys, Mask mask) {
        View part = v.rows(query, queries, key, keys);
        part.lse = static_cast<float*>(lse.data);
        part.dq = at(dq, 0, 0, queries, NH), part.dk = at(dk, 0, 0, keys, KH), part.dv = at(dv, 0, 0, keys, KH);
        SdpaShape shape = part.shape(mask);
        shape.deterministic = a.schedule.deterministic;
        sdpa_.backward(shape, part.pointers(), workspace.rest(), workspace.left());
        // Keys before the queries have sums already; the queries' own keys see them first.
        const int64_t begun = std::clamp<int64_t>(query - key, 0, keys);
        const auto gather = [&](const Matrix& sum, const Matrix& x) {
          if (begun > 0) kernels::add({at(sum, key - begin, 0, begun, KH), at(x, 0, 0, begun, KH)}, stream_);
          if (begun < keys) kernels::copy({at(sum, key - begin + begun, 0, keys - begun, KH), at(x, begun, 0, keys - begun, KH)}, stream_);
        };
        if (key == 0) kernels::copy({rows_sum, part.dq}, stream_);
        else kernels::add({rows_sum, part.dq}, stream_);
        gather(dk_sum, part.dk);
        gather(dv_sum, part.dv);
      };
      const bool alone = queries == 1 && begin < query && query < end;
      const int64_t before = alone ? query + 1 : std::min(query, end);
      for (int64_t key = begin, keys = 0; key < before; key += keys) {
        keys = std::min(most_keys, before - key);
        if (alone && before - key - keys == 1) --keys;
        block(key, keys, Mask::kFull);
      }
      if (query < end && !alone) block(query, queries, Mask::kCausal);
      kernels::copy({rows, rows_sum}, stream_);
    }
    const View keys = v.rows(0, 0, begin, end - begin);
    kernels::copy({keys.dk, at(dk_sum, 0, 0, end - begin, KH)}, stream_);
    kernels::copy({keys.dv, at(dv_sum, 0, 0, end - begin, KH)}, stream_);
  }
}

}  // namespace uly::engine::cuda
