#include <fmt/format.h>

#include <cstdio>
#include <filesystem>

#include "base/check.h"
#include "base/units.h"
#include "cli/job.h"
#include "launch/python.h"

namespace uly::cli {
namespace {

namespace fs = std::filesystem;

bool has_weights(const std::string& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (entry.path().extension() == ".safetensors") return true;
  return false;
}

}  // namespace

models::Spec find_model(const recipe::Recipe& recipe, Fetch fetch) {
  const std::string& name = recipe.model.name_or_path;
  const std::string hub = launch::hub_cache_folder();
  std::error_code error;
  const bool here = fs::is_directory(name, error);
  std::optional<models::Spec> spec;
  try {
    spec = models::find(name, hub, recipe.model.hf_config_kwargs);
  } catch (const UserError&) {
    if (fetch == Fetch::kNothing || here || !models::cached_snapshot(name, hub).empty()) throw;
  }
  const bool wants_weights = fetch == Fetch::kWeights && !recipe.model.random_init && !(spec && spec->randomly_initialized);
  if (spec && (here || !wants_weights || has_weights(spec->folder))) return *spec;
  std::vector<std::string> arguments = {name};
  if (!wants_weights) arguments.push_back("--tokenizer-only");
  spec = models::find(launch::run_python("ulysses_plus.fetch", arguments), hub, recipe.model.hf_config_kwargs);
  spec->name = name;
  return *spec;
}

std::string model_place(const models::Spec& spec) { return spec.folder.empty() ? spec.name : spec.folder; }

std::string tokenizer_folder(const recipe::Recipe& recipe) {
  const std::string& name = recipe.tokenizer.name_or_path;
  if (name == recipe.model.name_or_path) return "";
  std::error_code error;
  return fs::is_directory(name, error) ? name : models::cached_snapshot(name, launch::hub_cache_folder());
}

plan::DataFacts prepare_data(const recipe::Recipe& recipe, const models::Spec& spec) {
  Json request;
  request["type"] = recipe.type;
  request["tokenizer"] = recipe.tokenizer.name_or_path;
  request["vocab_size"] = spec.V;
  request["data"] = recipe.data.as_given;
  request["where"] = Json::object();
  for (const auto& [key, place] : recipe.locations) request["where"][key] = place;
  const Json answer = launch::run_python("ulysses_plus.prepare", request);
  try {
    plan::DataFacts facts;
    facts.tokens_path = answer.at("tokens").get<std::string>();
    facts.num_samples = answer.at("num_samples").get<int64_t>();
    facts.longest = answer.at("longest").get<int64_t>();
    facts.num_tokens = answer.at("num_tokens").get<int64_t>();
    facts.num_trained_tokens = answer.at("num_trained_tokens").get<int64_t>();
    return facts;
  } catch (const Json::exception& e) {
    throw InternalError(fmt::format("what ulysses_plus.prepare answered is not complete: {}", e.what()));
  }
}

int prepare(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const plan::DataFacts facts = prepare_data(recipe, find_model(recipe, Fetch::kConfiguration));
  if (options.json) {
    const Json out = {{"tokens", facts.tokens_path},
                      {"num_samples", facts.num_samples},
                      {"longest", facts.longest},
                      {"num_tokens", facts.num_tokens},
                      {"num_trained_tokens", facts.num_trained_tokens}};
    fmt::print("{}\n", out.dump(2));
    return 0;
  }
  fmt::print("{} samples, {} tokens, {} of them trained; the longest has {}\n{}\n", format_count(facts.num_samples), format_count(facts.num_tokens),
             format_count(facts.num_trained_tokens), format_count(facts.longest), facts.tokens_path);
  return 0;
}

}  // namespace uly::cli
