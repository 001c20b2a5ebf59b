// From a name to a Spec: a folder, the hub's cache, the table of known shapes; then the overrides of the recipe.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include "base/check.h"
#include "models/config.h"
#include "models/known.h"

namespace uly::models {
namespace {

namespace fs = std::filesystem;

std::optional<std::string> read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

bool exists(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored);
}

Json read_config(const fs::path& path) {
  const std::optional<std::string> text = read_text(path);
  ULY_USER_CHECK(text, "{}: cannot be read", path.string());
  try {
    return Json::parse(*text);
  } catch (const Json::exception& error) {
    user_error("{}: not JSON: {}", path.string(), error.what());
  }
}

// Keys that say nothing about a model's shape and that a recipe may well set.
bool is_harmless(const std::string& key) {
  for (const char* known : {"dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "attn_implementation", "output_attentions",
                            "output_hidden_states", "return_dict", "transformers_version", "name_or_path"})
    if (key == known) return true;
  return key.starts_with("_");
}

// Both spellings of rope may meet, one in the file and one in the overrides: what is overridden must win.
void override_rope(const Json& overrides, Json& config) {
  const auto mapping_of = [](Json& json, const char* key) -> Json* {
    const auto it = json.find(key);
    return it == json.end() || !it->is_object() ? nullptr : &*it;
  };
  if (overrides.contains("rope_scaling") && !overrides.contains("rope_parameters")) {
    const Json* old = mapping_of(config, "rope_parameters");
    if (old != nullptr && old->contains("rope_theta")) config["rope_theta"] = (*old)["rope_theta"];
    config.erase("rope_parameters");
  }
  if (overrides.contains("rope_parameters") && !overrides.contains("rope_scaling")) config.erase("rope_scaling");
  if (overrides.contains("rope_theta"))
    for (const char* key : {"rope_scaling", "rope_parameters"})
      if (Json* old = mapping_of(config, key); old != nullptr && !overrides.contains(key)) old->erase("rope_theta");
}

Json with_overrides(Json config, const Json& overrides) {
  override_rope(overrides, config);
  // A list of one entry a layer no longer fits; without it the family's own rule holds.
  if (overrides.contains("num_hidden_layers") && !overrides.contains("layer_types")) config.erase("layer_types");
  for (const auto& [key, value] : overrides.items()) config[key] = value;
  return config;
}

// Throws for an override that the file does not have and that nothing looks up: most likely a typo.
void check_overrides(const Json& original, const Json& overrides, const Config& config, const std::string& family) {
  for (const auto& [key, value] : overrides.items())
    ULY_USER_CHECK(original.contains(key) || config.asked().contains(key) || is_harmless(key),
                   "model.hf_config_kwargs.{}: expected a key of config.json, found one that neither {} nor the {} family has", key, config.where(), family);
}

Spec make(const std::string& name, const std::string& folder, const Json& original, const std::string& where, const Json& overrides) {
  ULY_USER_CHECK(overrides.is_object() || overrides.is_null(), "model.hf_config_kwargs: expected a mapping, found {}", overrides.type_name());
  const Json changed = overrides.is_object() ? with_overrides(original, overrides) : original;
  const Config config(changed, overrides.empty() ? where : where + " with model.hf_config_kwargs");
  Spec spec = read_spec(config);
  if (overrides.is_object()) check_overrides(original, overrides, config, spec.family);
  spec.name = name;
  spec.folder = folder;
  const auto layers = original.find("num_hidden_layers");
  spec.randomly_initialized = overrides.contains("num_hidden_layers") && (layers == original.end() || *layers != overrides["num_hidden_layers"]);
  return spec;
}

// Whether this may be the name of a repository of the hub: no path.
bool is_repository(const std::string& name) {
  const bool one_slash = std::count(name.begin(), name.end(), '/') <= 1 && name.find("..") == std::string::npos;
  return !name.empty() && one_slash && name.front() != '/' && name.front() != '.' && name.front() != '~';
}

}  // namespace

std::string cached_snapshot(const std::string& repository, const std::string& hub_cache) {
  if (hub_cache.empty() || !is_repository(repository)) return "";
  std::string folder = "models--" + repository;
  if (const size_t slash = folder.find('/'); slash != std::string::npos) folder.replace(slash, 1, "--");
  const fs::path place = fs::path(hub_cache) / folder;
  std::string revision = read_text(place / "refs" / "main").value_or("");
  revision.erase(std::remove_if(revision.begin(), revision.end(), [](unsigned char c) { return std::isspace(c) != 0; }), revision.end());
  if (revision.empty() || revision.find('/') != std::string::npos || revision == "..") return "";
  const fs::path snapshot = place / "snapshots" / revision;
  std::error_code ignored;
  return fs::is_directory(snapshot, ignored) ? snapshot.string() : "";
}

Spec find(const std::string& name_or_path, const std::string& hub_cache, const Json& hf_config_kwargs) {
  std::vector<std::string> looked = {(fs::path(name_or_path) / "config.json").string()};
  if (const std::string snapshot = cached_snapshot(name_or_path, hub_cache); !exists(looked[0]) && !snapshot.empty())
    looked.push_back((fs::path(snapshot) / "config.json").string());
  for (const std::string& path : looked)
    if (exists(path)) return make(name_or_path, fs::path(path).parent_path().string(), read_config(path), path, hf_config_kwargs);
  if (const std::optional<Json> config = known_config(name_or_path)) return make(name_or_path, "", *config, name_or_path, hf_config_kwargs);
  std::error_code ignored;
  ULY_USER_CHECK(!fs::is_directory(name_or_path, ignored), "model.name_or_path: '{}': expected a folder in the Hugging Face layout, found one without config.json", name_or_path);
  const std::string download = is_repository(name_or_path) ? fmt::format(", or download it first (hf download {})", name_or_path) : "";
  const std::string cache = hub_cache.empty() ? "no hub cache" : "the hub cache " + hub_cache;
  user_error("model.name_or_path: '{}' is not there: looked for {}, in {}, and among the known shapes; give a folder{}",
             name_or_path, looked[0], cache, download);
}

}  // namespace uly::models
