#include "checkpoint/hub_files.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>

#include "base/check.h"
#include "base/safetensors.h"
#include "base/units.h"
#include "checkpoint/hub.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

std::string cause() { return std::strerror(errno); }

[[noreturn]] void refused(const std::string& path, int64_t bytes) {
  ULY_USER_CHECK(errno != ENOSPC && errno != EDQUOT, "{}: no room on disk: needs {} bytes", path, format_count(bytes));
  user_error("{}: cannot be written: {}", path, cause());
}

bool is_our_file(const std::string& name) { return name == "config.json" || is_generation_file(name) || is_tokenizer_file(name) || is_weights_file(name); }

// Whether the weights in `folder` carry our mark.
bool is_ours(const fs::path& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    if (entry.path().extension() != ".safetensors" || !is_weights_file(entry.path().filename().string())) continue;
    try {
      const SafetensorsFile file(entry.path().string());
      const auto mark = file.metadata().find(kWriterKey);
      return mark != file.metadata().end() && mark->second == kWriterName;
    } catch (const UserError&) {
      return false;
    }
  }
  return false;
}

// Whether `inner` is `outer` or lies in it.
bool lies_in(const fs::path& inner, const fs::path& outer) {
  std::error_code ignored;
  const fs::path a = fs::weakly_canonical(inner, ignored), b = fs::weakly_canonical(outer, ignored);
  return !a.empty() && std::mismatch(b.begin(), b.end(), a.begin(), a.end()).first == b.end();
}

std::string aside(const std::string& folder) { return folder + ".replaced"; }

// Moves what is no part of a saved model from the earlier folder into the new one, then removes the earlier.
void retire(const fs::path& earlier, const fs::path& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(earlier, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!is_our_file(name) && !fs::exists(folder / name, ignored)) fs::rename(entry.path(), folder / name, ignored);
  }
  fs::remove_all(earlier, ignored);
}

}  // namespace

bool is_generation_file(const std::string& name) { return name == "generation_config.json"; }

bool is_tokenizer_file(const std::string& name) {
  for (const char* prefix : {"tokenizer", "chat_template.", "special_tokens_map", "added_tokens", "vocab.", "merges.", "spiece", "sentencepiece", "tekken"})
    if (name.starts_with(prefix)) return true;
  return false;
}

bool is_weights_file(const std::string& name) {
  return name == "model.safetensors" || name == "model.safetensors.index.json" || (name.starts_with("model-") && name.ends_with(".safetensors"));
}

Json config_to_save(const models::Spec& spec, Dtype dtype) {
  Json config = spec.config;
  const auto given = [&](const char* key) -> Json {
    const auto it = config.find(key);
    return it == config.end() || !it->is_object() || it->empty() ? Json() : *it;
  };
  Json rope = given("rope_scaling").is_null() ? given("rope_parameters") : given("rope_scaling");
  config.erase("rope_parameters");
  config.erase("_name_or_path");
  config["rope_theta"] = spec.rope.theta;
  if (spec.rope.type == models::Rope::Type::kDefault) rope = Json();
  if (rope.is_object()) {
    rope.erase("rope_theta");
    const Json type = rope.contains("rope_type") ? rope["rope_type"] : rope["type"];
    rope.erase("type");
    rope["rope_type"] = type;
    if (spec.rope.type == models::Rope::Type::kLlama3) rope["original_max_position_embeddings"] = spec.rope.original_max_positions;
  }
  config["rope_scaling"] = rope;
  config["architectures"] = {spec.architecture};
  config["model_type"] = spec.family;
  const char* name = dtype == Dtype::kF32 ? "float32" : "bfloat16";
  config["dtype"] = name;
  config["torch_dtype"] = name;
  return config;
}

