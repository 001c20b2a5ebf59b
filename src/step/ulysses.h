// Ulysses: each rank turns its share of the tokens with all heads into all tokens with its share of the heads, and back.
//
// Source      arXiv:2309.14509; packing key-value heads for each rank that needs them avoids repeating them before.
// Collective  sequence group; one all-to-all a call, s * columns elements sent in all.
#pragma once

#include "step/options.h"

namespace uly::step {

// The heads of rank p of P: query heads [p N / P, (p+1) N / P) and the key-value heads they belong to.
ops::Heads heads_of_rank(const models::Spec& spec, int64_t P, int64_t p);

class Ulysses {
 public:
  Ulysses(ops::Ops& ops, const models::Spec& spec, const Options& options);

  const ops::Heads& heads() const { return heads_; }

  ops::Held qkv_to_heads(ops::Held qkv_s) const;          // qkv_s -> qkv_S (columns q nH | k kH | v kH)
  ops::Held qkv_grad_to_tokens(ops::Held dqkv_S) const;   // the transpose: key-value gradients are summed
  ops::Held output_to_tokens(ops::Held o_SnH) const;      // o_SnH -> o_sNH
  ops::Held output_to_heads(ops::Buffer o_sNH) const;     // o_sNH or its gradient -> o_SnH; P > 1 only
  bool alone() const { return P_ == 1; }

 private:
  // Exchanges blocks packed by rank; `width` columns arrive from each rank for my tokens' or heads' share.
  ops::Held to_heads(ops::Buffer x_s, const ops::ColumnBlocks& blocks, const char* what) const;
  ops::Held to_tokens(ops::Held x_S, const ops::ColumnBlocks& blocks, int64_t columns, ops::Kind kind, const char* what) const;

  ops::Ops& ops_;
  const Options& options_;
  int64_t P_, p_;
  ops::Heads heads_;
  int64_t qkv_columns_, output_columns_;
  ops::ColumnBlocks qkv_blocks_, output_blocks_;
};

}  // namespace uly::step
