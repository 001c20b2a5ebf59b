#include "checkpoint/state.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <optional>

#include "base/units.h"
#include "checkpoint/hub_files.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr int kFormat = 1;
constexpr const char* kManifest = "manifest.json";
constexpr const char* kLatest = "latest";
constexpr const char* kIncomplete = ".incomplete";
constexpr const char* kDamaged = ".damaged";
constexpr std::string_view kPrefix = "global_step_";

const char* name_of(Moment moment) { return moment == Moment::kMaster ? "master" : moment == Moment::kM ? "m" : "v"; }

std::string hex(uint64_t digest) { return fmt::format("{:016x}", digest); }

// What errno says of a state's file or folder; what it says of the path alone is damage.
[[noreturn]] void cannot_read(const std::string& path) {
  constexpr int kOfThePath[] = {ENOTDIR, EISDIR, ELOOP, ENAMETOOLONG, ENXIO, EINVAL};
  if (errno == ENOENT) throw MissingFile(path);
  const std::string words = fmt::format("{}: cannot be read: {}", path, std::strerror(errno));
  if (errno == EACCES || errno == EPERM) throw UserError(words);
  if (std::find(std::begin(kOfThePath), std::end(kOfThePath), errno) != std::end(kOfThePath)) throw DamagedState(words);
  throw DeviceError(words);
}

std::string text_of(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) cannot_read(path);
  std::string text;
  std::vector<char> piece(1 << 16);
  ssize_t n = 0;
  while ((n = ::read(fd, piece.data(), piece.size())) > 0 || (n < 0 && errno == EINTR)) text.append(piece.data(), static_cast<size_t>(std::max<ssize_t>(n, 0)));
  const int error = errno;
  ::close(fd);
  errno = error;
  if (n < 0) cannot_read(path);
  return text;
}

// The state that `latest` names; "" where there is no such file.
std::string latest_in(const std::string& output_dir) {
  const std::string path = (fs::path(output_dir) / kLatest).string();
  try {
    const std::string text = text_of(path);
    return text.substr(0, text.find('\n'));
  } catch (const MissingFile&) {
    return "";
  } catch (const DamagedState& e) {
    user_error("{}: expected a file with the name of a state: remove it", e.what());
  }
}

// The digest of a manifest is over the rest of it.
std::string digest_of(Json manifest) {
  manifest.erase("digest");
  const std::string text = manifest.dump();
  return hex(XXH3_64bits(text.data(), text.size()));
}

// What is nested deeper than any manifest is none: writing it out again would go as deep.
Json parse_flat(const std::string& text) {
  constexpr int kDeepest = 64;
  return Json::parse(text, [](int depth, Json::parse_event_t, Json&) {
    if (depth > kDeepest) throw DamagedState("nested too deeply");
    return true;
  }, false);
}

std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t step = 0;
  const char* first = name.data() + kPrefix.size();
  const auto [end, error] = std::from_chars(first, name.data() + name.size(), step);
  return error == std::errc() && end == name.data() + name.size() ? std::optional(step) : std::nullopt;
}

// Also what is left of one: ranks' files without their manifest.
bool is_state(const fs::path& folder) {
  std::error_code ignored, error;
  if (fs::is_regular_file(folder / kManifest, error) || error == std::errc::permission_denied) return true;  // reading it will tell
  bool files = false;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("rank_") || !name.ends_with(".safetensors")) return false;
    files = true;
  }
  return files;
}

// Written beside, flushed, renamed.
void replace_file(const fs::path& path, const std::string& content) {
  const std::string beside = path.string() + kIncomplete;
  write_file(beside, content);
  ULY_USER_CHECK(::rename(beside.c_str(), path.c_str()) == 0, "{}: cannot be written: {}", path.string(), std::strerror(errno));
  sync_folder(path.parent_path().string());
}

}  // namespace

// --- writing

struct StateWriter::Hash {
  XXH3_state_t* state = XXH3_createState();
};
void StateWriter::Free::operator()(Hash* hash) const {
  XXH3_freeState(hash->state);
  delete hash;
}

