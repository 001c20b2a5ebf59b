#include "launch/environment.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <string_view>

#include "base/check.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

int64_t number(const std::string& name, std::optional<int64_t> fallback, int64_t least, int64_t most) {
  const std::optional<std::string> text = variable(name);
  if (!text || text->empty()) {
    ULY_USER_CHECK(fallback, "environment variable {}: expected a number, as RANK and WORLD_SIZE are set; found nothing", name);
    return *fallback;
  }
  const std::optional<int64_t> value = whole_number(*text);
  ULY_USER_CHECK(value && *value >= least && *value <= most, "environment variable {}: expected a whole number from {} to {}, found '{}'", name, least, most,
                 *text);
  return *value;
}

// As Python's os.path.expanduser and expandvars: what is not known stays as it is.
std::string expanded(std::string path) {
  if (path == "~" || path.starts_with("~/"))
    if (const auto home = variable("HOME")) path = *home + path.substr(1);
  std::string out;
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] != '$') {
      out += path[i];
      continue;
    }
    const bool braces = i + 1 < path.size() && path[i + 1] == '{';
    const size_t first = i + 1 + (braces ? 1 : 0);
    size_t last = first;
    while (last < path.size() && (std::isalnum(static_cast<unsigned char>(path[last])) || path[last] == '_')) ++last;
    const auto value = variable(path.substr(first, last - first));
    if (!value || (braces && (last == path.size() || path[last] != '}'))) {
      out += '$';
      continue;
    }
    out += *value;
    i = braces ? last : last - 1;
  }
  return out;
}

std::string hub_home() {
  const std::string cache = variable("XDG_CACHE_HOME").value_or("~/.cache");
  return variable("HF_HOME").value_or(cache + "/huggingface");
}

}  // namespace

std::optional<std::string> variable(const std::string& name) {
  const char* value = name.empty() ? nullptr : std::getenv(name.c_str());
  return value ? std::optional<std::string>(value) : std::nullopt;
}

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<Place> place_in_job() {
  if (variable("RANK").value_or("").empty() || variable("WORLD_SIZE").value_or("").empty()) return std::nullopt;
  constexpr int64_t kMany = 1 << 20;
  Place place;
  place.world_size = number("WORLD_SIZE", std::nullopt, 1, kMany);
  place.rank = number("RANK", std::nullopt, 0, place.world_size - 1);
  if (place.world_size == 1) return place;
  place.local_world_size = number("LOCAL_WORLD_SIZE", place.world_size, 1, place.world_size);
  place.local_rank = number("LOCAL_RANK", place.rank, 0, place.local_world_size - 1);
  place.master_port = static_cast<int>(number("MASTER_PORT", std::nullopt, 1, 65535));
  place.master_address = variable("MASTER_ADDR").value_or("");
  ULY_USER_CHECK(!place.master_address.empty(), "environment variable MASTER_ADDR: expected a host, as RANK and WORLD_SIZE are set; found nothing");
  return place;
}

std::string hub_cache_folder() {
  if (const auto folder = variable("HF_HUB_CACHE")) return expanded(*folder);
  if (const auto folder = variable("HUGGINGFACE_HUB_CACHE")) return expanded(*folder);
  return expanded(hub_home()) + "/hub";
}

std::string rates_path() {
  if (const auto path = variable("ULYSSES_RATES"); path && !path->empty()) return expanded(*path);
  return expanded(variable("XDG_CONFIG_HOME").value_or("~/.config")) + "/ulysses/rates.json";
}

bool has_hub_token() {
  for (const char* name : {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
    if (!variable(name).value_or("").empty()) return true;
  std::error_code error;
  return fs::exists(expanded(variable("HF_TOKEN_PATH").value_or(hub_home() + "/token")), error);
}

std::string program_folder() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  ULY_CHECK(!error, "/proc/self/exe");
  return program.parent_path();
}

std::string engine_path() {
  const std::string given = variable("ULYSSES_ENGINE").value_or("");
  return given.empty() ? program_folder() + "/ulysses-engine" : given;
}

std::string python_path() {
  const std::string given = variable("ULYSSES_PYTHON").value_or("");
  return given.empty() ? fs::path(program_folder()).parent_path() / ".venv/bin/python" : fs::path(given);
}

std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::optional<std::string>>>& changes) {
  std::vector<std::string> all;
  for (char** at = environ; at && *at; ++at) {
    const std::string_view entry = *at;
    const std::string_view name = entry.substr(0, entry.find('='));
    if (std::none_of(changes.begin(), changes.end(), [&](const auto& change) { return change.first == name; })) all.emplace_back(entry);
  }
  for (const auto& [name, value] : changes)
    if (value) all.push_back(name + "=" + *value);
  return all;
}

}  // namespace uly::launch
