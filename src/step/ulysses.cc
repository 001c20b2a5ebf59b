#include "step/ulysses.h"

#include <numeric>

#include "base/shapes.h"

namespace uly::step {
namespace {

int64_t width(const std::vector<ops::Columns>& block) {
  return std::accumulate(block.begin(), block.end(), int64_t{0}, [](int64_t sum, const ops::Columns& c) { return sum + c.count; });
}

std::vector<int64_t> widths(const ops::ColumnBlocks& blocks, int64_t rows) {
  std::vector<int64_t> elements;
  for (const auto& block : blocks) elements.push_back(rows * width(block));
  return elements;
}

int64_t sum(const std::vector<int64_t>& v) { return std::accumulate(v.begin(), v.end(), int64_t{0}); }

}  // namespace

ops::Heads heads_of_rank(const models::Spec& spec, int64_t P, int64_t p) {
  const int64_t first = p * spec.N / P, end = (p + 1) * spec.N / P, G = spec.N / spec.K;
  const int64_t k = first == end ? 0 : (end - 1) / G - first / G + 1;
  return {.n = end - first, .k = k, .H = spec.H, .G = G, .first_head = first};
}

Ulysses::Ulysses(ops::Ops& ops, const models::Spec& spec, const Options& options)
    : ops_(ops),
      options_(options),
      P_(options.exchange_ranks()),
      p_(P_ == 1 ? 0 : options.mesh.p()),
      heads_(heads_of_rank(spec, P_, p_)),
      qkv_columns_(spec.qkv_columns()),
      output_columns_(spec.query_columns()) {
  const int64_t H = spec.H, NH = spec.N * H, KH = spec.K * H;
  for (int64_t r = 0; r < P_; ++r) {
    const ops::Heads h = heads_of_rank(spec, P_, r);
    const int64_t kv = h.first_head / h.G;
    qkv_blocks_.push_back({{h.first_head * H, h.n * H}, {NH + kv * H, h.k * H}, {NH + KH + kv * H, h.k * H}});
    output_blocks_.push_back({{h.first_head * H, h.n * H}});
  }
}

ops::Held Ulysses::to_heads(ops::Buffer x_s, const ops::ColumnBlocks& blocks, const char* what) const {
  const int64_t s = options_.s, mine = width(blocks[p_]);
  const std::vector<int64_t> send_elements = widths(blocks, s), receive_elements(P_, s * mine);
  ops::Held received(ops_, s * P_, mine, x_s.dtype, ops::Kind::kActivations, what);
  ops::Held send(ops_, 1, sum(send_elements), x_s.dtype, ops::Kind::kCommunication, "exchange: packed by rank");
  ops_.pack_columns(send, x_s, blocks);
  ops_.wait(ops_.all_to_all(received, send, ops::Group::kSequence, receive_elements, send_elements));
  return received;
}

ops::Held Ulysses::to_tokens(ops::Held x_S, const ops::ColumnBlocks& blocks, int64_t columns, ops::Kind kind, const char* what) const {
  const int64_t s = options_.s;
  const std::vector<int64_t> receive_elements = widths(blocks, s), send_elements(P_, s * width(blocks[p_]));
  ops::Held received(ops_, 1, sum(receive_elements), (*x_S).dtype, ops::Kind::kCommunication, "exchange: received by rank");
  ops_.wait(ops_.all_to_all(received, x_S, ops::Group::kSequence, receive_elements, send_elements));
  x_S.reset();
  ops::Held x_s(ops_, s, columns, (*received).dtype, kind, what);
  ops_.unpack_columns(x_s, received, blocks);
  return x_s;
}

ops::Held Ulysses::qkv_to_heads(ops::Held qkv_s) const {
  if (alone()) return qkv_s;
  return to_heads(qkv_s, qkv_blocks_, "q, k, v of my heads");
}

ops::Held Ulysses::qkv_grad_to_tokens(ops::Held dqkv_S) const {
  if (alone()) return dqkv_S;
  return to_tokens(std::move(dqkv_S), qkv_blocks_, qkv_columns_, ops::Kind::kActivations, "gradient of q, k, v");
}

ops::Held Ulysses::output_to_tokens(ops::Held o_SnH) const {
  if (alone()) return o_SnH;
  return to_tokens(std::move(o_SnH), output_blocks_, output_columns_, ops::Kind::kSaved, "attention output");
}

ops::Held Ulysses::output_to_heads(ops::Buffer o_sNH) const { return to_heads(o_sNH, output_blocks_, "attention output of my heads"); }

}  // namespace uly::step