StateWriter::StateWriter(const std::string& incomplete_folder, int64_t rank, const std::vector<StatePart>& parts) : name_(fmt::format("rank_{:05}.safetensors", rank)), hash_(new Hash) {
  std::vector<SafetensorsWriter::Declared> declared;
  for (const StatePart& part : parts)
    for (const Moment moment : kMoments) {
      tensors_.push_back({.name = fmt::format("{}/{}", part.unit, name_of(moment)), .begin = part.begin, .count = part.count, .digest = ""});
      declared.push_back({tensors_.back().name, Dtype::kF32, {part.count}});
    }
  XXH3_64bits_reset(hash_->state);
  writer_ = std::make_unique<SafetensorsWriter>((fs::path(incomplete_folder) / name_).string(), declared, std::map<std::string, std::string>{});
}

void StateWriter::append(const float* values, int64_t count) {
  while (count > 0 || (tensor_ < tensors_.size() && tensors_[tensor_].count == filled_)) {
    ULY_CHECK(tensor_ < tensors_.size(), "more of a state than was declared");
    Tensor& t = tensors_[tensor_];
    const int64_t n = std::min(count, t.count - filled_);
    XXH3_64bits_update(hash_->state, values, static_cast<size_t>(n) * sizeof(float));
    writer_->append(values, n * static_cast<int64_t>(sizeof(float)));
    values += n, count -= n, filled_ += n;
    if (filled_ < t.count) continue;
    t.digest = hex(XXH3_64bits_digest(hash_->state));
    XXH3_64bits_reset(hash_->state);
    filled_ = 0;
    ++tensor_;
  }
}

Json StateWriter::finish() {
  append(nullptr, 0);
  ULY_CHECK_EQ(tensor_, tensors_.size(), "parts of a state declared and written");
  writer_->finish();
  Json tensors = Json::object();
  for (const Tensor& t : tensors_) tensors[t.name] = {t.begin, t.count, t.digest};
  return {{"file", name_}, {"tensors", tensors}};
}

Json identity(const models::Spec& spec, const std::vector<models::Unit>& units) {
  Json all = Json::array();
  for (const models::Unit& unit : units) {
    Json tensors = Json::array();
    for (const models::Tensor& t : unit.tensors) tensors.push_back({t.name, t.offset, t.shape});
    all.push_back({{"name", unit.name}, {"elements", unit.elements}, {"tensors", tensors}});
  }
  const models::Rope& r = spec.rope;
  const Json rope = {static_cast<int>(r.type), r.theta, r.factor, r.low_freq_factor, r.high_freq_factor, r.beta_fast, r.beta_slow, r.attention_factor, r.mscale, r.mscale_all_dim, r.truncate, r.original_max_positions};
  return {{"architecture", spec.architecture}, {"units", all}, {"norm_eps", spec.norm_eps}, {"rope", rope}, {"heads", {spec.N, spec.K, spec.H}}};
}

std::string incomplete_name(const std::string& folder) { return folder + kIncomplete; }

