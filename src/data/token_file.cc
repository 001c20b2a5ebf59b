#include "data/token_file.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "base/check.h"
#include "base/json.h"

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
  const auto sources = file_.metadata().find("sources");
  std::istringstream counts(sources == file_.metadata().end() ? std::to_string(num_samples_) : sources->second);
  int64_t end = 0;
  for (std::string count; std::getline(counts, count, ',');) source_ends_.push_back(end += std::atoll(count.c_str()));
  ULY_USER_CHECK(end == num_samples_, "{}: its sources have {} samples, its documents are {}: remove it and prepare again", path, end, num_samples_);
  const TensorEntry* rows = file_.find("rows");
  if (rows && rows->dtype == Dtype::kI64 && rows->elements() == 2 * num_samples_) rows_ = reinterpret_cast<const int64_t*>(rows->data);
  vocabulary_ = vocabulary == file_.metadata().end() ? 0 : std::atoll(vocabulary->second.c_str());
}

int64_t TokenFile::sample_at(int64_t token) const { return std::upper_bound(starts_, starts_ + num_samples_ + 1, token) - starts_ - 1; }

std::string TokenFile::words(int64_t sample) const {
  if (rows_) {
    const auto provenance = file_.metadata().find("provenance");
    const Json made = provenance == file_.metadata().end() ? Json() : Json::parse(provenance->second, nullptr, false);
    const size_t source = static_cast<size_t>(rows_[2 * sample]);
    if (made.is_object() && made.contains("sources") && source < made["sources"].size() && made["sources"][source].is_object())
      if (const Json name = made["sources"][source].value("name", Json()); name.is_string()) return fmt::format("sample {} of {}", rows_[2 * sample + 1], name.get<std::string>());
  }
  return fmt::format("sample {} of {}", sample, file_.path());
}

std::string TokenFile::fingerprint() const {
  constexpr int64_t kPlaces = 4096, kTokens = 16;
  const int64_t tokens = starts_[num_samples_];
  uint64_t hash = XXH3_64bits(starts_, static_cast<size_t>(num_samples_ + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < kPlaces; ++i) {
    const int64_t first = static_cast<int64_t>(static_cast<__int128>(tokens) * i / kPlaces);
    const size_t count = static_cast<size_t>(std::min(kTokens, tokens - first));
    hash = XXH3_64bits_withSeed(ids_ + first, count * sizeof(int32_t), hash);
    hash = XXH3_64bits_withSeed(trained_ + first, count, hash);
  }
  return fmt::format("{:016x}", hash);
}

std::string TokenFile::digest() const {
  const size_t tokens = static_cast<size_t>(starts_[num_samples_]);
  uint64_t hash = XXH3_64bits(starts_, static_cast<size_t>(num_samples_ + 1) * sizeof(int64_t));
  hash = XXH3_64bits_withSeed(ids_, tokens * sizeof(int32_t), hash);
  return fmt::format("{:016x}", XXH3_64bits_withSeed(trained_, tokens, hash));
}

}  // namespace uly::data
