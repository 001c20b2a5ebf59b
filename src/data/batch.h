// A micro-batch as one rank sees it: documents one after the other, padded, labels shifted before the cut into P shards.
#pragma once

#include <cstdint>
#include <vector>

#include "data/pack.h"
#include "data/token_file.h"

namespace uly::data {

inline constexpr int64_t kNoLabel = -100;

struct Batch {
  int64_t S = 0;                                  // padded length
  std::vector<int64_t> ids, labels, positions;    // this rank's s = S / P tokens
  std::vector<int64_t> document_starts;           // over S: 0, ..., S; padding is the last document
  int64_t num_tokens = 0;                         // of the whole micro-batch, without padding
  int64_t longest_document = 0;                   // without padding
};

// `packs` of all, by number, in order, then padding up to S. Rank p of P gets tokens [p S/P, (p+1) S/P), and reads no others of the
// file. Throws UserError for an id outside the file's own vocabulary.
Batch make_batch(const TokenFile& file, const Packs& all, const std::vector<int64_t>& packs, int64_t S, int64_t P, int64_t p);

// Labels that such a batch of rank p has.
int64_t count_labels(const TokenFile& file, const Packs& all, const std::vector<int64_t>& packs, int64_t S, int64_t P, int64_t p);

// Cuts the documents at the borders of shards: what attention sees that stays inside each rank. Starts are relative to
// the shard of rank p.
std::vector<int64_t> starts_within_shard(const std::vector<int64_t>& document_starts, int64_t S, int64_t P, int64_t p);

}  // namespace uly::data
