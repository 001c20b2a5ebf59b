#include "step/ulysses.h"

#include <numeric>

#include "base/shapes.h"

namespace uly::step {
namespace {

int64_t width(const std::vector<ops::Columns>& block) {
  return std::accumulate(block.begin(), block.end(), int64_t{0}, [](int64_t sum, const ops::Columns& c) { return sum + c.count; });
}

int64_t sum(const std::vector<int64_t>& v) { return std::accumulate(v.begin(), v.end(), int64_t{0}); }

// With the packed tensor of my tokens: the elements of a part by rank, and those before it.
struct Packed {
  std::vector<int64_t> elements;
  int64_t before = 0;
};

Packed packed(const Spread& spread, int64_t part) {
  Packed of;
  for (int64_t i = 0; i < (part + 1) * spread.P; ++i) {
    const int64_t elements = spread.s * width(spread.blocks[static_cast<size_t>(i)]);
    if (i < part * spread.P) of.before += elements;
    else of.elements.push_back(elements);
  }
  return of;
}

int64_t packed_elements(const Spread& spread) {
  const Packed last = packed(spread, spread.num_parts() - 1);
  return last.before + sum(last.elements);
}

std::vector<int64_t> equal_elements(const Spread& spread, int64_t part) { return std::vector<int64_t>(static_cast<size_t>(spread.P), spread.s * spread.mine[static_cast<size_t>(part)]); }

// Sums go in the order of ranks. By parts it would be another where three ranks share a key-value head, which may be the last of
// one and the first of another: then there is one part.
bool three_share(const models::Spec& spec, int64_t P) {
  std::vector<int64_t> ranks(static_cast<size_t>(spec.K), 0);
  for (int64_t p = 0; p < P; ++p) {
    const ops::Heads h = heads_of_rank(spec, P, p);
    for (int64_t k = 0; k < h.k; ++k)
      if (++ranks[static_cast<size_t>(h.first_head / h.G + k)] == 3) return true;
  }
  return false;
}

int64_t possible_parts(const models::Spec& spec, int64_t P, int64_t wanted) {
  if (P == 1 || wanted <= 1 || three_share(spec, P)) return 1;
  int64_t most = 1;
  for (int64_t p = 0; p < P; ++p) most = std::max(most, heads_of_rank(spec, P, p).k);
  return std::min(wanted, most);
}

}  // namespace

ops::Heads heads_of_rank(const models::Spec& spec, int64_t P, int64_t p) {
  const int64_t first = p * spec.N / P, end = (p + 1) * spec.N / P, G = spec.N / spec.K;
  const int64_t k = first == end ? 0 : (end - 1) / G - first / G + 1;
  return {.n = end - first, .k = k, .H = spec.H, .G = G, .first_head = first};
}

ops::Heads heads_of_part(const models::Spec& spec, int64_t P, int64_t p, int64_t parts, int64_t g) {
  const ops::Heads all = heads_of_rank(spec, P, p);
  const int64_t kv = all.first_head / all.G, from = g * all.k / parts, to = (g + 1) * all.k / parts;
  const int64_t first = std::max(all.first_head, (kv + from) * all.G), end = std::min(all.first_head + all.n, (kv + to) * all.G);
  return {.n = std::max<int64_t>(0, end - first), .k = to - from, .H = all.H, .G = all.G, .first_head = first};
}

bool parts_are_alike(const models::Spec& spec, int64_t P, int64_t parts) {
  const ops::Heads one = heads_of_part(spec, P, 0, parts, 0);
  for (int64_t p = 0; p < P; ++p)
    for (int64_t g = 0; g < parts; ++g)
      if (const ops::Heads h = heads_of_part(spec, P, p, parts, g); h.n != one.n || h.k != one.k || h.n != h.k * h.G || h.n == 0) return false;
  return true;
}

int64_t Spread::mine_before(int64_t part) const { return std::accumulate(mine.begin(), mine.begin() + part, int64_t{0}); }

ToHeads::ToHeads(ops::Ops& ops, const Spread& spread, ops::Held x_s, const char* what) : ops_(&ops), spread_(&spread) {
  if (spread.P == 1) {
    received_ = std::move(x_s);
    return;
  }
  send_ = ops::Held(ops, 1, packed_elements(spread), (*x_s).dtype, ops::Kind::kCommunication, "exchange: packed by rank");
  ops.pack_columns(send_, x_s, spread.blocks);
  x_s.reset();
  received_ = ops::Held(ops, spread.s * spread.P, sum(spread.mine), (*send_).dtype, ops::Kind::kActivations, what);
}

void ToHeads::start(int64_t part) {
  if (spread_->P == 1 || part < static_cast<int64_t>(events_.size())) return;
  const Packed from = packed(*spread_, part);
  events_.push_back(ops_->all_to_all(spread_->part(received_, part), (*send_).column_range(from.before, sum(from.elements)), ops::Group::kSequence, equal_elements(*spread_, part), from.elements));
}

ops::Buffer ToHeads::wait(int64_t part) {
  start(part);
  if (spread_->P > 1) ops_->wait(events_[static_cast<size_t>(part)]);
  if (part + 1 == spread_->num_parts()) send_.reset();
  return spread_->part(received_, part);
}

void ToTokens::start(const ops::Buffer& x_S) {
  if (spread_.P == 1) return;
  const int64_t part = static_cast<int64_t>(events_.size());
  if (!received_.exists()) received_ = ops::Held(ops_, 1, packed_elements(spread_), x_S.dtype, ops::Kind::kCommunication, "exchange: received by rank");
  const Packed to = packed(spread_, part);
  events_.push_back(ops_.all_to_all((*received_).column_range(to.before, sum(to.elements)), spread_.part(x_S, part), ops::Group::kSequence, to.elements, equal_elements(spread_, part)));
}

ops::Held ToTokens::finish(ops::Held x_S) {
  if (spread_.P == 1) return x_S;
  while (static_cast<int64_t>(events_.size()) < spread_.num_parts()) start(x_S);
  for (const ops::Event e : events_) ops_.wait(e);
  x_S.reset();
  ops::Held x_s(ops_, spread_.s, spread_.columns, (*received_).dtype, kind_, what_);
  ops_.unpack_columns(x_s, received_, spread_.blocks);
  received_.reset();
  return x_s;
}

Ulysses::Ulysses(ops::Ops& ops, const models::Spec& spec, const Options& options) : ops_(ops), P_(options.exchange_ranks()), heads_(heads_of_rank(spec, P_, P_ == 1 ? 0 : options.mesh.p())) {
  const int64_t H = spec.H, NH = spec.N * H, KH = spec.K * H, parts = possible_parts(spec, P_, options.exchange_parts), me = P_ == 1 ? 0 : options.mesh.p();
  qkv_ = {.P = P_, .s = options.s, .columns = spec.qkv_columns(), .blocks = {}, .mine = {}};
  output_ = {.P = P_, .s = options.s, .columns = spec.query_columns(), .blocks = {}, .mine = {}};
  for (int64_t g = 0; g < parts; ++g) {
    for (int64_t r = 0; r < P_; ++r) {
      const ops::Heads h = heads_of_part(spec, P_, r, parts, g);
      const int64_t kv = h.first_head / h.G;
      qkv_.blocks.push_back({{h.first_head * H, h.n * H}, {NH + kv * H, h.k * H}, {NH + KH + kv * H, h.k * H}});
      output_.blocks.push_back({{h.first_head * H, h.n * H}});
    }
    const ops::Heads& h = parts_.emplace_back(heads_of_part(spec, P_, me, parts, g));
    qkv_.mine.push_back((h.n + 2 * h.k) * H), output_.mine.push_back(h.n * H);
  }
}

ops::Buffer Ulysses::lse_part(const ops::Buffer& lse_Sn, int64_t part) const {
  const int64_t S = output_.s * P_;
  return lse_Sn.view(S * output_.mine_before(part) / heads_.H, S, heads(part).n);
}

}  // namespace uly::step