void copy_files(const std::string& from, const std::string& to, bool (*wanted)(const std::string& name)) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(from, error)) {
    const std::string name = entry.path().filename().string();
    if (!wanted(name) || !entry.is_regular_file(error)) continue;
    std::ifstream file(entry.path(), std::ios::binary);
    std::ostringstream content;
    content << file.rdbuf();
    ULY_USER_CHECK(file && content, "{}: cannot be read", entry.path().string());
    write_file((fs::path(to) / name).string(), content.str());
  }
  ULY_USER_CHECK(!error, "{}: cannot be listed: {}", from, error.message());
}

void write_file(const std::string& path, const std::string& content) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) refused(path, static_cast<int64_t>(content.size()));
  size_t done = 0;
  bool ok = true;
  while (ok && done < content.size()) {
    const ssize_t written = ::write(fd, content.data() + done, content.size() - done);
    if (written > 0) done += static_cast<size_t>(written);
    ok = written > 0 || errno == EINTR;
  }
  ok = ok && ::fsync(fd) == 0;
  const int error = errno;
  ::close(fd);
  errno = error;
  if (!ok) refused(path, static_cast<int64_t>(content.size()));
}

void make_folder(const std::string& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  ULY_USER_CHECK(!error, "{}: cannot be made: {}", folder, error.message());
}

void remove_folder(const std::string& folder) {
  std::error_code error;
  fs::remove_all(folder, error);
  ULY_USER_CHECK(!error, "{}: cannot be removed: {}", folder, error.message());
}

void sync_folder(const std::string& folder) {
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  ULY_USER_CHECK(fd >= 0, "{}: cannot be opened: {}", folder, cause());
  const bool ok = ::fsync(fd) == 0 || errno == EINVAL;  // some file systems cannot flush a folder
  const std::string why = cause();
  ::close(fd);
  ULY_USER_CHECK(ok, "{}: cannot be flushed to disk: {}", folder, why);
}

void put_in_place(const std::string& complete, const std::string& folder) {
  std::error_code error;
  const std::string parent = fs::path(folder).parent_path().string();
  if (!fs::exists(fs::symlink_status(folder, error))) {
    ULY_USER_CHECK(::rename(complete.c_str(), folder.c_str()) == 0, "{}: cannot be renamed to {}: {}", complete, folder, cause());
    sync_folder(parent);
    return;
  }
  std::string earlier = complete;
  if (::renameat2(AT_FDCWD, complete.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) != 0) {
    earlier = aside(folder);  // two steps; check_hub_target mends what an interruption between them leaves
    remove_folder(earlier);
    ULY_USER_CHECK(::rename(folder.c_str(), earlier.c_str()) == 0, "{}: cannot be renamed to {}: {}", folder, earlier, cause());
    ULY_USER_CHECK(::rename(complete.c_str(), folder.c_str()) == 0, "{}: cannot be renamed to {}: {}", complete, folder, cause());
  }
  sync_folder(parent);
  retire(earlier, folder);
}

std::string settled(const std::string& folder) {
  std::string path = folder;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  std::error_code ignored;
  const bool linked = fs::is_symlink(fs::symlink_status(path, ignored)) && fs::exists(path, ignored);
  return linked ? fs::canonical(path, ignored).string() : path;
}

void check_hub_target(const models::Spec& spec, const std::string& given) {
  ULY_USER_CHECK(!given.empty(), "checkpoint.output_dir: expected a folder, found nothing");
  const std::string folder = settled(given);
  ULY_USER_CHECK(spec.folder.empty() || !lies_in(spec.folder, folder), "{}: expected a folder other than the one the model is read from, {}", folder,
                 spec.folder);
  std::error_code ignored;
  if (!fs::exists(folder, ignored)) {
    if (fs::exists(aside(folder), ignored)) fs::rename(aside(folder), folder, ignored);  // interrupted between two renames
    return;
  }
  ULY_USER_CHECK(fs::is_directory(folder, ignored), "{}: expected a folder, found a file", folder);
  ULY_USER_CHECK(fs::is_empty(folder, ignored) || is_ours(folder),
                 "{}: expected nothing there, or a model that was saved by this program, found something else; "
                 "move it away or choose another output_dir",
                 folder);
}

}  // namespace uly::checkpoint
