#include "launch/exports.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "base/check.h"
#include "base/json.h"
#include "launch/environment.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

// The reference's, and what this program and what it calls read.
constexpr std::array<std::string_view, 13> kPrefixes = {"MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "WANDB", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "ULYSSES_", "OMP_", "CUDA_DEVICE_ORDER"};
// They say where things are on this machine, or are this job's own.
constexpr std::array<std::string_view, 4> kOurs = {"ULYSSES_ENGINE", "ULYSSES_PYTHON", "ULYSSES_JOB_TOKEN", "ULYSSES_STARTED"};

bool is_exported(std::string_view name) {
  return std::any_of(kPrefixes.begin(), kPrefixes.end(), [&](std::string_view prefix) { return name.starts_with(prefix); }) && std::find(kOurs.begin(), kOurs.end(), name) == kOurs.end();
}

// What may be printed of a name.
std::string readable(std::string_view name) {
  std::string text(name);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  return text;
}

void set(Variables& all, std::string name, std::string value) {
  std::erase_if(all, [&](const auto& v) { return v.first == name; });
  all.emplace_back(std::move(name), std::move(value));
}

void read_file(const fs::path& path, Variables& all) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return;
  std::ifstream file(path);
  ULY_USER_CHECK(file.good(), "{}: cannot be read", path.string());
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    if (line.ends_with('\r')) line.pop_back();
    const size_t first = line.find_first_not_of(" \t");
    if (first == std::string::npos || line[first] == '#') continue;
    const size_t equals = line.find('=');
    const std::string name = equals == std::string::npos ? "" : line.substr(first, equals - first);
    // What the line holds may be a secret: it is not repeated.
    ULY_USER_CHECK(!name.empty() && !std::isdigit(static_cast<unsigned char>(name[0])) && std::all_of(name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }),
                   "{}:{}: expected KEY=VALUE, a blank line or a comment", path.string(), number);
    ULY_USER_CHECK(is_utf8(line.substr(equals + 1)), "{}:{}: {}: expected a value in UTF-8", path.string(), number, name);
    set(all, name, line.substr(equals + 1));
  }
}

}  // namespace

bool is_utf8(std::string_view text) {
  try {
    return !Json(text).dump().empty();
  } catch (const Json::type_error&) {  // JSON is UTF-8, and written only so
    return false;
  }
}

Variables exported_variables() {
  Variables all;
  for (char** at = environ; at && *at; ++at) {
    const std::string_view entry = *at;
    const size_t equals = entry.find('=');
    if (equals == std::string_view::npos || !is_exported(entry.substr(0, equals))) continue;
    ULY_USER_CHECK(is_utf8(entry), "environment variable {}: expected a value in UTF-8, as ranks on other machines get it", readable(entry.substr(0, equals)));
    set(all, std::string(entry.substr(0, equals)), std::string(entry.substr(equals + 1)));
  }
  const std::string name = variable("DS_ENV_FILE").value_or(".deepspeed_env");
  std::error_code error;
  const fs::path here = fs::current_path(error) / name, home = fs::path(variable("HOME").value_or("/")) / name;
  ULY_USER_CHECK(!variable("DS_ENV_FILE") || fs::is_regular_file(here, error) || fs::is_regular_file(home, error), "environment variable DS_ENV_FILE: expected a file of lines KEY=VALUE, found none at {} nor at {}", here.string(), home.string());
  if (here != home) read_file(home, all);
  read_file(here, all);
  return all;
}

}  // namespace uly::launch
