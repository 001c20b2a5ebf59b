// Where a job's ranks run: here, on the machines of a hostfile, or as this machine's part of a job that others start too.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "base/check.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/job.h"
#include "launch/hostfile.h"
#include "launch/nodes.h"

namespace uly::cli {
namespace {

constexpr const char* kDefaultHostfile = "/job/hostfile";

void show_gpus(const std::vector<int64_t>& slots) {
  std::string list;
  for (const int64_t slot : slots) list += (list.empty() ? "" : ",") + std::to_string(slot);
  ::setenv("CUDA_VISIBLE_DEVICES", list.c_str(), 1);
}

bool is_on_cpu(const Options& options) { return options.device == "cpu"; }

// This machine's GPUs, as the driver counts them.
std::vector<launch::Host> this_host() {
  launch::Host host{.name = "localhost", .slots = std::vector<int64_t>(static_cast<size_t>(launch::visible_gpus().in_machine))};
  std::iota(host.slots.begin(), host.slots.end(), 0);
  ULY_USER_CHECK(!host.slots.empty(), "--include, --exclude: expected GPUs on this machine, or a --hostfile; found neither");
  return {host};
}

// The options that each machine's ulysses gets too; the device is added when all have said what they have.
std::vector<std::string> arguments_of(const std::string& verb, const Options& o) {
  std::vector<std::string> all = {verb, o.recipe};
  if (o.json) all.push_back("--json");
  if (!o.profile_path.empty()) all.insert(all.end(), {"--profile", o.profile_path});
  if (o.restart_data) all.push_back("--restart-data");
  if (!o.dump_folder.empty()) all.insert(all.end(), {"--dump", o.dump_folder});
  if (!o.log_folder.empty()) all.insert(all.end(), {"--enable_each_rank_log", o.log_folder});
  all.insert(all.end(), o.overrides.begin(), o.overrides.end());
  return all;
}

// One device for all machines; says what each lacks for it.
std::vector<std::string> choose_device(const Options& options, const std::vector<launch::Host>& hosts, const std::vector<Json>& facts) {
  std::string device = options.device.value_or("");
  if (device.empty()) {
    device = facts[0].at("device");
    for (size_t i = 1; i < hosts.size(); ++i)
      ULY_USER_CHECK(facts[i].at("device") == facts[0].at("device"), "{} would train on {}, {} on {} ({}): choose with --device", hosts[0].name, facts[0].at("device").get<std::string>(), hosts[i].name, facts[i].at("device").get<std::string>(),
                     facts[facts[i].at("device") == "cpu" ? i : 0].at("why").get<std::string>());
    say("device: {}, on {} machines with {} ranks", device, hosts.size(), std::accumulate(hosts.begin(), hosts.end(), size_t{0}, [](size_t n, const launch::Host& h) { return n + h.slots.size(); }));
  }
  for (size_t i = 0; i < hosts.size() && device == "cuda"; ++i) {
    const int64_t gpus = facts[i].at("gpus");
    ULY_USER_CHECK(hosts[i].slots.back() < gpus, "{}: slot {} is asked for, {} GPU{} there: expected fewer slots in the hostfile", hosts[i].name, hosts[i].slots.back(), gpus, gpus == 1 ? " is" : "s are");
    if (const std::string words = facts[i].at("shared_memory"); !words.empty() && hosts[i].slots.size() > 1) say("{}: {}", hosts[i].name, words);
  }
  return {"--device", device};
}

}  // namespace

std::optional<int> launch_elsewhere(const std::string& verb, Options& options) {
  if (options.node) return std::nullopt;
  std::error_code error;
  const bool in_job = launch::place_in_job().has_value();
  const bool given = !options.hostfile.empty(), asked = given || options.hosts.any() || options.no_ssh || options.force_multi || options.node_rank >= 0 || !options.master_address.empty();
  if (in_job) {
    ULY_USER_CHECK(!asked, "{}: this process belongs to a job that another launcher has started (RANK is set): expected none of ulysses's own options for several machines", given ? "--hostfile" : "RANK");
    return std::nullopt;
  }
  const bool by_default = !given && std::filesystem::is_regular_file(kDefaultHostfile, error);
  if (!given && !by_default) {
    ULY_USER_CHECK(options.hosts.num_nodes <= 1, "--num_nodes: expected a --hostfile that names the machines");
    ULY_USER_CHECK(!options.no_ssh && !options.force_multi && options.node_rank < 0 && options.master_address.empty(), "{}: expected a --hostfile that names the machines",
                   options.no_ssh ? "--no_ssh" : options.force_multi ? "--force_multi" : options.node_rank >= 0 ? "--node_rank" : "--master_addr");
    if (options.hosts.include.empty() && options.hosts.exclude.empty()) return std::nullopt;
    const auto chosen = launch::choose_hosts(this_host(), options.hosts);
    if (launch::variable("CUDA_VISIBLE_DEVICES")) say("CUDA_VISIBLE_DEVICES: not regarded, as --include or --exclude says which GPUs");
    show_gpus(chosen[0].slots);
    options.num_ranks = static_cast<int64_t>(chosen[0].slots.size());
    return std::nullopt;
  }
  launch::HostChoice choice = options.hosts;
  choice.num_gpus = options.num_ranks.value_or(0);
  const std::vector<launch::Host> hosts = launch::choose_hosts(launch::read_hostfile(given ? options.hostfile : kDefaultHostfile), choice);

  if (options.no_ssh) {
    ULY_USER_CHECK(options.node_rank >= 0 && options.node_rank < static_cast<int64_t>(hosts.size()), "--no_ssh: expected --node_rank 0 to {}, this machine's place among the hosts", hosts.size() - 1);
    ULY_USER_CHECK(!options.master_address.empty(), "--no_ssh: expected --master_addr, the first host's address");
    constexpr int kPort = 29500;  // the reference's; no one is there to tell all a free one
    options.node = {.index = options.node_rank, .hosts = hosts, .master_address = options.master_address, .master_port = options.master_port > 0 ? options.master_port : kPort};
    if (!is_on_cpu(options)) show_gpus(hosts[static_cast<size_t>(options.node_rank)].slots);
    return std::nullopt;
  }
  ULY_USER_CHECK(options.node_rank < 0, "--node_rank: expected --no_ssh besides");
  if (hosts.size() == 1 && !options.force_multi && launch::is_this_machine(hosts[0].name)) {
    if (!is_on_cpu(options)) show_gpus(hosts[0].slots);
    options.num_ranks = static_cast<int64_t>(hosts[0].slots.size());
    return std::nullopt;
  }
  // What is wrong with the recipe is said once, before anything is started.
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  launch::Node all{.hosts = hosts};
  ULY_USER_CHECK(all.world() % recipe.sequence_parallel_size == 0, "sequence_parallel_size ({}): expected a divisor of {} ranks, found {}", recipe.where("sequence_parallel_size"), all.world(), recipe.sequence_parallel_size);
  check_restarts(options, recipe);
  const bool saves = verb == "train" && recipe::saves_states(recipe);
  if (saves) take_signals(false);
  return launch::with_restarts(options.max_restarts, [&](double elapsed) {
    launch::Lead job{.hosts = hosts, .arguments = arguments_of(verb, options), .master_address = options.master_address, .master_port = options.master_port, .ssh_port = options.ssh_port, .saves = saves,
                     .why_to_stop = [&] { return verb == "train" ? why_to_stop(recipe, options) : ""; },
                     .agree = [&](const std::vector<Json>& facts) { return choose_device(options, hosts, facts); }};
    if (elapsed > 1) job.arguments.insert(job.arguments.end(), {"--elapsed", fmt::format("{:.0f}", elapsed)});
    return launch::lead(job);
  });
}

launch::Followed follow() {
  const launch::Gpus gpus = launch::ask_gpus();
  const std::optional<Obstacle> obstacle = find_obstacle(gpus, 1, false);
  launch::Followed f = launch::follow(launch::facts_of_machine(kVersion, {{"device", obstacle ? "cpu" : "cuda"}, {"why", obstacle ? obstacle->fact : ""}, {"gpus", gpus.in_machine}}));
  const auto device = std::find(f.arguments.begin(), f.arguments.end(), "--device");
  if (device != f.arguments.end() && device + 1 != f.arguments.end() && *(device + 1) == "cuda") show_gpus(f.node.hosts[static_cast<size_t>(f.node.index)].slots);
  return f;
}

}  // namespace uly::cli
