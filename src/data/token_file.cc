#include "data/token_file.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "base/units.h"

namespace uly::data {

TokenFile::TokenFile(const std::string& path) : file_(path) {
  const auto format = file_.metadata().find("format");
  ULY_USER_CHECK(format != file_.metadata().end() && format->second == "ulysses-tokens-1", "{}: expected a token file (format ulysses-tokens-1), found {}", path,
                 format == file_.metadata().end() ? "no format" : format->second);
  const TensorEntry &ids = file_.at("ids"), &trained = file_.at("trained"), &starts = file_.at("starts");
  const bool types = ids.dtype == Dtype::kI32 && trained.dtype == Dtype::kU8 && starts.dtype == Dtype::kI64;
  ULY_USER_CHECK(types && starts.elements() >= 1 && ids.elements() == trained.elements(), "{}: expected ids I32 [T], trained U8 [T], starts I64 [n+1]", path);
  ids_ = reinterpret_cast<const int32_t*>(ids.data);
  trained_ = trained.data;
  starts_ = reinterpret_cast<const int64_t*>(starts.data);
  num_samples_ = starts.elements() - 1;
  ULY_USER_CHECK(starts_[0] == 0 && starts_[num_samples_] == ids.elements() && std::is_sorted(starts_, starts_ + num_samples_ + 1), "{}: its document starts do not cover its tokens in order", path);
  const auto vocabulary = file_.metadata().find("vocabulary");
  vocabulary_ = vocabulary == file_.metadata().end() ? 0 : std::atoll(vocabulary->second.c_str());
  for (int64_t i = 0; i < ids.elements(); ++i)
    ULY_USER_CHECK(ids_[i] >= 0 && ids_[i] < vocabulary_, "{}: token {} has id {}, outside the vocabulary of {}", path, i, ids_[i], vocabulary_);
}

int64_t TokenFile::count_trained(int64_t sample) const {
  const uint8_t* t = trained(sample);
  const int64_t n = length(sample);
  return n <= 1 ? 0 : std::count_if(t + 1, t + n, [](uint8_t x) { return x != 0; });
}

Selection select(const TokenFile& file, int64_t max_length, bool drop_longer, const std::string& where) {
  Selection s;
  int64_t shortest = file.num_samples() > 0 ? file.length(0) : 0;
  for (int64_t i = 0; i < file.num_samples(); ++i) {
    const int64_t n = file.length(i);
    shortest = std::min(shortest, n);
    s.longest_in_file = std::max(s.longest_in_file, n);
    if (n == 0 || (drop_longer && n > max_length)) {
      ++s.num_dropped;
      continue;
    }
    s.samples.push_back(i);
    s.longest = std::max(s.longest, n);
    s.num_tokens += n;
  }
  ULY_USER_CHECK(!s.samples.empty(), "{}: max_length {} is below every sample: the shortest of {} has {} tokens; raise data.max_length", where, format_count(max_length),
                 format_count(file.num_samples()), format_count(shortest));
  return s;
}

}  // namespace uly::data
