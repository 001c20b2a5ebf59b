#include "launch/environment.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string_view>

#include "base/check.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

int64_t number(const std::string& name, std::optional<int64_t> fallback, int64_t least, int64_t most) {
  const std::optional<std::string> text = variable(name);
  if (!text || text->empty()) {
    ULY_USER_CHECK(fallback, "environment variable {}: expected a number, as RANK and WORLD_SIZE are set; found nothing", name);
    return *fallback;
  }
  const std::optional<int64_t> value = whole_number(*text);
  ULY_USER_CHECK(value && *value >= least && *value <= most, "environment variable {}: expected a whole number from {} to {}, found '{}'", name, least, most,
                 *text);
  return *value;
}

// As Python's os.path.expanduser and expandvars: what is not known stays as it is.
std::string expanded(std::string path) {
  if (path == "~" || path.starts_with("~/"))
    if (const auto home = variable("HOME")) path = *home + path.substr(1);
  std::string out;
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] != '$') {
      out += path[i];
      continue;
    }
    const bool braces = i + 1 < path.size() && path[i + 1] == '{';
    const size_t first = i + 1 + (braces ? 1 : 0);
    size_t last = first;
    while (last < path.size() && (std::isalnum(static_cast<unsigned char>(path[last])) || path[last] == '_')) ++last;
    const auto value = variable(path.substr(first, last - first));
    if (!value || (braces && (last == path.size() || path[last] != '}'))) {
      out += '$';
      continue;
    }
    out += *value;
    i = braces ? last : last - 1;
  }
  return out;
}

// What a launcher that is not ours calls a process's place.
struct Names {
  const char *rank, *world, *local_rank, *local_world;
  const char* address;  // how to say the first machine's
};
constexpr Names kOpenMpi{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun -x MASTER_ADDR=HOST"};
constexpr Names kHydra{"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpiexec -genv MASTER_ADDR HOST"};

// The same port for all processes of a job, another for other jobs: most likely free.
int port_of(const std::string& job) { return 20000 + static_cast<int>(std::hash<std::string>()(job) % 10000); }

// How many tasks "2(x3),1" gives to the node of this number.
int64_t tasks_of_node(const std::string& list, int64_t node) {
  int64_t first = 0;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    const std::string part = list.substr(at, end - at);
    const size_t times = part.find("(x");
    const int64_t tasks = whole_number(part.substr(0, times)).value_or(0), nodes = times == std::string::npos ? 1 : whole_number(part.substr(times + 2, part.size() - times - 3)).value_or(1);
    if (node < first + nodes) return tasks;
    first += nodes;
    at = end + 1;
  }
  return 0;
}

// Within `srun`, not in a batch script beside it.
std::optional<Place> place_in_slurm() {
  constexpr int64_t kMany = 1 << 20;
  if (variable("SLURM_STEP_ID").value_or("").empty() || variable("SLURM_PROCID").value_or("").empty()) return std::nullopt;
  const char* tasks = variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  Place place{.world_size = number(tasks, 1, 1, kMany)};
  if (place.world_size == 1) return std::nullopt;
  place.rank = number("SLURM_PROCID", std::nullopt, 0, place.world_size - 1);
  place.local_rank = number("SLURM_LOCALID", 0, 0, place.world_size - 1);
  const std::string per_node = variable("SLURM_STEP_TASKS_PER_NODE").value_or(variable("SLURM_TASKS_PER_NODE").value_or(""));
  place.local_world_size = std::max(place.local_rank + 1, tasks_of_node(per_node, number("SLURM_NODEID", 0, 0, kMany)));
  place.master_address = variable("MASTER_ADDR").value_or(first_of_hosts(variable("SLURM_STEP_NODELIST").value_or(variable("SLURM_JOB_NODELIST").value_or(""))));
  ULY_USER_CHECK(!place.master_address.empty(), "environment variable SLURM_STEP_NODELIST: expected the job's hosts, found nothing");
  if (place.local_world_size == place.world_size && !variable("MASTER_ADDR")) place.master_address = "127.0.0.1";
  place.master_port = static_cast<int>(number("MASTER_PORT", port_of(variable("SLURM_JOB_ID").value_or("") + "." + *variable("SLURM_STEP_ID")), 1, 65535));
  return place;
}

std::optional<Place> place_in_mpi(const Names& names) {
  constexpr int64_t kMany = 1 << 20;
  if (variable(names.rank).value_or("").empty() || variable(names.world).value_or("").empty()) return std::nullopt;
  Place place{.world_size = number(names.world, std::nullopt, 1, kMany)};
  if (place.world_size == 1) return std::nullopt;
  place.rank = number(names.rank, std::nullopt, 0, place.world_size - 1);
  place.local_rank = number(names.local_rank, std::nullopt, 0, place.world_size - 1);
  place.local_world_size = number(names.local_world, std::nullopt, place.local_rank + 1, place.world_size);
  const bool alone = place.local_world_size == place.world_size;
  place.master_address = variable("MASTER_ADDR").value_or(alone ? "127.0.0.1" : "");
  ULY_USER_CHECK(!place.master_address.empty(), "environment variable MASTER_ADDR: expected the first machine's address, as ranks are on several ({}): {}", names.world, names.address);
  const std::string job = variable("PMIX_NAMESPACE").value_or(variable("OMPI_MCA_ess_base_jobid").value_or(variable("HYDRA_JOBID").value_or("")));
  place.master_port = static_cast<int>(number("MASTER_PORT", job.empty() ? 29500 : port_of(job), 1, 65535));
  return place;
}

