#include "plan/plan.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <span>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/job.h"
#include "recipe/numbers.h"

namespace uly::cli {
namespace {

// The oldest GPU whose kernels are built, and the CUDA that they are built with (docs/operations.md).
constexpr int kOldestMajor = 8, kOldestMinor = 0;
constexpr int kCudaVersion = 13000;
constexpr const char* kDriverForCuda = "580";

// More than a driver keeps of an idle GPU for itself: whose it is may not be visible from a container.
constexpr int64_t kUnseenBytes = int64_t{1} << 30;

std::string cuda_words(int version) { return fmt::format("CUDA {}.{}", version / 1000, version % 1000 / 10); }

int64_t num_used(const launch::Gpus& gpus, int64_t needed) { return std::min<int64_t>(needed, static_cast<int64_t>(gpus.list.size())); }

// "2 x NVIDIA H200, 139.8 GiB each"
std::string words_of(const std::vector<launch::Gpu>& gpus, int64_t count) {
  std::map<std::string, int64_t> kinds;
  std::vector<std::string> order;
  for (int64_t i = 0; i < count; ++i) {
    const launch::Gpu& gpu = gpus[static_cast<size_t>(i)];
    std::string kind = gpu.name.empty() ? "GPU" : gpu.name;
    if (gpu.total_bytes > 0) kind += ", " + format_bytes(gpu.total_bytes);
    if (kinds[kind]++ == 0) order.push_back(kind);
  }
  std::string text;
  for (const std::string& kind : order)
    text += fmt::format("{}{} x {}{}", text.empty() ? "" : " and ", kinds[kind], kind, kinds[kind] > 1 && kind.find(", ") != std::string::npos ? " each" : "");
  return text;
}

// What others hold on one GPU.
struct Foreign {
  int64_t bytes = 0, pid = 0;
  std::string words;
};
Foreign foreign_on(const launch::Gpu& gpu) {
  Foreign f;
  int64_t largest = 0;
  for (const launch::Gpu::Process& p : gpu.processes) {
    f.bytes += p.bytes;
    if (f.pid == 0 || p.bytes > largest) f.pid = p.pid;
    largest = std::max(largest, p.bytes);
  }
  const size_t count = gpu.processes.size();
  if (count == 0 && gpu.total_bytes - gpu.free_bytes > kUnseenBytes) {
    f.bytes = gpu.total_bytes - gpu.free_bytes;
    f.words = fmt::format("GPU {}: {} belong to processes that cannot be seen from here", gpu.index, format_bytes(f.bytes));
  } else if (count == 1 && f.bytes > 0) {
    f.words = fmt::format("GPU {}: {} belong to process {}", gpu.index, format_bytes(f.bytes), f.pid);
  } else if (count == 1) {
    f.words = fmt::format("GPU {}: process {} computes on it too", gpu.index, f.pid);
  } else if (count > 1) {
    f.words = fmt::format("GPU {}: {} belong to {} other processes, most to process {}", gpu.index, format_bytes(f.bytes), count, f.pid);
  }
  return f;
}

Json facts_of(const plan::Machine& m) {
  Json facts = {{"cores", m.cores}, {"memory_bytes", m.memory_bytes}, {"in_control_group", m.in_group}, {"gpus", m.gpus}};
  if (m.cuda)
    facts["gpu"] = {{"words", m.gpu_words},
                    {"name", m.gpu_name},
                    {"capability", {m.gpu_major, m.gpu_minor}},
                    {"total_bytes", m.gpu_total_bytes},
                    {"free_bytes", m.gpu_free_bytes},
                    {"ranks", m.gpu_ranks},
                    {"foreign", {{"words", m.gpu_foreign_words}, {"bytes", m.gpu_foreign_bytes}, {"pid", m.gpu_foreign_pid}}}};
  return facts;
}

}  // namespace

std::optional<Obstacle> find_obstacle(const launch::Gpus& gpus, int64_t needed, bool chosen) {
  const std::string option = "--device cuda: ";
  const std::string shown = gpus.variable ? fmt::format("CUDA_VISIBLE_DEVICES={}", *gpus.variable) : "this machine";
  if (gpus.visible == 0) return Obstacle{option, fmt::format("no GPU is visible: {}", gpus.in_machine > 0 ? shown + " shows none" : "this machine has none"), ""};
  if (needed > gpus.visible && !gpus.shared) return Obstacle{"", fmt::format("{} ranks need as many GPUs on this machine; {} shows {}", needed, shown, gpus.visible), ""};
  if (gpus.nvml == launch::Nvml::kFailed) return Obstacle{option, fmt::format("the driver does not answer: {}", gpus.why), "; nvidia-smi may say more"};
  if (gpus.nvml == launch::Nvml::kMissing && !chosen) return Obstacle{option, fmt::format("nothing tells what the GPU can do: {}", gpus.why), ""};
  for (int64_t i = 0; i < num_used(gpus, needed); ++i) {
    const launch::Gpu& gpu = gpus.list[static_cast<size_t>(i)];
    if (!gpu.trouble.empty())
      return Obstacle{"", fmt::format("GPU {} does not answer: {}", gpu.index, gpu.trouble), "; CUDA_VISIBLE_DEVICES can choose others"};
    if (gpu.major > 0 && std::pair(gpu.major, gpu.minor) < std::pair(kOldestMajor, kOldestMinor))
      return Obstacle{"", fmt::format("GPU {} ({}) is sm_{}{}", gpu.index, gpu.name, gpu.major, gpu.minor),
                      fmt::format(": expected sm_{}{} or newer; use --device cpu or another GPU", kOldestMajor, kOldestMinor)};
  }
  if (gpus.nvml == launch::Nvml::kAnswered && gpus.driver.cuda_version < kCudaVersion)
    return Obstacle{"", fmt::format("the driver {} supports {}", gpus.driver.version, cuda_words(gpus.driver.cuda_version)),
                    fmt::format(": expected {}, which needs driver {} or newer", cuda_words(kCudaVersion), kDriverForCuda)};
  if (::access(launch::gpu_part_path().c_str(), R_OK) != 0)
    return Obstacle{option, "this build has no GPU part (libulysses_cuda.so is missing beside ulysses)", ": run `make build` with ULYSSES_CUDA=ON"};
  return std::nullopt;
}

std::optional<Obstacle> find_obstacle(const recipe::Recipe& recipe) {
  if (recipe.model.dtype == Dtype::kBf16) return std::nullopt;
  return Obstacle{"", fmt::format("model.dtype ({}): attention on a GPU computes in bf16", recipe.where("model.dtype")), ": expected bf16, or --device cpu"};
}

Ranks choose_ranks(const Options& options, const recipe::Recipe& recipe, bool join) {
  Ranks ranks;
  ranks.chosen = options.device.has_value();
  ULY_USER_CHECK(!ranks.chosen || *options.device == "cpu" || *options.device == "cuda", "--device: expected cpu or cuda, found '{}'", *options.device);
  if (join) ranks.place = launch::place_in_job();
  ranks.node = options.node;
  const int64_t P = recipe.sequence_parallel_size;
  if (ranks.place) {
    ULY_USER_CHECK(!options.num_ranks || *options.num_ranks == ranks.place->world_size,
                   "--num_gpus: this process belongs to a job of WORLD_SIZE = {} ranks, found {}", ranks.place->world_size, options.num_ranks.value_or(0));
    ranks.world = ranks.place->world_size;
  } else if (ranks.node) {
    ranks.world = ranks.node->world();
  } else {
    ranks.world = options.num_ranks.value_or(P);
  }
  ULY_USER_CHECK(ranks.world >= 1, "--num_gpus: expected at least 1, found {}", ranks.world);
  ULY_USER_CHECK(ranks.world % P == 0, "sequence_parallel_size ({}): expected a divisor of {} rank{}, found {}", recipe.where("sequence_parallel_size"),
                 ranks.world, ranks.world == 1 ? "" : "s", P);
  if (ranks.chosen && *options.device == "cpu") {
    ranks.gpus = launch::visible_gpus();
    return ranks;
  }
  ranks.gpus = launch::ask_gpus();
  ranks.obstacle = find_obstacle(ranks.gpus, ranks.here(), ranks.chosen);
  if (!ranks.obstacle) ranks.obstacle = find_obstacle(recipe);
  ranks.cuda = ranks.chosen || !ranks.obstacle;
  return ranks;
}

std::string device_words(const Ranks& ranks) {
  if (!ranks.cuda) return ranks.obstacle ? fmt::format("cpu ({})", ranks.obstacle->fact) : "cpu";
  const std::string words = words_of(ranks.gpus.list, num_used(ranks.gpus, ranks.here()));
  return words.empty() ? "cuda" : fmt::format("cuda ({})", words);
}

plan::Machine machine_of(const Ranks& ranks) {
  plan::Machine m = plan::this_machine(ranks.cuda, ranks.gpus.visible);
  m.local_ranks = ranks.here();
  const int64_t local = ranks.here(), used = num_used(ranks.gpus, local);
  if (!ranks.cuda) plan::use_rates(m, plan::read_rates_file(launch::rates_path()), launch::rates_path());
  if (!ranks.cuda || used == 0) return m;
  if (ranks.gpus.shared) m.gpu_ranks = (local + used - 1) / used;
  m.gpu_words = words_of(ranks.gpus.list, used);
  // Of a job that has been started already only this rank's own GPU is idle yet.
  const int64_t first = ranks.place ? ranks.place->local_rank % used : 0, last = ranks.place ? first + 1 : used;
  const std::span<const launch::Gpu> mine(ranks.gpus.list.begin() + first, ranks.gpus.list.begin() + last);
  for (const launch::Gpu& gpu : mine)
    if (const Foreign foreign = foreign_on(gpu); !foreign.words.empty()) m.gpu_foreign_words += (m.gpu_foreign_words.empty() ? "" : "; ") + foreign.words;
  const Foreign foreign = foreign_on(plan::use_gpus(m, mine));
  m.gpu_foreign_bytes = foreign.bytes;
  m.gpu_foreign_pid = foreign.pid;
  plan::use_rates(m, plan::read_rates_file(launch::rates_path()), launch::rates_path());
  return m;
}

namespace {

int64_t size_from(const std::string& flag, const std::string& text) {
  const std::optional<int64_t> bytes = recipe::bytes_from(text);
  ULY_USER_CHECK(bytes && *bytes >= 1 << 20, "{}: expected a size of at least 1MiB, such as 80GiB, found '{}'", flag, text);
  return *bytes;
}

// A machine that one does not have, as far as the command line describes it; the rest as such machines are.
plan::Machine imagined(const Options& options, int64_t world) {
  constexpr int64_t kGiB = int64_t{1} << 30;
  const WhatIf& what = options.what_if;
  plan::Machine m;
  m.cuda = options.device.value_or("cuda") == "cuda", m.imagined = true;
  ULY_USER_CHECK(m.cuda || options.device == "cpu", "--device: expected cpu or cuda, found '{}'", *options.device);
  ULY_USER_CHECK(m.cuda || (what.gpu.empty() && what.gpu_memory.empty()), "--device cpu: expected no {}", what.gpu.empty() ? "--gpu-memory" : "--gpu");
  ULY_USER_CHECK(world >= 1, "--gpus: expected at least 1, found {}", world);
  ULY_USER_CHECK(world % what.nodes == 0, "--nodes: expected a divisor of {} GPUs, found {}", world, what.nodes);
  const std::string machines = fmt::format("{} imagined machine{}", what.nodes, what.nodes == 1 ? "" : "s");
  m.memory_bytes = what.host_memory.empty() ? 1900 * kGiB : size_from("--host-memory", what.host_memory);
  m.cores = what.host_cores > 0 ? what.host_cores : m.cuda ? 12 * (world / what.nodes) : 96;
  m.words = fmt::format("{}: {} cores, {} of memory each", machines, m.cores, format_bytes(m.memory_bytes));
  if (!m.cuda) {
    m.memory_bytes *= what.nodes;  // on the CPU ranks share what all have
    return m;
  }
  m.gpus = world / what.nodes;
  m.gpu_name = what.gpu.empty() ? "H100" : what.gpu;
  const bool large = m.gpu_name.find("H200") != std::string::npos, newest = m.gpu_name.find("B200") != std::string::npos;
  m.gpu_total_bytes = what.gpu_memory.empty() ? (newest ? 180 : large ? 140 : 80) * kGiB : size_from("--gpu-memory", what.gpu_memory);
  m.gpu_free_bytes = std::max<int64_t>(1, m.gpu_total_bytes - kGiB / 2);  // what a driver keeps
  m.gpu_major = newest ? 10 : m.gpu_name.find("A100") != std::string::npos ? 8 : 9;
  m.gpu_words = fmt::format("{} x {}, {} each, on {} with {} of memory", world, m.gpu_name, format_bytes(m.gpu_total_bytes), machines, format_bytes(m.memory_bytes));
  return m;
}

}  // namespace

Planned planned_for(const Options& options, bool speaks) {
  Planned p{.recipe = recipe::load(options.recipe, options.overrides)};
  if (options.what_if.any()) {
    p.world = options.num_ranks.value_or(p.recipe.sequence_parallel_size);
    p.machine = imagined(options, p.world);
  } else {
    const Ranks ranks = choose_ranks(options, p.recipe, false);
    if (const std::optional<Obstacle> obstacle = find_obstacle(p.recipe); ranks.cuda && obstacle) throw UserError(obstacle->sentence());
    if (speaks && !ranks.cuda && ranks.obstacle && ranks.gpus.visible > 0) say("device: {}", device_words(ranks));
    p.world = ranks.world;
    p.machine = machine_of(ranks);
  }
  if (!options.what_if.disk.empty()) p.machine.disk_bytes = size_from("--disk", options.what_if.disk);
  return p;
}

// Starts nothing and asks no network: a plan is made from the recipe, the model's configuration and this machine. What
// this machine lacks is no reason to refuse: the plan may be for another. Returns 0 also where it does not fit here: the
// plan says so; `train` refuses.
int plan(const Options& options) {
  if (!options.compare.empty()) return compare(options);
  const Planned p = planned_for(options, true);
  plan::Plan plan = plan::make(p.recipe, find_model(p.recipe, Fetch::kNothing), p.machine, p.world, std::nullopt, {.longest = true, .explain = options.explain});
  plan.facts["machine"] = facts_of(p.machine);
  const std::string out = options.json ? plan.facts.dump(2) + "\n" : plan::text(plan);
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
  return 0;
}

}  // namespace uly::cli
