// Token files: what `prepare` made of chats and texts, memory-mapped. The format is in docs/design.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/safetensors.h"

namespace uly::data {

class TokenFile {
 public:
  // Maps the file; reads where its samples start, but no tokens. Throws UserError if it is not a token file or contradicts itself.
  explicit TokenFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  int64_t num_samples() const { return num_samples_; }
  int64_t length(int64_t sample) const { return starts_[sample + 1] - starts_[sample]; }
  int64_t start(int64_t sample) const { return starts_[sample]; }
  // The sample that has a token.
  int64_t sample_at(int64_t token) const;
  // Which it is of the data that were prepared: "sample 17 of chats.jsonl"; by its place in this file where that is not known.
  std::string words(int64_t sample) const;
  // Of all tokens; at which of them they are touched is what is read of the file.
  const int32_t* ids() const { return ids_; }
  const uint8_t* trained() const { return trained_; }
  // Where the samples of each source end; one entry, all, where the file does not say.
  const std::vector<int64_t>& source_ends() const { return source_ends_; }
  int64_t vocabulary() const { return vocabulary_; }  // as the file says: who reads ids, checks them
  // By which other data are told from these: a hash of where all samples start and of some tokens throughout.
  std::string fingerprint() const;
  // The same of all of them: reads the whole file.
  std::string digest() const;

 private:
  SafetensorsFile file_;
  int64_t num_samples_ = 0, vocabulary_ = 0;
  std::vector<int64_t> source_ends_;
  const int32_t* ids_ = nullptr;
  const uint8_t* trained_ = nullptr;
  const int64_t* starts_ = nullptr;
  const int64_t* rows_ = nullptr;  // [n, 2]: source and row in it; null where the file does not say
};

}  // namespace uly::data
