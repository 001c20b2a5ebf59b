#include "data/batch.h"

#include <algorithm>

#include "base/check.h"

namespace uly::data {

namespace {

// The place of one rank's shard in the padded sequence.
struct Shard {
  int64_t begin, end;
  Shard(int64_t S, int64_t P, int64_t p) : begin(p * (S / P)), end(begin + S / P) { ULY_CHECK_EQ(S % P, 0, "a padded length divides by the ranks that share it"); }
};

// Calls f(piece, at, first, last, position) for each piece in turn: its first token lies `at` in the sequence and has that position;
// the shard has tokens [first, last) of it.
template <typename F>
int64_t for_each_piece(const Packs& all, const std::vector<int64_t>& packs, const Shard& shard, F&& f) {
  int64_t at = 0;
  for (const int64_t pack : packs) {
    const int64_t begin = at;
    for (const Piece& piece : all.pieces(pack)) {
      f(piece, at, std::max<int64_t>(0, shard.begin - at), std::min(piece.count, shard.end - at), all.fused(pack) ? at - begin : 0);
      at += piece.count;
    }
  }
  return at;
}

}  // namespace

Batch make_batch(const TokenFile& file, const Packs& all, const std::vector<int64_t>& packs, int64_t S, int64_t P, int64_t p) {
  const Shard shard(S, P, p);
  const size_t s = static_cast<size_t>(S / P);
  Batch batch;
  batch.S = S;
  batch.ids.assign(s, 0);
  batch.labels.assign(s, kNoLabel);
  batch.positions.assign(s, 0);
  const auto id = [&](int64_t token) -> int64_t {
    const int32_t id = file.ids()[token];
    ULY_USER_CHECK(id >= 0 && id < file.vocabulary(), "{}: token {} has id {}, outside the vocabulary of {}", file.path(), token, id, file.vocabulary());
    return id;
  };
  const int64_t end = for_each_piece(all, packs, shard, [&](const Piece& piece, int64_t at, int64_t first, int64_t last, int64_t position) {
    for (int64_t i = first; i < last; ++i) {
      const size_t here = static_cast<size_t>(at + i - shard.begin);
      batch.ids[here] = id(piece.first + i);
      batch.positions[here] = position + i;
      if (i + 1 < piece.count && file.trained()[piece.first + i + 1]) batch.labels[here] = id(piece.first + i + 1);
    }
    if (position == 0) batch.document_starts.push_back(at);
  });
  ULY_CHECK(end <= S, "a micro-batch is longer than its padded length");
  batch.num_tokens = end;
  batch.document_starts.push_back(end);
  for (size_t d = 1; d < batch.document_starts.size(); ++d) batch.longest_document = std::max(batch.longest_document, batch.document_starts[d] - batch.document_starts[d - 1]);
  for (int64_t i = std::max(end, shard.begin); i < shard.end; ++i) batch.positions[static_cast<size_t>(i - shard.begin)] = i - end;
  if (end < S) batch.document_starts.push_back(S);
  return batch;
}

int64_t count_labels(const TokenFile& file, const Packs& all, const std::vector<int64_t>& packs, int64_t S, int64_t P, int64_t p) {
  int64_t n = 0;
  for_each_piece(all, packs, Shard(S, P, p), [&](const Piece& piece, int64_t, int64_t first, int64_t last, int64_t) {
    const uint8_t* trained = file.trained() + piece.first;
    const int64_t from = first + 1, to = std::min(last + 1, piece.count);  // the labels of [first, last) are the tokens after them
    if (from < to) n += std::count_if(trained + from, trained + to, [](uint8_t x) { return x != 0; });
  });
  return n;
}

std::vector<int64_t> starts_within_shard(const std::vector<int64_t>& document_starts, int64_t S, int64_t P, int64_t p) {
  const int64_t s = S / P, begin = p * s, end = begin + s;
  std::vector<int64_t> starts{0};
  for (const int64_t start : document_starts)
    if (start > begin && start < end) starts.push_back(start - begin);
  starts.push_back(s);
  return starts;
}

}  // namespace uly::data
