#include "recipe/recipe.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "base/check.h"
#include "recipe/override.h"
#include "recipe/read.h"
#include "recipe/rules.h"
#include "recipe/secret.h"

namespace uly::recipe {
namespace {

constexpr size_t kMaxBytes = 1 << 20;

std::string read_text(const std::string& path) {
  std::error_code ignored;
  ULY_USER_CHECK(!std::filesystem::is_directory(path, ignored), "{}: expected a recipe file, found a folder", path);
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  ULY_USER_CHECK(file.is_open(), "{}: cannot read the recipe: {}", path, std::strerror(errno));
  std::string text(kMaxBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  ULY_USER_CHECK(text.size() <= kMaxBytes, "{}: expected a recipe of at most 1 MiB, found a larger file", path);
  ULY_USER_CHECK(!file.bad(), "{}: cannot read the recipe: {}", path, std::strerror(errno));
  return text;
}

// Fills in the defaults that follow from other keys.
void complete(Recipe& recipe, Json& whole) {
  Json& tokenizer = whole["tokenizer"]["name_or_path"];
  if (tokenizer.is_null()) tokenizer = recipe.model.name_or_path;
  recipe.tokenizer.name_or_path = tokenizer;

  Json& data = whole["data"];
  if (data["type"].is_null()) data["type"] = recipe.type;
  const char* const source_type = recipe.type == "causal" ? "huggingface" : "huggingface_instruct";
  const auto complete_sources = [&](Json& list, std::vector<Source>& sources) {
    for (size_t i = 0; i < sources.size(); ++i) {
      if (list[i]["type"].is_null()) list[i]["type"] = source_type;
      sources[i].as_given = list[i];
    }
  };
  complete_sources(data["sources"], recipe.data.sources);
  complete_sources(data["eval_sources"], recipe.data.eval_sources);
  recipe.data.as_given = data;
}

// Whatever stands there; null, true and false tell nothing.
void hide_secrets(Json& value) {
  if (value.is_array())
    for (Json& item : value) hide_secrets(item);
  if (!value.is_object()) return;
  for (auto& [key, item] : value.items()) {
    if (!names_a_secret(key)) hide_secrets(item);
    else if (!item.is_null() && !item.is_boolean()) item = "hidden";
  }
}

}  // namespace

std::string Recipe::where(const std::string& key) const {
  const auto found = locations.find(key);
  return found == locations.end() ? path : found->second;
}

Recipe load(const std::string& path, const std::vector<std::string>& overrides) {
  NodePtr root = read_yaml(read_text(path), path, true);
  ULY_USER_CHECK(!root->is_null(), "{}: the recipe is empty: expected a mapping with at least 'model' and 'data'", path);
  ULY_USER_CHECK(root->kind == Node::Kind::kMapping, "{}:{}: expected a mapping of keys, found {}", path, root->line, describe(*root));
  for (const std::string& assignment : overrides) root = with_override(root, assignment);

  Recipe recipe;
  recipe.path = path;
  recipe.normalized = read_recipe(recipe_section(), *root, recipe);
  complete(recipe, recipe.normalized);
  check_rules(recipe);
  hide_secrets(recipe.normalized);
  return recipe;
}

bool saves_on_the_way(const Checkpoint& c) { return c.enabled && (c.save_every_n_steps > 0 || c.save_every_n_epochs > 0); }

bool saves_states(const Recipe& r) {
  return std::any_of(r.checkpoint.begin(), r.checkpoint.end(), [](const Checkpoint& c) { return c.enabled && c.type != "huggingface" && (saves_on_the_way(c) || c.save_end_of_training || c.auto_resume); });
}

}  // namespace uly::recipe
