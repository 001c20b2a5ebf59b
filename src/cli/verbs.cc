#include "cli/verbs.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <span>

#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/job.h"
#include "launch/environment.h"
#include "launch/nccl.h"
#include "launch/python.h"
#include "plan/measured.h"
#include "plan/plan.h"
#include "recipe/recipe.h"

namespace uly::cli {
namespace {

// What a program prints first when it is asked for its versions; empty if it cannot be run.
std::string answer_of(const std::vector<std::string>& command) {
  if (::access(command[0].c_str(), X_OK) != 0) return "";
  const launch::Output output = launch::run_and_capture(command);
  return output.exit_code == 0 ? output.text.substr(0, output.text.find('\n')) : "";
}

Json facts_of(const launch::Gpu& gpu) {
  Json processes = Json::array();
  for (const launch::Gpu::Process& p : gpu.processes) processes.push_back({{"pid", p.pid}, {"bytes", p.bytes}});
  return {{"index", gpu.index}, {"uuid", gpu.uuid}, {"name", gpu.name}, {"capability", {gpu.major, gpu.minor}}, {"total_bytes", gpu.total_bytes},
          {"free_bytes", gpu.free_bytes}, {"processes", processes}, {"trouble", gpu.trouble}};
}

std::string words_of(const launch::Gpu& gpu) {
  if (gpu.index < 0) return gpu.uuid;
  if (!gpu.trouble.empty()) return fmt::format("GPU {} does not answer: {}", gpu.index, gpu.trouble);
  const std::string memory = gpu.total_bytes > 0 ? fmt::format("{}, {} free", format_bytes(gpu.total_bytes), format_bytes(gpu.free_bytes)) : "memory not known";
  std::string text = fmt::format("GPU {}: {}, sm_{}{}, {}", gpu.index, gpu.name, gpu.major, gpu.minor, memory);
  for (const launch::Gpu::Process& p : gpu.processes) text += fmt::format("; process {} holds {}", p.pid, p.bytes > 0 ? format_bytes(p.bytes) : "an unknown part");
  return text;
}

constexpr const char* kPythonVersions =
    "import sys, importlib.metadata as m\n"
    "def version(name):\n"
    "    try: return name + ' ' + m.version(name)\n"
    "    except m.PackageNotFoundError: return name + ' missing'\n"
    "print(', '.join(['python ' + sys.version.split()[0]] + [version(n) for n in ('torch', 'transformers', 'datasets', 'huggingface_hub')]))";

}  // namespace

int docs(const Options&) {
  const std::string text = recipe::reference_markdown();
  std::fwrite(text.data(), 1, text.size(), stdout);
  return 0;
}

namespace {

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  return fmt::format("{:04}-{:02}-{:02}", parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday);
}

// Whole or not at all: a plan may read it meanwhile.
void write_rates(const std::string& path, const std::string& text) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::absolute(path).parent_path(), error);
  const std::string unfinished = fmt::format("{}.{}", path, ::getpid());
  std::ofstream file(unfinished, std::ios::binary);
  file << text;
  file.close();
  if (file) std::filesystem::rename(unfinished, path, error);
  const int why = errno;
  if (file && !error) return;
  std::error_code ignored;
  std::filesystem::remove(unfinished, ignored);
  user_error("{}: rates cannot be written: {}: name another file with ULYSSES_RATES", path, error ? error.message() : std::strerror(why));
}

// Has the engine measure, and keeps what it found beside what was known of the other kind of device.
int measure(const Options& options) {
  const launch::Gpus gpus = launch::ask_gpus();
  const std::optional<Obstacle> obstacle = find_obstacle(gpus, 1, options.device.has_value());
  ULY_USER_CHECK(!options.device || *options.device == "cpu" || *options.device == "cuda", "--device: expected cpu or cuda, found '{}'", *options.device);
  if (options.device == "cuda" && obstacle) throw UserError(obstacle->sentence());
  plan::Machine machine = plan::this_machine(options.device ? *options.device == "cuda" : !obstacle, gpus.visible);
  if (machine.cuda && !gpus.list.empty()) plan::use_gpus(machine, std::span(gpus.list.begin(), 1));
  const std::string path = launch::rates_path();
  plan::RatesFile file;
  if (const auto text = plan::read_rates_file(path)) {
    try {
      file = plan::rates_file_from(*text, path);
    } catch (const UserError&) {  // it is about to be replaced
    }
  }
  std::vector<std::string> command = {engine_program(), "measure", "--device", machine.cuda ? "cuda" : "cpu"};
  if (machine.cuda && machine.gpu_major > 0 && machine.gpu_major < 9) command.insert(command.end(), {"--attention", "flash"});
  for (const std::string& folder : options.disks) {
    std::error_code error;
    ULY_USER_CHECK(std::filesystem::is_directory(folder, error), "--disk: there is no folder {}", folder);
    command.insert(command.end(), {"--disk", std::filesystem::canonical(folder).string()});
  }
  const launch::Output output = launch::run_and_capture(command);
  if (output.exit_code != 0) return output.exit_code;
  Json json = Json::parse(output.text);
  json["processor"] = machine.cuda ? machine.gpu_name : machine.processor, json["cores"] = machine.cores, json["date"] = today();
  plan::Measured found = plan::measured_from(json);
  std::optional<plan::Measured>& known = machine.cuda ? file.cuda : file.cpu;
  if (known && known->processor == found.processor) found.disks.merge(known->disks);
  known = std::move(found);
  write_rates(path, plan::text_of(file));
  if (options.json) fmt::print("{}\n", plan::to_json(*known).dump(2));
  else say("rates      {}: plans for this machine use them", path);
  return 0;
}

