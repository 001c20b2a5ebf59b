#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "base/check.h"
#include "checkpoint/hub.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kHead = "lm_head.weight";

bool is_file(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored);
}

std::string shape_text(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

[[noreturn]] void no_weights(const std::string& folder) {
  std::error_code ignored;
  bool pickled = false;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    pickled = pickled || (name.starts_with("pytorch_model") && name.find(".bin") != std::string::npos) || name.ends_with(".pth");
  }
  ULY_USER_CHECK(!pickled,
                 "{}: expected {} or {}, found pickled weights only; those run code when opened and are never read: "
                 "load them with Transformers and save_pretrained() once",
                 folder, kSingle, kIndex);
  user_error("{}: expected {} or {}, found neither", folder, kSingle, kIndex);
}

// Returns tensor -> file name as the index says.
std::map<std::string, std::string> read_index(const std::string& path) {
  std::map<std::string, std::string> files;
  try {
    std::ifstream stream(path);
    const nlohmann::json index = nlohmann::json::parse(stream);
    for (const auto& [tensor, file] : index.at("weight_map").items()) files[tensor] = file.get<std::string>();
  } catch (const nlohmann::json::exception& error) {
    user_error("{}: expected JSON with weight_map, tensor to file: {}", path, error.what());
  }
  for (const auto& [tensor, file] : files)
    ULY_USER_CHECK(!file.empty() && file.find('/') == std::string::npos && file != "..", "{}: {}: expected the name of a file in this folder, found '{}'", path,
                   tensor, file);
  return files;
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
  if (exponent == 0) {  // zero and the numbers below the normal ones
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Converts elements [first, first + count) of a mapped tensor, which may lie at any address.
void convert(const TensorEntry& entry, int64_t first, int64_t count, float* out) {
  const uint8_t* source = entry.data + first * bytes_of(entry.dtype);
  if (entry.dtype == Dtype::kF32) {
    std::memcpy(out, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const bool bf16 = entry.dtype == Dtype::kBf16;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, source + 2 * i, sizeof bits);
    out[i] = bf16 ? from_bf16(bits) : from_f16(bits);
  }
}

// Whether `name` is a weight of one of the first L layers.
bool is_layer_weight(const std::string& name, int64_t L) {
  const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix) || !(name.ends_with(".weight") || name.ends_with(".bias"))) return false;
  const std::string digits = name.substr(prefix.size(), name.find('.', prefix.size()) - prefix.size());
  return !digits.empty() && digits.size() < 10 && std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; }) &&
         std::stoll(digits) < L;
}

}  // namespace

HubReader::HubReader(const std::string& folder, const models::Spec& spec) : folder_(folder) {
  const fs::path single = fs::path(folder) / kSingle, index = fs::path(folder) / kIndex;
  if (is_file(single)) {
    files_.push_back(std::make_unique<SafetensorsFile>(single.string()));
    for (const auto& [name, entry] : files_[0]->tensors()) {
      tensors_[name] = &entry;
      path_of_[name] = single.string();
    }
  } else if (is_file(index)) {
    open_indexed(index.string());
  } else {
    no_weights(folder);
  }
  check(spec);
}

void HubReader::open_indexed(const std::string& index_path) {
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [tensor, name] : read_index(index_path)) {
    const std::string path = (fs::path(folder_) / name).string();
    if (!opened.contains(name)) {
      ULY_USER_CHECK(is_file(path), "{}: names {} for {}, which is not there: the download or copy is not complete", index_path, name, tensor);
      files_.push_back(std::make_unique<SafetensorsFile>(path));
      opened[name] = files_.back().get();
    }
    const TensorEntry* entry = opened[name]->find(tensor);
    ULY_USER_CHECK(entry != nullptr, "{}: expected tensor {}, as {} says, found none of that name", path, tensor, kIndex);
    tensors_[tensor] = entry;
    path_of_[tensor] = path;
  }
}

