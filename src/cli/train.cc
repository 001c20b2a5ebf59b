#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/log.h"
#include "checkpoint/hub.h"
#include "cli/job.h"
#include "launch/local.h"

namespace uly::cli {
namespace {

void refuse_what_comes_later(const recipe::Recipe& recipe) {
  if (recipe.later.empty()) return;
  const recipe::Recipe::Note& first = recipe.later.front();
  user_error("{}: {}: {}: not available yet", first.where, first.key, first.text);
}

void check_device(const Ranks& ranks) {
  if (!ranks.cuda) return;
  const launch::Gpus& gpus = ranks.gpus;
  const std::string shown = gpus.variable ? fmt::format("CUDA_VISIBLE_DEVICES={}", *gpus.variable) : "this machine";
  ULY_USER_CHECK(gpus.visible > 0, "--device cuda: no GPU is visible: {}", gpus.in_machine > 0 ? shown + " shows none" : "this machine has none");
  const int64_t needed = ranks.place ? ranks.place->local_world_size : ranks.world;
  ULY_USER_CHECK(needed <= gpus.visible, "{} ranks need as many GPUs on this machine; {} shows {}", needed, shown, gpus.visible);
  user_error("training on GPUs is not available in this version; use --device cpu");
}

// What one look at the model's files and folders tells is said now: here once, not by every rank after the data is prepared.
void check_model(const recipe::Recipe& recipe, const models::Spec& spec) {
  if (!recipe.model.random_init && !spec.randomly_initialized) checkpoint::HubReader(spec.folder, spec);
  for (size_t i = 0; i < recipe.checkpoint.size(); ++i) {
    const recipe::Checkpoint& c = recipe.checkpoint[i];
    std::error_code ignored;
    const std::string key = recipe.locations.contains(fmt::format("checkpoint.{}.output_dir", i)) ? fmt::format("checkpoint.{}.output_dir", i) : "checkpoint";
    ULY_USER_CHECK(!c.enabled || !std::filesystem::equivalent(c.output_dir, spec.folder, ignored), "{} ({}): expected a folder other than the model's own, found {}", key,
                   recipe.where(key), c.output_dir);
  }
}

std::vector<std::string> engine_command(const Options& options, const models::Spec& spec, const std::string& tokenizer, const plan::DataFacts& facts) {
  std::vector<std::string> command = {launch::engine_path(), "train",    options.recipe, "--model", model_place(spec), "--tokens",
                                      facts.tokens_path,     "--device", "cpu"};
  if (!tokenizer.empty()) command.insert(command.end(), {"--tokenizer", tokenizer});
  if (!options.dump_folder.empty()) command.insert(command.end(), {"--dump", options.dump_folder});
  command.insert(command.end(), options.overrides.begin(), options.overrides.end());
  return command;
}

// Becomes the engine: the launcher that started this process watches it and has set its environment.
[[noreturn]] void become_engine(const std::vector<std::string>& command) {
  std::fflush(stdout);
  std::vector<char*> arguments;
  for (const std::string& a : command) arguments.push_back(const_cast<char*>(a.c_str()));
  arguments.push_back(nullptr);
  ::execv(arguments[0], arguments.data());
  user_error("{}: cannot be started: {}", command[0], std::strerror(errno));
}

}  // namespace

int train(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const Ranks ranks = choose_ranks(options, recipe, true);
  check_device(ranks);
  refuse_what_comes_later(recipe);
  const std::string engine = launch::engine_path();
  ULY_USER_CHECK(::access(engine.c_str(), X_OK) == 0, "{}: expected the engine here: {}; `make build` makes it", engine, std::strerror(errno));
  const bool speaks = !ranks.place || ranks.place->rank == 0;
  if (speaks && !ranks.why.empty()) say("device: cpu ({})", ranks.why);

  const models::Spec spec = find_model(recipe, Fetch::kWeights);
  const plan::Machine machine = plan::this_machine(ranks.cuda, ranks.gpus.visible);
  plan::make(recipe, spec, machine, ranks.world, std::nullopt);  // what cannot be is said before data is prepared for long
  check_model(recipe, spec);
  const plan::DataFacts facts = prepare_data(recipe, spec);
  const plan::Plan plan = plan::make(recipe, spec, machine, ranks.world, facts);
  if (!plan.fits) throw WillNotFit(plan.why_not);

  const std::vector<std::string> command = engine_command(options, spec, tokenizer_folder(recipe), facts);
  if (ranks.place) become_engine(command);
  return launch::run_local({.command = command, .ranks = ranks.world, .master_port = options.master_port, .cores = machine.cores});
}

}  // namespace uly::cli