std::string exchanges_words(const launch::Nccl& nccl) {
  if (launch::wanted_comm() == "gloo") return "Gloo, through host memory: ULYSSES_COMM asks for it";
  if (nccl.version == 0) return fmt::format("on GPUs Gloo, through host memory, which is slow: {}", nccl.why);
  return fmt::format("on GPUs NCCL {}{}; on the CPU Gloo", launch::nccl_words(nccl.version),
                     nccl.version >= launch::kNcclSharesGpus ? ", also where ranks share a GPU" : fmt::format(", where each rank has a GPU of its own (Gloo where ranks share one, before NCCL {})", launch::nccl_words(launch::kNcclSharesGpus)));
}

}  // namespace

int doctor(const Options& options) {
  if (options.measure) return measure(options);
  const launch::Gpus gpus = launch::ask_gpus();
  const plan::Machine machine = plan::this_machine(false, gpus.visible);
  const std::optional<Obstacle> obstacle = find_obstacle(gpus, 1, false);
  const std::string engine = launch::engine_path(), python = launch::python_path();
  const std::string engine_says = answer_of({engine, "--version"}), python_says = answer_of({python, "-c", kPythonVersions});
  Json out;
  out["version"] = kVersion;
  out["cores"] = machine.cores;
  out["memory_bytes"] = machine.memory_bytes;
  out["gpus"] = {{"in_machine", gpus.in_machine}, {"visible", gpus.visible}, {"CUDA_VISIBLE_DEVICES", gpus.variable ? Json(*gpus.variable) : Json()}};
  out["gpus"]["driver"] = {{"version", gpus.driver.version}, {"cuda_version", gpus.driver.cuda_version}, {"why_not_known", gpus.why}};
  out["gpus"]["list"] = Json::array();
  for (const launch::Gpu& gpu : gpus.list) out["gpus"]["list"].push_back(facts_of(gpu));
  out["device"] = {{"default", obstacle ? "cpu" : "cuda"}, {"why", obstacle ? obstacle->fact : ""}};
  const launch::Nccl nccl = launch::find_nccl();
  out["nccl"] = {{"version", nccl.version == 0 ? "" : launch::nccl_words(nccl.version)}, {"why_not", nccl.why}, {"shares_gpus", nccl.version >= launch::kNcclSharesGpus}, {"ULYSSES_COMM", launch::wanted_comm()}};
  out["engine"] = {{"path", engine}, {"answer", engine_says}};
  out["python"] = {{"path", python}, {"answer", python_says}};
  out["hub"] = {{"cache", launch::hub_cache_folder()}, {"token", launch::has_hub_token()}};
  const bool well = !engine_says.empty() && !python_says.empty();
  if (options.json) {
    fmt::print("{}\n", out.dump(2));
  } else {
    const std::string shown = gpus.variable ? fmt::format(", CUDA_VISIBLE_DEVICES={}", *gpus.variable) : "";
    fmt::print("ulysses   {}\n", kVersion);
    fmt::print("machine   {}\n", machine.words);
    fmt::print("GPUs      {} visible of {}{}\n", gpus.visible, gpus.in_machine, shown);
    for (const launch::Gpu& gpu : gpus.list) fmt::print("          {}\n", words_of(gpu));
    if (gpus.nvml == launch::Nvml::kAnswered) fmt::print("driver    {}, CUDA {}.{}\n", gpus.driver.version, gpus.driver.cuda_version / 1000, gpus.driver.cuda_version % 1000 / 10);
    fmt::print("device    {}\n", obstacle ? fmt::format("cpu: {}{}", obstacle->fact, obstacle->advice) : "cuda");
    fmt::print("exchanges {}\n", exchanges_words(nccl));
    fmt::print("engine    {}: {}\n", engine, engine_says.empty() ? "cannot be run; `make build` makes it" : engine_says);
    fmt::print("python    {}: {}\n", python, python_says.empty() ? "cannot be run; `make setup` makes it" : python_says);
    fmt::print("hub       cache {}, {}\n", launch::hub_cache_folder(), launch::has_hub_token() ? "a token is set" : "no token is set");
  }
  return well ? 0 : static_cast<int>(Exit::kUser);
}

void not_available(const std::string& verb) { user_error("ulysses {}: not available yet", verb); }

}  // namespace uly::cli
