// Token files: what `prepare` made of chats and texts, memory-mapped. The format is in docs/design.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/safetensors.h"

namespace uly::data {

class TokenFile {
 public:
  // Throws UserError if the file is not a token file or contradicts itself.
  explicit TokenFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  int64_t num_samples() const { return num_samples_; }
  int64_t length(int64_t sample) const { return starts_[sample + 1] - starts_[sample]; }
  const int32_t* ids(int64_t sample) const { return ids_ + starts_[sample]; }
  const uint8_t* trained(int64_t sample) const { return trained_ + starts_[sample]; }
  int64_t vocabulary() const { return vocabulary_; }  // every id is below

  // Tokens of the sample that are targets; its first never is.
  int64_t count_trained(int64_t sample) const;

 private:
  SafetensorsFile file_;
  int64_t num_samples_ = 0, vocabulary_ = 0;
  const int32_t* ids_ = nullptr;
  const uint8_t* trained_ = nullptr;
  const int64_t* starts_ = nullptr;
};

// The samples that are trained on, in the file's order, after the filter by length.
struct Selection {
  std::vector<int64_t> samples;
  int64_t longest = 0;        // tokens, among the selected
  int64_t num_tokens = 0;
  int64_t num_dropped = 0;    // longer than max_length
  int64_t longest_in_file = 0;
};

// Drops samples longer than max_length where `drop_longer`. Throws UserError if none is left.
Selection select(const TokenFile& file, int64_t max_length, bool drop_longer, const std::string& where);

}  // namespace uly::data
