// The command line: the table of verbs, their options, and the one place where errors become exit codes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <optional>

#include "base/check.h"
#include "base/log.h"
#include "cli/job.h"
#include "cli/verbs.h"
#include "launch/child.h"

namespace uly::cli {
namespace {

const CLI::Validator kPositive([](std::string& text) {
  const std::optional<int64_t> n = launch::whole_number(text);
  return n && *n > 0 ? std::string() : fmt::format("expected a whole number of at least 1, found '{}'", text);
}, "");

const CLI::Validator kNotNegative([](std::string& text) {
  const std::optional<int64_t> n = launch::whole_number(text);
  return n && *n >= 0 ? std::string() : fmt::format("expected a whole number from 0 on, found '{}'", text);
}, "");

const CLI::Validator kNotEmpty([](std::string& text) { return text.empty() ? std::string("expected a text, found none") : std::string(); }, "");

struct Verb {
  const char* name;
  const char* doc;
  int (*run)(const Options&);  // null: not available yet
  bool takes_recipe;
};

constexpr std::string_view kFollow = "follow";  // what a ulysses that leads says to one on another machine

constexpr std::array<Verb, 10> kVerbs = {{
    {"train", "Train as the recipe says; the verb may be left out", train, true},
    {"plan", "Show what training would do and the memory it takes; starts nothing, asks no network", plan, true},
    {"rehearse", "Run one step without data, weights and arithmetic: bytes and copies against the plan", rehearse, true},
    {"prepare", "Tokenise the recipe's data into the cache, and stop", prepare, true},
    {"process-data", "The same as prepare", prepare, true},
    {"docs", "Print the reference of all recipe keys", docs, false},
    {"doctor", "Say what this machine has and what is missing", doctor, false},
    {"export", "Turn a saved state of the recipe into a Hugging Face model", export_state, true},
    {"selftest", "Check this machine's arithmetic and network (not available yet)", nullptr, false},
    {"report", "Draw a run's metrics (not available yet)", nullptr, false},
}};

// Options of the reference's launcher that users may still have in their scripts. Those without effect say so, the others what to do.
struct Others {
  const char* names;
  bool takes_value;
  const char* refused;    // null: no effect
};
constexpr const char* kBackEnds = "ranks are started over ssh, or take their places from srun, torchrun or mpirun: start ulysses with one of these";
constexpr const char* kNotYet = "not available yet";
constexpr std::array<Others, 22> kOthers = {{
    {"--launcher", true, kBackEnds},
    {"--launcher_args", true, kBackEnds},
    {"--hosts", true, "use --hostfile"},
    {"--nnodes", true, "use --num_nodes with a --hostfile, or torchrun"},
    {"--no_ssh_check", false, nullptr},
    {"--module", false, "the program is ulysses itself"},
    {"--no_python", false, nullptr},
    {"--no_local_rank", false, nullptr},
    {"--save_pid", false, kNotYet},
    {"--bind_cores_to_rank", false, kNotYet},
    {"--bind_core_list", true, kNotYet},
    {"--venv_script", true, "ulysses brings its own Python environment"},
    {"--log_level", true, nullptr},
    {"-q,--quiet", false, nullptr},
    {"--autotuning", true, "`ulysses plan` chooses"},
    {"--elastic_training", false, kNotYet},
    {"--min_elastic_nodes", true, kNotYet},
    {"--max_elastic_nodes", true, kNotYet},
    {"--python_profile", true, "use --profile FILE"},
    {"--mode", true, "use `ulysses train` or `ulysses prepare`"},
    {"--config", true, "give the recipe after the verb"},
    {"--resume", false, kNotYet},
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
      "  --hostfile FILE       machines to train on, over ssh, a line each: `name slots=8`; also -H\n"
      "  --include, --exclude  of these hosts and slots, such as host:0,2@other; also -i, -e; --num_nodes N: the first N\n"
      "  --ssh_port PORT       of the machines; ssh has to log in without a password\n"
      "  --no_ssh --node_rank N --master_addr HOST   this machine's part; the same command is started on each\n"
      "  --master_port PORT    where the ranks meet; without it, a free port\n"
      "  --enable_each_rank_log FOLDER   a file there of what each rank says\n"
      "  --max_restarts N      train: after exit code 75 start again, from the newest state, at most N times\n"
      "  --restart-data        train: go on from a saved state with the data from its beginning, though its keys have changed\n"
      "  --from STATE --to FOLDER   export: the state's folder (by default the recipe's newest), the model's\n"
      "  --profile FILE        train: write a Chrome trace of the last of the first three steps\n"
      "  --gpus N --nodes N --gpu H100 --gpu-memory 80GiB --host-memory 1.9TiB --host-cores N --disk 7TiB\n"
      "                        plan: for machines that one does not have: N ranks in all\n"
      "  --explain             plan: what else was considered, and why it was not chosen\n"
      "  --compare KEY=V1,V2   plan: a table, a row for each value; with several, for each combination\n"
      "  --measure [--disk FOLDER ...]   doctor: measure this machine, for the seconds in plans; under a minute\n"
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

std::string long_name(const Others& option) {
  const std::string names = option.names;
  return names.substr(names.rfind(',') == std::string::npos ? 0 : names.rfind(',') + 1);
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
  const CLI::Option* ranks = app.add_option("--num_gpus,--num_accelerators,--num-gpus", num_ranks, "ranks on this machine")->check(kPositive);
  app.add_option("--master_port,--master-port", options.master_port, "port at which the ranks meet")->check(CLI::Range(1, 65535));
  app.add_flag("--json", options.json, "for programs");
  if (std::string_view(verb.name) == "plan") {
    WhatIf& what = options.what_if;
    app.add_option("--gpus", num_ranks, "ranks in all, one a GPU")->each([&](const std::string&) { what.given = true; });
    app.add_option("--nodes", what.nodes, "machines over which they are spread evenly")->check(kPositive);
    app.add_option("--gpu", what.gpu, "A100, H100, H200, B200");
    app.add_option("--gpu-memory", what.gpu_memory, "of each");
    app.add_option("--host-memory", what.host_memory, "of each machine");
    app.add_option("--host-cores", what.host_cores, "of each machine")->check(kPositive);
    app.add_option("--disk", what.disk, "of each machine, for scratch files");
    app.add_flag("--explain", options.explain, "what else was considered");
    app.add_option("--compare", options.compare, "KEY=V1,V2,...: a row for each value, or for each combination of several keys'")->allow_extra_args(false);
  }
  if (std::string_view(verb.name) == "doctor") {
    CLI::Option* measure = app.add_flag("--measure", options.measure, "measure how fast this machine is, for plans");
    app.add_option("--disk", options.disks, "a folder on a disk to be measured too")->allow_extra_args(false)->needs(measure);
  }
  if (std::string_view(verb.name) == "prepare" || std::string_view(verb.name) == "process-data")
    app.add_option("--show", options.show, "print this many samples, and what of them is trained")->check(kPositive);
  app.add_option("--profile", options.profile_path, "write a Chrome trace of the last of the first three steps");
  app.add_option("--dump", options.dump_folder, "")->group("");         // loss and gradients of each step, for tests
  app.add_option("--local_rank,--local-rank", ignored, "")->group("");  // other launchers pass it; LOCAL_RANK says it
  if (std::string_view(verb.name) == "train" || std::string_view(verb.name) == "rehearse") {
    app.add_option("-H,--hostfile", options.hostfile, "machines, a line each: name slots=8")->check(kNotEmpty);
    app.add_option("-i,--include", options.hosts.include, "host:0,2@other: these only")->check(kNotEmpty);
    app.add_option("-e,--exclude", options.hosts.exclude, "host:0,2@other: all but these")->check(kNotEmpty);
    app.add_option("--num_nodes,--num-nodes", options.hosts.num_nodes, "the first hosts only")->check(kPositive);
    app.add_option("--node_rank,--node-rank", options.node_rank, "with --no_ssh: this machine's place among the hosts")->check(kNotNegative);
    app.add_option("--master_addr,--master-addr", options.master_address, "the first host's address")->check(kNotEmpty);
    app.add_option("--ssh_port,--ssh-port", options.ssh_port, "")->check(CLI::Range(1, 65535));
    app.add_flag("--no_ssh,--no-ssh", options.no_ssh, "the same command is started on each machine");
    app.add_flag("--force_multi,--force-multi", options.force_multi, "over ssh also where there is one host");
    app.add_option("--enable_each_rank_log", options.log_folder, "a folder for a file of what each rank says")->check(kNotEmpty);
  }
  if (std::string_view(verb.name) == "train") {
    app.add_option("--max_restarts,--max-restarts", options.max_restarts, "after exit code 75, start again so often")->check(kNotNegative);
    app.add_option("--elapsed", options.elapsed_seconds, "")->group("");  // for exit_after, from who starts a job again
  }
  if (std::string_view(verb.name) == "train") app.add_flag("--restart-data,--restart_data", options.restart_data, "go on from a saved state, with the data from its beginning");
  if (std::string_view(verb.name) == "export") {
    app.add_option("--from", options.from, "the state's folder; by default the newest that the recipe saves");
    app.add_option("--to", options.to, "the model's folder; by default FROM-huggingface");
  }
  std::vector<const CLI::Option*> others;
  for (const Others& r : kOthers)
    others.push_back(r.takes_value ? app.add_option(std::string(r.names), ignored, "")->group("")
                                    : app.add_flag(std::string(r.names), ignored_flag, "")->group(""));
  const auto refuse = [&] {
    for (size_t i = 0; i < others.size(); ++i)
      if (others[i]->count() > 0 && kOthers[i].refused) user_error("{}: {}", long_name(kOthers[i]), kOthers[i].refused);
  };
  std::reverse(arguments.begin(), arguments.end());
  try {
    app.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    std::fputs(help().c_str(), stdout);
    return 0;
  } catch (const CLI::ParseError& e) {
    refuse();
    user_error("ulysses {}: {}; see ulysses --help", verb.name, e.what());
  }
  refuse();
  for (size_t i = 0; i < others.size(); ++i)
    if (others[i]->count() > 0) say("{}: no effect", long_name(kOthers[i]));
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

int run(std::vector<std::string> arguments, std::optional<launch::Node> node) {
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
  if (arguments[0] == kFollow && arguments.size() == 1) {
    launch::Followed f = follow();
    return run(std::move(f.arguments), std::move(f.node));
  }
  const Verb* verb = &kVerbs[0];
  for (const Verb& v : kVerbs)
    if (arguments[0] == v.name) verb = &v;
  if (arguments[0] == verb->name) arguments.erase(arguments.begin());
  if (verb->run == nullptr) not_available(verb->name);
  Options options;
  options.node = std::move(node);
  if (const std::optional<int> done = read_options(*verb, std::move(arguments), options)) return *done;
  if (verb->run == train || verb->run == rehearse)
    if (const std::optional<int> ended = launch_elsewhere(verb->name, options)) return *ended;
  return verb->run(options);
}

}  // namespace
}  // namespace uly::cli

int main(int argc, char** argv) {
  uly::launch::keep_standard_streams();
  const bool led = argc == 2 && std::string_view(argv[1]) == uly::cli::kFollow;
  try {
    return uly::cli::run(std::vector<std::string>(argv + 1, argv + argc), std::nullopt);
  } catch (const uly::InternalError& e) {
    uly::launch::tell_of_end(fmt::format("internal error: {}\n", e.what()), led);
    return static_cast<int>(e.exit());
  } catch (const uly::Error& e) {
    // No text: who failed has spoken.
    if (*e.what() != '\0') uly::launch::tell_of_end(fmt::format("{}\n", e.what()), led);
    return static_cast<int>(e.exit());
  } catch (const std::exception& e) {
    uly::launch::tell_of_end(fmt::format("internal error: {}\n", e.what()), led);
    return static_cast<int>(uly::Exit::kInternal);
  }
}