void publish_state(const std::string& incomplete_folder, const std::string& folder, Json facts, const std::vector<Json>& files) {
  facts["format"] = kFormat;
  facts["files"] = files;
  facts["digest"] = digest_of(facts);
  write_file((fs::path(incomplete_folder) / kManifest).string(), facts.dump(1));
  sync_folder(incomplete_folder);
  std::error_code ignored;
  if (fs::exists(folder, ignored)) {
    check_state_target(folder);  // of this step too: a run that went on from before it
    if (::renameat2(AT_FDCWD, incomplete_folder.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) {
      remove_folder(incomplete_folder);
    } else {  // a file system that cannot exchange names
      const std::string earlier = folder + ".replaced" + kIncomplete;
      remove_folder(earlier);
      ULY_USER_CHECK(::rename(folder.c_str(), earlier.c_str()) == 0, "{}: cannot be renamed: {}", folder, std::strerror(errno));
      ULY_USER_CHECK(::rename(incomplete_folder.c_str(), folder.c_str()) == 0, "{}: cannot be renamed to {}: {}", incomplete_folder, folder, std::strerror(errno));
      remove_folder(earlier);
    }
  } else {
    ULY_USER_CHECK(::rename(incomplete_folder.c_str(), folder.c_str()) == 0, "{}: cannot be renamed to {}: {}", incomplete_folder, folder, std::strerror(errno));
  }
  const fs::path path(folder);
  sync_folder(path.parent_path().string());
  replace_file(path.parent_path() / kLatest, path.filename().string() + "\n");
}

// --- finding

std::vector<std::string> find_states(const std::string& output_dir, const std::vector<std::string>& more) {
  std::error_code error;
  std::set<std::string> folders(more.begin(), more.end());
  for (const auto& entry : fs::directory_iterator(output_dir, error)) folders.insert(entry.path().string());
  ULY_USER_CHECK(error != std::errc::not_a_directory, "{}: expected a folder, found a file", output_dir);
  if (error && error != std::errc::no_such_file_or_directory) {
    errno = error.value();
    cannot_read(output_dir);
  }
  std::vector<std::pair<int64_t, std::string>> found;
  for (const std::string& folder : folders)
    if (const auto step = step_of(fs::path(folder).filename().string()); step && is_state(folder)) found.emplace_back(*step, folder);
  const std::string latest = latest_in(output_dir);
  std::sort(found.begin(), found.end(), [&](const auto& a, const auto& b) {
    const bool a_latest = fs::path(a.second).filename() == latest, b_latest = fs::path(b.second).filename() == latest;
    return a_latest != b_latest ? a_latest : a.first > b.first;
  });
  std::vector<std::string> sorted;
  for (const auto& [step, folder] : found) sorted.push_back(folder);
  return sorted;
}

std::optional<std::string> run_of(const std::string& folder) {
  try {
    return StateReader(folder).manifest().value("run", "");
  } catch (const Error&) {
    return std::nullopt;
  } catch (const Json::exception&) {
    return std::nullopt;
  }
}

std::string set_aside(const std::string& folder) {
  std::error_code error;
  const std::string aside = folder + kDamaged;
  remove_folder(aside);
  fs::rename(folder, aside, error);
  return error ? "" : aside;
}

void prune_states(const std::string& output_dir, int64_t keep) {
  std::error_code error;
  std::vector<fs::path> left;
  for (const auto& entry : fs::directory_iterator(output_dir, error))
    if (const std::string name = entry.path().filename().string(); name.starts_with(kPrefix) && name.ends_with(kIncomplete)) left.push_back(entry.path());
  for (const fs::path& path : left) remove_folder(path.string());
  const std::vector<std::string> states = find_states(output_dir);
  for (size_t i = static_cast<size_t>(std::max<int64_t>(1, keep)); keep > 0 && i < states.size(); ++i) {
    const std::string going = incomplete_name(states[i]);  // what is half removed is no state
    fs::rename(states[i], going, error);
    remove_folder(error ? states[i] : going);
  }
}

void check_state_target(const std::string& folder) {
  std::error_code ignored;
  if (!fs::exists(folder, ignored)) return;
  ULY_USER_CHECK(fs::is_directory(folder, ignored) && (is_state(folder) || fs::is_empty(folder, ignored)), "{}: expected nothing there, or a state that this program saved, found something else; move it away or choose another output_dir", folder);
}

// --- reading

StateReader::StateReader(const std::string& folder) : folder_(folder) {
  const std::string path = (fs::path(folder) / kManifest).string();
  const auto damaged = [&](const std::string& how) { throw DamagedState(fmt::format("{}: {}", path, how)); };
  const std::string text = text_of(path);
  try {
    manifest_ = parse_flat(text);
  } catch (const DamagedState&) {
    damaged("is not as it was written");
  }
  if (!manifest_.is_object() || !manifest_.contains("digest") || manifest_["digest"] != Json(digest_of(manifest_))) damaged("is not as it was written");
  try {
    if (manifest_.value("format", 0) != kFormat) user_error("{}: expected format {}, found {}: another version of this program wrote it", path, kFormat, manifest_.value("format", 0));
    for (const Json& file : manifest_.at("files"))
      for (const auto& [tensor, facts] : file.at("tensors").items())
        pieces_[tensor].push_back({.begin = facts.at(0), .count = facts.at(1), .file = file.at("file"), .tensor = tensor, .digest = facts.at(2)});
  } catch (const Json::exception&) {
    damaged("is not complete");
  }
  for (auto& [tensor, pieces] : pieces_) std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
}

void StateReader::check_model(const Json& identity) const {
  try {
    compare_model(identity);
  } catch (const Json::exception&) {
    throw DamagedState(fmt::format("{}: is not complete", (fs::path(folder_) / kManifest).string()));
  }
}

void StateReader::compare_model(const Json& identity) const {
  const Json& saved = manifest_.at("model");
  if (saved == identity) return;
  ULY_USER_CHECK(saved.value("architecture", "") == identity.at("architecture").get<std::string>(), "{}: the state is of a {}, the recipe's model is a {}", folder_, saved.value("architecture", "?"), identity.at("architecture").get<std::string>());
  const Json &a = saved.at("units"), &b = identity.at("units");
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    ULY_USER_CHECK(a[i] == b[i], "{}: the state is of another model: {} has {} elements there, {} {} in the recipe's", folder_, a[i].at("name").get<std::string>(), format_count(a[i].at("elements")), b[i].at("name").get<std::string>(), format_count(b[i].at("elements")));
  ULY_USER_CHECK(a.size() == b.size(), "{}: the state is of another model: it has {} units, the recipe's {}", folder_, a.size(), b.size());
  for (const auto& [key, what] : {std::pair{"norm_eps", "its epsilon of norms"}, std::pair{"rope", "its rotary embedding"}, std::pair{"heads", "its attention heads"}})
    ULY_USER_CHECK(!saved.contains(key) || saved.at(key) == identity.at(key), "{}: the state is of another model: {} was {} there, the recipe's config.json says {}: expected the same; begin a new run in another output_dir", folder_, what, saved.at(key).dump(), identity.at(key).dump());
}

const SafetensorsFile& StateReader::open(const std::string& file) {
  std::unique_ptr<SafetensorsFile>& found = files_[file];
  const std::string path = (fs::path(folder_) / file).string();
  if (found) return *found;
  if (const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC); fd >= 0) ::close(fd);
  else cannot_read(path);
  try {
    found = std::make_unique<SafetensorsFile>(path);
  } catch (const UserError& e) {  // what the file holds
    throw DamagedState(e.what());
  }
  return *found;
}

