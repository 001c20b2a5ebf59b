#include <fmt/format.h>

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
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

// What ulysses_plus.prepare says of a list of sources; see there. The first `show` samples come along as pieces of text, trained and not in turn.
Json ask_to_prepare(const recipe::Recipe& recipe, const models::Spec& spec, const char* list, int64_t show) {
  Json request;
  request["sources_key"] = list;
  request["type"] = recipe.type;
  request["tokenizer"] = recipe.tokenizer.name_or_path;
  request["vocab_size"] = spec.V;
  request["data"] = recipe.data.as_given;
  request["show"] = show;
  request["where"] = Json::object();
  for (const auto& [key, place] : recipe.locations) request["where"][key] = place;
  return launch::run_python("ulysses_plus.prepare", request);
}

plan::DataFacts facts_of(const Json& answer) {
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

// Text as a terminal may see it: control characters, which could steer it, as their pictures (U+2400 ...).
std::string harmless(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const auto byte = static_cast<unsigned char>(c);
    if (byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0) {  // U+0080 to U+009F are controls too
      out += "\xef\xbf\xbd";
      ++i;
    } else if (byte == 0x7f || (byte < 0x20 && c != '\n' && c != '\t')) {
      out += "\xe2\x90";
      out += static_cast<char>(byte == 0x7f ? 0xa1 : 0x80 + byte);
    } else {
      out += c;
    }
  }
  return out;
}

// Prints each sample, what is trained in green; in double brackets where colours would not be seen or are not wanted (NO_COLOR).
void print_samples(const Json& samples) {
  const char* const no_color = std::getenv("NO_COLOR");
  const bool colors = ::isatty(STDOUT_FILENO) == 1 && (no_color == nullptr || *no_color == '\0');
  const char* const begin = colors ? "\x1b[32m" : "\u27e6";
  const char* const end = colors ? "\x1b[0m" : "\u27e7";
  for (size_t i = 0; i < samples.size(); ++i) {
    const Json& sample = samples[i];
    fmt::print("sample {}: {} tokens, {} of them trained\n", i + 1, format_count(sample.at("num_tokens").get<int64_t>()),
               format_count(sample.at("num_trained_tokens").get<int64_t>()));
    for (const Json& piece : sample.at("pieces")) {
      const std::string text = harmless(piece.at("text").get<std::string>());
      if (piece.at("trained").get<bool>())
        fmt::print("{}{}{}", begin, text, end);
      else
        fmt::print("{}", text);
    }
    fmt::print("\n\n");
  }
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
  plan::DataFacts facts = facts_of(ask_to_prepare(recipe, spec, "sources", 0));
  if (!recipe.data.eval_sources.empty()) facts.eval_tokens_path = facts_of(ask_to_prepare(recipe, spec, "eval_sources", 0)).tokens_path;
  return facts;
}

int prepare(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const models::Spec spec = find_model(recipe, Fetch::kConfiguration);
  const auto in_words = [](const plan::DataFacts& facts) {
    return fmt::format("{} samples, {} tokens, {} of them trained; the longest has {}\n{}\n", format_count(facts.num_samples), format_count(facts.num_tokens), format_count(facts.num_trained_tokens),
                       format_count(facts.longest), facts.tokens_path);
  };
  const auto in_json = [](const Json& answer, const plan::DataFacts& facts) {
    return Json{{"tokens", facts.tokens_path},
                {"num_samples", facts.num_samples},
                {"longest", facts.longest},
                {"num_tokens", facts.num_tokens},
                {"num_trained_tokens", facts.num_trained_tokens},
                {"num_skipped", answer.value("num_skipped", int64_t{0})},
                {"num_empty", answer.value("num_empty", int64_t{0})}};
  };
  const Json answer = ask_to_prepare(recipe, spec, "sources", options.show);
  const plan::DataFacts facts = facts_of(answer);
  Json evaluation;
  if (!recipe.data.eval_sources.empty()) evaluation = ask_to_prepare(recipe, spec, "eval_sources", 0);
  if (options.json) {
    Json out = in_json(answer, facts);
    if (!evaluation.is_null()) out["evaluation"] = in_json(evaluation, facts_of(evaluation));
    if (options.show > 0) out["samples"] = answer.at("samples");
    fmt::print("{}\n", out.dump(2));
    return 0;
  }
  if (options.show > 0) print_samples(answer.at("samples"));
  fmt::print("{}", in_words(facts));
  if (!evaluation.is_null()) fmt::print("to evaluate on: {}", in_words(facts_of(evaluation)));
  return 0;
}

}  // namespace uly::cli
