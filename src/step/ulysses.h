// Ulysses: each rank turns its share of the tokens with all heads into all tokens with its share of the heads, and back. A rank's
// heads may go in parts, by key-value heads, so that one part travels while attention works on another.
//
// Source      arXiv:2309.14509; packing key-value heads for each rank that needs them avoids repeating them before.
// Collective  sequence group; one all-to-all a part, s * columns elements sent in all.
#pragma once

#include "step/options.h"

namespace uly::step {

// The heads of rank p of P: query heads [p N / P, (p+1) N / P) and the key-value heads they belong to.
ops::Heads heads_of_rank(const models::Spec& spec, int64_t P, int64_t p);

// Part g of `parts`: its key-value heads [g k / parts, (g+1) k / parts) and those of its query heads that belong to them.
ops::Heads heads_of_part(const models::Spec& spec, int64_t P, int64_t p, int64_t parts, int64_t g);

// Whether all parts of all ranks are alike, whole groups of query heads: what a GPU prepares for one serves for all.
bool parts_are_alike(const models::Spec& spec, int64_t P, int64_t parts);

// How a tensor's columns are spread over ranks and parts. With heads, the parts of mine lie one after the other, each S x mine[part].
struct Spread {
  int64_t P = 1, s = 0, columns = 0;        // columns: of my tokens, all heads
  ops::ColumnBlocks blocks;                 // part by part, a block a rank
  std::vector<int64_t> mine;                // columns of mine, by part

  int64_t num_parts() const { return static_cast<int64_t>(mine.size()); }
  int64_t mine_before(int64_t part) const;  // columns of mine in the parts before
  ops::Buffer part(const ops::Buffer& x_S, int64_t part) const { return x_S.view(s * P * mine_before(part), s * P, mine[static_cast<size_t>(part)]); }
};

// x_s on its way to x_S. With one rank it is there: x_S is x_s.
class ToHeads {
 public:
  ToHeads() = default;
  ToHeads(ops::Ops& ops, const Spread& spread, ops::Held x_s, const char* what);  // packs; nothing is sent yet

  void start(int64_t part);
  ops::Buffer wait(int64_t part);  // the part, which is there then
  // All of x_S, after the last wait.
  ops::Buffer whole() const { return received_; }
  ops::Held take() { return std::move(received_); }
  void reset() { send_.reset(), received_.reset(); }

 private:
  ops::Ops* ops_ = nullptr;
  const Spread* spread_ = nullptr;
  ops::Held send_, received_;
  std::vector<ops::Event> events_;
};

// x_S on its way to x_s; columns that several ranks sent are summed.
class ToTokens {
 public:
  ToTokens(ops::Ops& ops, const Spread& spread, ops::Kind kind, const char* what) : ops_(ops), spread_(spread), kind_(kind), what_(what) {}

  // Parts are started in order.
  void start(const ops::Buffer& x_S);
  // Starts what has not been, waits for all.
  ops::Held finish(ops::Held x_S);

 private:
  ops::Ops& ops_;
  const Spread& spread_;
  ops::Kind kind_;
  const char* what_;
  ops::Held received_;
  std::vector<ops::Event> events_;
};

class Ulysses {
 public:
  Ulysses(ops::Ops& ops, const models::Spec& spec, const Options& options);

  bool alone() const { return P_ == 1; }
  const ops::Heads& heads() const { return heads_; }
  int64_t num_parts() const { return static_cast<int64_t>(parts_.size()); }
  const ops::Heads& heads(int64_t part) const { return parts_[static_cast<size_t>(part)]; }
  ops::Buffer qkv_part(const ops::Buffer& qkv_S, int64_t part) const { return qkv_.part(qkv_S, part); }
  ops::Buffer output_part(const ops::Buffer& o_SnH, int64_t part) const { return output_.part(o_SnH, part); }
  ops::Buffer lse_part(const ops::Buffer& lse_Sn, int64_t part) const;

  // A part of qkv_S has columns q nH | k kH | v kH of its heads.
  ToHeads qkv_to_heads(ops::Held qkv_s) const { return ToHeads(ops_, qkv_, std::move(qkv_s), "q, k, v of my heads"); }
  ToTokens qkv_grad_to_tokens() const { return ToTokens(ops_, qkv_, ops::Kind::kActivations, "gradient of q, k, v"); }
  ToHeads output_to_heads(ops::Held o_sNH) const { return ToHeads(ops_, output_, std::move(o_sNH), "attention output of my heads"); }  // or its gradient
  ToTokens output_to_tokens() const { return ToTokens(ops_, output_, ops::Kind::kSaved, "attention output"); }

 private:
  ops::Ops& ops_;
  int64_t P_;
  ops::Heads heads_;
  std::vector<ops::Heads> parts_;
  Spread qkv_, output_;
};

}  // namespace uly::step
