#include "data/batch.h"

#include <algorithm>

#include "base/check.h"

namespace uly::data {

Batch make_batch(const TokenFile& file, const std::vector<int64_t>& samples, int64_t S, int64_t P, int64_t p) {
  ULY_CHECK_EQ(S % P, 0, "a padded length divides by the ranks that share it");
  const int64_t s = S / P, begin = p * s, end = begin + s;
  Batch batch;
  batch.S = S;
  batch.ids.assign(static_cast<size_t>(s), 0);
  batch.labels.assign(static_cast<size_t>(s), kNoLabel);
  batch.positions.assign(static_cast<size_t>(s), 0);
  batch.document_starts.push_back(0);
  int64_t at = 0;  // of the document's first token in the sequence
  for (const int64_t sample : samples) {
    const int64_t n = file.length(sample);
    const int32_t* ids = file.ids(sample);
    const uint8_t* trained = file.trained(sample);
    for (int64_t i = std::max<int64_t>(0, begin - at); i < std::min(n, end - at); ++i) {
      const size_t here = static_cast<size_t>(at + i - begin);
      batch.ids[here] = ids[i];
      batch.positions[here] = i;
      if (i + 1 < n && trained[i + 1]) batch.labels[here] = ids[i + 1];
    }
    batch.num_trained += file.count_trained(sample);
    batch.longest_document = std::max(batch.longest_document, n);
    at += n;
    batch.document_starts.push_back(at);
  }
  ULY_CHECK(at <= S, "a micro-batch is longer than its padded length");
  batch.num_tokens = at;
  for (int64_t i = std::max(at, begin); i < end; ++i) batch.positions[static_cast<size_t>(i - begin)] = i - at;
  if (at < S) batch.document_starts.push_back(S);
  return batch;
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
