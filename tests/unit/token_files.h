// Token files for tests.
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/safetensors.h"

namespace uly::data {

inline std::string write_tokens(const std::vector<std::vector<int32_t>>& documents, const std::vector<std::vector<uint8_t>>& trained, int64_t vocabulary = 100, const std::string& sources = "") {
  static int count = 0;
  const std::string path = std::filesystem::temp_directory_path() / fmt::format("token_file_{}_{}.safetensors", getpid(), count++);
  std::vector<int32_t> ids;
  std::vector<uint8_t> flags;
  std::vector<int64_t> starts{0};
  for (size_t d = 0; d < documents.size(); ++d) {
    ids.insert(ids.end(), documents[d].begin(), documents[d].end());
    flags.insert(flags.end(), trained[d].begin(), trained[d].end());
    starts.push_back(static_cast<int64_t>(ids.size()));
  }
  const int64_t T = static_cast<int64_t>(ids.size()), n = static_cast<int64_t>(starts.size());
  std::map<std::string, std::string> metadata = {{"format", "ulysses-tokens-1"}, {"vocabulary", std::to_string(vocabulary)}};
  if (!sources.empty()) metadata["sources"] = sources;
  SafetensorsWriter writer(path, {{"ids", Dtype::kI32, {T}}, {"trained", Dtype::kU8, {T}}, {"starts", Dtype::kI64, {n}}},
                           metadata);
  writer.append(ids.data(), T * 4);
  writer.append(flags.data(), T);
  writer.append(starts.data(), n * 8);
  writer.finish();
  return path;
}

// Documents of these lengths; every token is trained.
inline std::string write_lengths(const std::vector<int64_t>& lengths, const std::string& sources = "") {
  std::vector<std::vector<int32_t>> documents;
  std::vector<std::vector<uint8_t>> trained;
  for (const int64_t n : lengths) {
    documents.emplace_back(static_cast<size_t>(n), static_cast<int32_t>(documents.size() % 100));
    trained.emplace_back(static_cast<size_t>(n), uint8_t{1});
  }
  return write_tokens(documents, trained, 100, sources);
}

}  // namespace uly::data