void HubReader::check(const models::Spec& spec) {
  const TensorEntry *embedding = find(kEmbedding), *head = find(kHead);
  if (spec.tied_embeddings && embedding == nullptr && head != nullptr) {
    embedding = tensors_[kEmbedding] = head;
    path_of_[kEmbedding] = path_of_[kHead];
  }
  std::set<std::string> needed;
  for (const models::Unit& unit : models::units(spec))
    for (const models::Tensor& tensor : unit.tensors) {
      const TensorEntry& entry = at(tensor);
      const std::string& path = path_of_.at(tensor.name);
      ULY_USER_CHECK(entry.shape == tensor.shape, "{}: expected {}, found {} in {}", tensor.name, shape_text(tensor.shape), shape_text(entry.shape), path);
      ULY_USER_CHECK(entry.dtype == Dtype::kF32 || entry.dtype == Dtype::kBf16 || entry.dtype == Dtype::kF16, "{}: expected F32, BF16 or F16, found {} in {}",
                     tensor.name, name_of(entry.dtype), path);
      needed.insert(tensor.name);
    }
  for (const auto& [name, path] : path_of_)
    ULY_USER_CHECK(needed.contains(name) || !is_layer_weight(name, spec.L), "{}: expected none, as config.json has no place for it, found {} in {}", name,
                   shape_text(tensors_[name]->shape), path);
  if (!spec.tied_embeddings || head == nullptr || head == embedding) return;
  ULY_USER_CHECK(
      head->dtype == embedding->dtype && head->shape == embedding->shape && std::memcmp(head->data, embedding->data, static_cast<size_t>(head->bytes)) == 0,
      "{}: expected the same values as {}, as tie_word_embeddings is true, found others in {}; set model.hf_config_kwargs.tie_word_embeddings: false", kHead,
      kEmbedding, path_of_[kHead]);
}

const TensorEntry* HubReader::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : it->second;
}

const TensorEntry& HubReader::at(const models::Tensor& tensor) const {
  const TensorEntry* entry = find(tensor.name);
  ULY_USER_CHECK(entry != nullptr, "{}: expected {}, found no tensor of that name in {}", tensor.name, shape_text(tensor.shape), folder_);
  return *entry;
}

void HubReader::read(const models::Unit& unit, int64_t first_element, int64_t count, float* out) const {
  ULY_CHECK(first_element >= 0 && count >= 0 && first_element + count <= unit.elements, "elements of " + unit.name);
  const int64_t last = first_element + count;
  int64_t filled = first_element;
  for (const models::Tensor& tensor : unit.tensors) {
    const int64_t begin = std::max(tensor.offset, first_element), end = std::min(tensor.offset + tensor.elements(), last);
    if (begin >= end) continue;
    std::fill(out + (filled - first_element), out + (begin - first_element), 0.0f);
    convert(at(tensor), begin - tensor.offset, end - begin, out + (begin - first_element));
    filled = end;
  }
  std::fill(out + (filled - first_element), out + count, 0.0f);
}

std::string HubReader::fingerprint(const std::vector<models::Unit>& units) const {
  constexpr int64_t kSmall = int64_t{64} << 10, kBlock = 4 << 10, kBlocks = 8;
  uint64_t hash = 0;
  const auto add = [&](const void* bytes, int64_t count) { hash = XXH3_64bits_withSeed(bytes, static_cast<size_t>(count), hash); };
  for (const models::Unit& unit : units)
    for (const models::Tensor& tensor : unit.tensors) {
      const TensorEntry& entry = at(tensor);
      const std::string words = fmt::format("{} {} {}", tensor.name, name_of(entry.dtype), shape_text(entry.shape));
      add(words.data(), static_cast<int64_t>(words.size()));
      if (entry.bytes <= kSmall) {
        add(entry.data, entry.bytes);
        continue;
      }
      for (int64_t i = 0; i < kBlocks; ++i) add(entry.data + (entry.bytes - kBlock) / (kBlocks - 1) * i + (i + 1 == kBlocks ? (entry.bytes - kBlock) % (kBlocks - 1) : 0), kBlock);
    }
  return fmt::format("{:016x}", hash);
}

}  // namespace uly::checkpoint