void StateReader::read(const std::string& unit, Moment moment, int64_t begin, int64_t count, float* out) {
  const std::string name = fmt::format("{}/{}", unit, name_of(moment));
  int64_t at = begin;
  const auto found = pieces_.find(name);
  if (found != pieces_.end())
    for (const Piece& p : found->second) {
      if (p.begin + p.count <= at || p.begin > at || at >= begin + count) continue;
      const SafetensorsFile& file = open(p.file);
      const TensorEntry* entry = file.find(p.tensor);
      if (!entry || entry->dtype != Dtype::kF32 || entry->elements() != p.count) throw DamagedState(fmt::format("{}: tensor '{}' is not as the manifest says", file.path(), p.tensor));
      if (whole_.insert(p.file + "/" + p.tensor).second && hex(XXH3_64bits(entry->data, static_cast<size_t>(entry->bytes))) != p.digest) throw DamagedState(fmt::format("{}: tensor '{}' is not as it was written", file.path(), p.tensor));
      const int64_t n = std::min(begin + count, p.begin + p.count) - at;
      std::memcpy(out + (at - begin), entry->data + (at - p.begin) * 4, static_cast<size_t>(n) * 4);
      at += n;
    }
  if (at < begin + count) throw DamagedState(fmt::format("{}: elements {} to {} of '{}' are missing", folder_, format_count(at), format_count(begin + count), name));
}

}  // namespace uly::checkpoint
