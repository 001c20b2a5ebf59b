// What an epoch is made of: documents, cut to length and, where asked, packed. A pure function of the token file and these rules;
// no rank, no number of ranks and no micro-batch enters it, and no token is read for it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/token_file.h"
#include "recipe/recipe.h"

namespace uly::data {

// Tokens [first, first + count) of the file: a document, or what was cut from one. What comes before `first` is not seen by it.
struct Piece {
  int64_t first = 0, count = 0;

  bool operator==(const Piece&) const = default;
};

struct PackRules {
  int64_t max_length = 0;
  recipe::Overlong overlong = recipe::Overlong::kDrop;
  bool pack = false;                // false: each document is a pack of its own
  recipe::PackStrategy strategy = recipe::PackStrategy::kInOrder;
  bool always_max_length = false;   // cut what does not fit; its rest begins the next pack
  bool drop_last = false;           // the last pack, if it is short
  bool repeat = false;              // documents of fewer tokens than max_length, up to it
  double fuse_prob = 0;
  uint64_t seed = 42;
  std::vector<double> weights;      // how often a sample of each source is taken; empty: once
};

// As the recipe says; for evaluation every document once and whole, as far as max_length allows, and none merged.
PackRules rules_to_train(const recipe::Recipe& recipe, int64_t max_length);
PackRules rules_to_evaluate(const recipe::Recipe& recipe, int64_t max_length);

struct Amount {
  int64_t samples = 0, tokens = 0;
  void add(int64_t n) { ++samples, tokens += n; }
};

// Packs, each a list of pieces, in the order in which they were made.
class Packs {
 public:
  int64_t size() const { return static_cast<int64_t>(starts_.size()) - 1; }
  std::span<const Piece> pieces(int64_t pack) const { return {pieces_.data() + starts_[static_cast<size_t>(pack)], pieces_.data() + starts_[static_cast<size_t>(pack) + 1]}; }
  int64_t tokens(int64_t pack) const { return tokens_[static_cast<size_t>(pack)]; }
  // One document for positions and attention; targets stay within its pieces all the same.
  bool fused(int64_t pack) const { return !fused_.empty() && fused_[static_cast<size_t>(pack)]; }
  int64_t num_pieces() const { return static_cast<int64_t>(pieces_.size()); }
  // Pairs of tokens of which the later attends to the other, and its own square for each document: sums of squared lengths.
  double squared_lengths(int64_t pack) const;

  // Over all packs.
  int64_t longest = 0;             // tokens of a pack
  int64_t longest_document = 0;
  int64_t num_tokens = 0;
  int64_t num_fused = 0;
  int64_t longest_in_file = 0;     // tokens of a sample, before anything was cut

  Amount dropped;                  // longer than max_length
  Amount truncated;                // samples that were cut, tokens that were cut off
  Amount split;                    // samples that were cut, and all of their tokens
  Amount left_out;                 // drop_last: documents of the last pack
  Amount repeated;                 // beyond the first time
  Amount weighed_again;            // by a weight above 1: beyond the first time
  Amount weighed_out;              // by a weight below 1: not taken
  int64_t num_cut = 0;             // documents cut by always_max_length

 private:
  friend Packs make_packs(const TokenFile& file, const std::vector<int64_t>* samples, const PackRules& rules);
  std::vector<Piece> pieces_;
  std::vector<int64_t> starts_{0}, tokens_;
  std::vector<char> fused_;
};

// Packs `samples` of the file, ascending, in order; null: all. Of a source of weight w round(w n) of its n samples are taken: all of them
// as often as w has whole, and of the rest those that a hash of seed and sample puts first. Without rules.pack the packs are the documents in that order; with it the order is
// a shuffle by rules.seed. Samples without tokens are left out. None may be left: the caller asks.
//
// Time        1,000,000 documents to packs of 1,000,000 tokens, best_fit: bench/packing
Packs make_packs(const TokenFile& file, const std::vector<int64_t>* samples, const PackRules& rules);

// Draws round(share * n) of n samples to evaluate on, by a hash of seed and index: the others, and these, in order.
struct Split {
  std::vector<int64_t> train, eval;
};
Split split_samples(int64_t n, double share, uint64_t seed);

}  // namespace uly::data