std::optional<Place> place_of_others() {
  if (auto place = place_in_slurm()) return place;
  if (auto place = place_in_mpi(kOpenMpi)) return place;
  return place_in_mpi(kHydra);
}

std::string hub_home() {
  const std::string cache = variable("XDG_CACHE_HOME").value_or("~/.cache");
  return variable("HF_HOME").value_or(cache + "/huggingface");
}

}  // namespace

std::optional<std::string> variable(const std::string& name) {
  const char* value = name.empty() ? nullptr : std::getenv(name.c_str());
  return value ? std::optional<std::string>(value) : std::nullopt;
}

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string first_of_hosts(const std::string& list) {
  const std::string host = list.substr(0, list.find(','));  // "a[01-03"
  const size_t bracket = host.find('[');
  if (bracket == std::string::npos) return host;
  const std::string number = host.substr(bracket + 1, host.find_first_of("-]", bracket + 1) - bracket - 1);
  const size_t end = list.find(']');
  const size_t comma = list.find(',', end);
  return host.substr(0, bracket) + number + (end == std::string::npos ? "" : list.substr(end + 1, comma == std::string::npos ? comma : comma - end - 1));
}

std::string job_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}/", random(), random(), random(), random());
}

void set_place(const Place& place) {
  ::unsetenv("ULYSSES_STARTED");  // another launcher has
  for (const auto& [name, value] : {std::pair{"RANK", place.rank}, {"WORLD_SIZE", place.world_size}, {"LOCAL_RANK", place.local_rank}, {"LOCAL_WORLD_SIZE", place.local_world_size}, {"MASTER_PORT", int64_t{place.master_port}}})
    ::setenv(name, std::to_string(value).c_str(), 1);
  ::setenv("MASTER_ADDR", place.master_address.c_str(), 1);
}

std::optional<Place> place_in_job() {
  constexpr int64_t kMany = 1 << 20;
  if (variable("RANK").value_or("").empty() || variable("WORLD_SIZE").value_or("").empty()) return place_of_others();
  Place place;
  place.world_size = number("WORLD_SIZE", std::nullopt, 1, kMany);
  place.rank = number("RANK", std::nullopt, 0, place.world_size - 1);
  if (place.world_size == 1) return place;
  place.local_world_size = number("LOCAL_WORLD_SIZE", place.world_size, 1, place.world_size);
  place.local_rank = number("LOCAL_RANK", place.rank, 0, place.local_world_size - 1);
  place.master_port = static_cast<int>(number("MASTER_PORT", std::nullopt, 1, 65535));
  place.master_address = variable("MASTER_ADDR").value_or("");
  ULY_USER_CHECK(!place.master_address.empty(), "environment variable MASTER_ADDR: expected a host, as RANK and WORLD_SIZE are set; found nothing");
  return place;
}

std::string hub_cache_folder() {
  if (const auto folder = variable("HF_HUB_CACHE")) return expanded(*folder);
  if (const auto folder = variable("HUGGINGFACE_HUB_CACHE")) return expanded(*folder);
  return expanded(hub_home()) + "/hub";
}

std::string rates_path() {
  if (const auto path = variable("ULYSSES_RATES"); path && !path->empty()) return expanded(*path);
  return expanded(variable("XDG_CONFIG_HOME").value_or("~/.config")) + "/ulysses/rates.json";
}

bool has_hub_token() {
  for (const char* name : {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
    if (!variable(name).value_or("").empty()) return true;
  std::error_code error;
  return fs::exists(expanded(variable("HF_TOKEN_PATH").value_or(hub_home() + "/token")), error);
}

std::string program_folder() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  ULY_CHECK(!error, "/proc/self/exe");
  return program.parent_path();
}

std::string engine_path() {
  const std::string given = variable("ULYSSES_ENGINE").value_or("");
  return given.empty() ? program_folder() + "/ulysses-engine" : given;
}

std::string python_path() {
  const std::string given = variable("ULYSSES_PYTHON").value_or("");
  return given.empty() ? fs::path(program_folder()).parent_path() / ".venv/bin/python" : fs::path(given);
}

std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::optional<std::string>>>& changes) {
  std::vector<std::string> all;
  for (char** at = environ; at && *at; ++at) {
    const std::string_view entry = *at;
    const std::string_view name = entry.substr(0, entry.find('='));
    if (std::none_of(changes.begin(), changes.end(), [&](const auto& change) { return change.first == name; })) all.emplace_back(entry);
  }
  for (const auto& [name, value] : changes)
    if (value) all.push_back(name + "=" + *value);
  return all;
}

}  // namespace uly::launch
