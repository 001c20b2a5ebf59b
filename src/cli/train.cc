#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
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

// A trace that cannot be written is said before three steps have been waited for.
void check_profile(const std::string& path) {
  if (path.empty()) return;
  std::error_code ignored;
  const std::filesystem::path parent = std::filesystem::absolute(path).parent_path();
  ULY_USER_CHECK(!std::filesystem::is_directory(path, ignored), "--profile: expected a file, found the folder {}", path);
  ULY_USER_CHECK(::access(parent.c_str(), W_OK) == 0, "--profile: {} cannot be written: {}", path, std::strerror(errno));
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

std::vector<std::string> engine_command(const Options& options, bool cuda, const plan::Machine& machine, const models::Spec& spec, const std::string& tokenizer, const plan::DataFacts& facts) {
  std::vector<std::string> command = {engine_program(), "train", options.recipe, "--model", model_place(spec), "--tokens", facts.tokens_path, "--device", cuda ? "cuda" : "cpu"};
  if (!facts.eval_tokens_path.empty()) command.insert(command.end(), {"--eval-tokens", facts.eval_tokens_path});
  if (machine.measured) command.insert(command.end(), {"--rates", launch::rates_path()});
  if (!tokenizer.empty()) command.insert(command.end(), {"--tokenizer", tokenizer});
  if (!options.dump_folder.empty()) command.insert(command.end(), {"--dump", options.dump_folder});
  command.insert(command.end(), {"--began", fmt::format("{:.3f}", std::chrono::duration<double>(options.started.time_since_epoch()).count() - options.elapsed_seconds)});
  if (options.restart_data) command.push_back("--restart-data");
  if (!options.profile_path.empty()) command.insert(command.end(), {"--profile", options.profile_path});
  command.insert(command.end(), options.overrides.begin(), options.overrides.end());
  return command;
}

// Becomes the engine: the launcher that started this process watches it and has set its environment.
[[noreturn]] void become_engine(const std::vector<std::string>& command) {
  std::fflush(stdout);
  sigset_t held;
  ::sigemptyset(&held);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaddset(&held, signal);
  ::sigprocmask(SIG_BLOCK, &held, nullptr);  // until it says what they mean
  ::setenv("CUDA_DEVICE_ORDER", launch::cuda_device_order().c_str(), 1);
  std::vector<char*> arguments;
  for (const std::string& a : command) arguments.push_back(const_cast<char*>(a.c_str()));
  arguments.push_back(nullptr);
  ::execv(arguments[0], arguments.data());
  user_error("{}: cannot be started: {}", command[0], std::strerror(errno));
}

}  // namespace

void check_restarts(const Options& options, const recipe::Recipe& recipe) {
  if (options.max_restarts == 0) return;
  const bool resumes = std::any_of(recipe.checkpoint.begin(), recipe.checkpoint.end(), [](const recipe::Checkpoint& c) { return c.enabled && c.auto_resume; });
  ULY_USER_CHECK(resumes, "--max_restarts ({}): expected a state to go on from: checkpoint: [{{type: deepspeed, output_dir: ..., save_every_n_steps: ..., auto_resume: true}}]", recipe.where("checkpoint"));
  ULY_USER_CHECK(!options.restart_data, "--max_restarts: expected no --restart-data, which would begin the data anew at each restart");
  ULY_USER_CHECK(!options.no_ssh, "--max_restarts: expected no --no_ssh: nobody would start the ranks of all machines again together");
}

std::string engine_program() {
  const std::string engine = launch::engine_path();
  ULY_USER_CHECK(::access(engine.c_str(), X_OK) == 0, "{}: expected the engine here: {}; `make build` makes it", engine, std::strerror(errno));
  return engine;
}

void check_meeting_place(const Ranks& ranks) {
  if (ranks.place && ranks.place->world_size > 1) {
    const bool by_agent = launch::variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
    launch::check_meeting_place(ranks.place->master_address, ranks.place->rank == 0 && !by_agent, launch::variable("SLURM_STEP_ID") ? "environment variable MASTER_ADDR, without it SLURM's first node" : "environment variable MASTER_ADDR");
  } else if (ranks.node && ranks.node->hosts.size() > 1) {
    launch::check_meeting_place(ranks.node->master_address, ranks.node->index == 0, "--master_addr");
  }
}

void wait_for_machines(const Ranks& ranks) {
  if (ranks.node && ranks.node->leash) ranks.node->leash->wait_for_go();
}

int run_ranks(const Options& options, const Ranks& ranks, const plan::Machine& machine, const std::vector<std::string>& command) {
  if (ranks.place) {
    ULY_USER_CHECK(options.max_restarts == 0, "--max_restarts: this process belongs to a job that another launcher has started (RANK is set), which would have to start all ranks again: torchrun has --max-restarts, SLURM --requeue");
    become_engine(command);
  }
  return launch::with_restarts(options.max_restarts, [&](double elapsed) {
    launch::LocalJob job{.command = command, .ranks = ranks.here(), .master_port = options.master_port, .cores = machine.cores, .log_folder = options.log_folder, .node = ranks.node ? &*ranks.node : nullptr};
    elapsed += options.elapsed_seconds;
    job.again = elapsed > 0.5;  // a restart waits a second before it
    return launch::run_local(job);
  });
}

int train(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const Ranks ranks = choose_ranks(options, recipe, true);
  if (ranks.cuda && ranks.obstacle) throw UserError(ranks.obstacle->sentence());
  check_profile(options.profile_path);
  check_restarts(options, recipe);
  refuse_what_comes_later(recipe);
  engine_program();
  if (ranks.place) launch::set_place(*ranks.place);
  if (recipe::saves_states(recipe)) take_signals(ranks.place.has_value());
  std::optional<EarlyStop> watch;
  if (!ranks.node || !ranks.node->leash) watch.emplace(recipe, options, ranks);  // else the leader looks
  check_meeting_place(ranks);
  if (ranks.speaks() && !ranks.chosen) say("device: {}", device_words(ranks));

  const models::Spec spec = find_model(recipe, Fetch::kWeights);
  const plan::Machine machine = machine_of(ranks);
  plan::make(recipe, spec, machine, ranks.world, std::nullopt);  // what cannot be is said before data is prepared for long
  check_model(recipe, spec);
  const plan::DataFacts facts = prepare_data(recipe, spec);
  const plan::Plan plan = plan::make(recipe, spec, machine, ranks.world, facts);
  if (!plan.fits) throw WillNotFit(plan.why_not);

  wait_for_machines(ranks);
  watch.reset();
  return run_ranks(options, ranks, machine, engine_command(options, ranks.cuda, machine, spec, tokenizer_folder(recipe), facts));
}

}  // namespace uly::cli
