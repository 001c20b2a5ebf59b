// The command line: the table of verbs, their options, and the one place where errors become exit codes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <optional>

#include "base/check.h"
#include "cli/verbs.h"

namespace uly::cli {
namespace {

struct Verb {
  const char* name;
  const char* doc;
  int (*run)(const Options&);  // null: not available yet
  bool takes_recipe;
};

constexpr std::array<Verb, 10> kVerbs = {{
    {"train", "Train as the recipe says; the verb may be left out", train, true},
    {"plan", "Show what training would do and the memory it takes; starts nothing, asks no network", plan, true},
    {"rehearse", "Run one step without data, weights and arithmetic: bytes and copies against the plan", rehearse, true},
    {"prepare", "Tokenise the recipe's data into the cache, and stop", prepare, true},
    {"process-data", "The same as prepare", prepare, true},
    {"docs", "Print the reference of all recipe keys", docs, false},
    {"doctor", "Say what this machine has and what is missing", doctor, false},
    {"export", "Turn a saved state into a Hugging Face model (not available yet)", nullptr, false},
    {"selftest", "Check this machine's arithmetic and network (not available yet)", nullptr, false},
    {"report", "Draw a run's metrics (not available yet)", nullptr, false},
}};

// Options of the reference's launcher that users may still have in their scripts.
struct Refused {
  const char* names;
  bool takes_value;
  bool several_machines;
};
constexpr std::array<Refused, 34> kRefused = {{
    {"-H,--hostfile", true, true},
    {"-i,--include", true, true},
    {"-e,--exclude", true, true},
    {"--num_nodes", true, true},
    {"--master_addr", true, true},
    {"--node_rank", true, true},
    {"--launcher", true, true},
    {"--launcher_args", true, true},
    {"--no_ssh", false, true},
    {"--no_ssh_check", false, true},
    {"--ssh_port", true, true},
    {"--force_multi", false, true},
    {"--module", false, false},
    {"--no_python", false, false},
    {"--no_local_rank", false, false},
    {"--save_pid", false, false},
    {"--enable_each_rank_log", true, false},
    {"--bind_cores_to_rank", false, false},
    {"--bind_core_list", true, false},
    {"--venv_script", true, false},
    {"--log_level", true, false},
    {"-q,--quiet", false, false},
    {"--autotuning", true, false},
    {"--elastic_training", false, false},
    {"--min_elastic_nodes", true, false},
    {"--max_elastic_nodes", true, false},
    {"--python_profile", true, false},
    {"--mode", true, false},
    {"--config", true, false},
    {"--deepspeed", false, false},
    {"--deepspeed_config", true, false},
    {"--resume", false, false},
    {"--hosts", true, true},
    {"--nnodes", true, true},
}};

std::string help() {
  std::string text =
      "Post-trains Hugging Face decoder models on very long sequences.\n\n"
      "  ulysses [VERB] RECIPE.yml [options] [key.path=value ...]\n\nVerbs\n";
  for (const Verb& v : kVerbs) text += fmt::format("  {:<13} {}\n", v.name, v.doc);
  text +=
      "\nOptions\n"
      "  --device cpu|cuda     where to train; without it, on the GPUs if they can be used\n"
      "  --num_gpus N          ranks on this machine, one a GPU (on the CPU: one a process); also --num_accelerators\n"
      "  --master_port PORT    where the ranks meet; without it, a free port\n"
      "  --profile FILE        train: write a Chrome trace of the last of the first three steps\n"
      "  --gpus N --nodes N --gpu H100 --gpu-memory 80GiB --host-memory 1.9TiB --host-cores N --disk 7TiB\n"
      "                        plan: for a machine that one does not have\n"
      "  --explain             plan: what else was considered, and why it was not chosen\n"
      "  --compare KEY=V1,V2   plan: a table, a row for each value; with several, for each combination\n"
      "  --show N              prepare: print the first N samples, and what of them is trained\n"
      "  --json                plan, rehearse, prepare, doctor: for programs\n"
      "  --version, --help\n"
      "\nExamples\n"
      "  ulysses plan run.yml                                  will it fit, how far would it go, how long will it take?\n"
      "  ulysses plan run.yml --compare data.max_length=32k,64k --compare sequence_parallel_size=1,2,4\n"
      "  ulysses run.yml --device cpu                          train; sequence_parallel_size ranks\n"
      "  ulysses run.yml --num_gpus 4 data.max_length=32k      change keys without editing the file\n"
      "  torchrun --nproc-per-node 4 --no-python ulysses run.yml   as ranks of a job that another launcher starts\n"
      "\nExit codes: 0 done, 2 something must be changed by you, 3 it will not fit, 70 a fault of this program,\n"
      "75 a device, network or peer failed, 76 numbers became NaN or infinite, 85 saved and stopped.\n";
  return text;
}

void refuse(const Refused& option) {
  const std::string names = option.names;
  const std::string name = names.substr(names.rfind(',') == std::string::npos ? 0 : names.rfind(',') + 1);
  if (option.several_machines)
    user_error("{}: starting ranks on several machines is not available yet; torchrun can: torchrun --nnodes ... --no-python ulysses RECIPE.yml", name);
  user_error("{}: not available yet", name);
}

// Reads what follows the verb. Returns the exit code if all is said (--help), else nothing.
std::optional<int> read_options(const Verb& verb, std::vector<std::string> arguments, Options& options) {
  CLI::App app{verb.doc, fmt::format("ulysses {}", verb.name)};
  std::vector<std::string> words;
  std::string ignored;
  bool ignored_flag = false;
  int64_t num_ranks = 0;
  app.add_option("words", words, verb.takes_recipe ? "RECIPE.yml, then key.path=value ..." : "nothing");
  app.add_option_function<std::string>(
      "--device", [&](const std::string& device) { options.device = device; }, "cpu or cuda");
  const CLI::Option* ranks = app.add_option("--num_gpus,--num_accelerators,--num-gpus", num_ranks, "ranks on this machine");
  app.add_option("--master_port,--master-port", options.master_port, "port at which the ranks meet")->check(CLI::Range(1, 65535));
  app.add_flag("--json", options.json, "for programs");
  if (std::string_view(verb.name) == "plan") {
    WhatIf& what = options.what_if;
    app.add_option("--gpus", num_ranks, "ranks, one a GPU")->each([&](const std::string&) { what.given = true; });
    app.add_option("--nodes", what.nodes, "machines over which they are spread")->check(CLI::PositiveNumber);
    app.add_option("--gpu", what.gpu, "A100, H100, H200, B200");
    app.add_option("--gpu-memory", what.gpu_memory, "of each");
    app.add_option("--host-memory", what.host_memory, "of each machine");
    app.add_option("--host-cores", what.host_cores, "of each machine")->check(CLI::PositiveNumber);
    app.add_option("--disk", what.disk, "of each machine, for scratch files");
    app.add_flag("--explain", options.explain, "what else was considered");
    app.add_option("--compare", options.compare, "KEY=V1,V2,...: a row for each value, or for each combination of several keys'")->allow_extra_args(false);
  }
  if (std::string_view(verb.name) == "prepare" || std::string_view(verb.name) == "process-data")
    app.add_option("--show", options.show, "print this many samples, and what of them is trained")->check(CLI::PositiveNumber);
  app.add_option("--profile", options.profile_path, "write a Chrome trace of the last of the first three steps");
  app.add_option("--dump", options.dump_folder, "")->group("");         // loss and gradients of each step, for tests
  app.add_option("--local_rank,--local-rank", ignored, "")->group("");  // other launchers pass it; LOCAL_RANK says it
  std::vector<const CLI::Option*> refused;
  for (const Refused& r : kRefused)
    refused.push_back(r.takes_value ? app.add_option(std::string(r.names), ignored, "")->group("")
                                    : app.add_flag(std::string(r.names), ignored_flag, "")->group(""));
  std::reverse(arguments.begin(), arguments.end());
  try {
    app.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    std::fputs(help().c_str(), stdout);
    return 0;
  } catch (const CLI::ParseError& e) {
    for (size_t i = 0; i < refused.size(); ++i)
      if (refused[i]->count() > 0) refuse(kRefused[i]);
    user_error("ulysses {}: {}; see ulysses --help", verb.name, e.what());
  }
  for (size_t i = 0; i < refused.size(); ++i)
    if (refused[i]->count() > 0) refuse(kRefused[i]);
  if (ranks->count() > 0 || options.what_if.given) options.num_ranks = num_ranks;
  if (!verb.takes_recipe) {
    ULY_USER_CHECK(words.empty(), "ulysses {}: expected no more arguments, found '{}'", verb.name, words.empty() ? "" : words[0]);
    return std::nullopt;
  }
  ULY_USER_CHECK(!words.empty(), "ulysses {}: expected a recipe, found none: ulysses {} RECIPE.yml", verb.name, verb.name);
  options.recipe = words[0];
  for (size_t i = 1; i < words.size(); ++i) {
    const size_t equals = words[i].find('=');
    ULY_USER_CHECK(equals != std::string::npos && equals > 0, "command line: expected key.path=value after the recipe, found '{}'", words[i]);
    options.overrides.push_back(words[i]);
  }
  return std::nullopt;
}

int run(std::vector<std::string> arguments) {
  if (arguments.empty()) {
    std::fputs(help().c_str(), stderr);
    return static_cast<int>(Exit::kUser);
  }
  if (arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    std::fputs(help().c_str(), stdout);
    return 0;
  }
  if (arguments[0] == "--version") {
    fmt::print("ulysses {}\n", kVersion);
    return 0;
  }
  const Verb* verb = &kVerbs[0];
  for (const Verb& v : kVerbs)
    if (arguments[0] == v.name) verb = &v;
  if (arguments[0] == verb->name) arguments.erase(arguments.begin());
  if (verb->run == nullptr) not_available(verb->name);
  Options options;
  const std::optional<int> done = read_options(*verb, std::move(arguments), options);
  return done ? *done : verb->run(options);
}

}  // namespace
}  // namespace uly::cli

int main(int argc, char** argv) {
  try {
    return uly::cli::run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const uly::InternalError& e) {
    fmt::print(stderr, "internal error: {}\n", e.what());
    return static_cast<int>(e.exit());
  } catch (const uly::Error& e) {
    // No text: who failed has spoken.
    if (*e.what() != '\0') fmt::print(stderr, "{}\n", e.what());
    return static_cast<int>(e.exit());
  } catch (const std::exception& e) {
    fmt::print(stderr, "internal error: {}\n", e.what());
    return static_cast<int>(uly::Exit::kInternal);
  }
}
