// A driver's library whose GPUs are what the environment says; tests build it as libnvidia-ml.so.1 (fixtures.py).
//
// FAKE_NVML         name;major;minor;total;free;pid;bytes;pid;bytes ...|the next GPU; a name of `!` stands for a GPU that
//                   is lost, bytes of -1 for what is not told
// FAKE_NVML_DRIVER  version;CUDA's version
// FAKE_NVML_INIT    what nvmlInit_v2 returns, where it fails
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kSuccess = 0, kTooSmall = 7, kLost = 15, kMismatch = 18;

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

using Gpu = std::vector<std::string>;
std::vector<Gpu> gpus() {
  std::vector<Gpu> all;
  for (const std::string& text : split(variable("FAKE_NVML"), '|')) all.push_back(split(text, ';'));
  return all;
}

// A device is its number plus one.
Gpu gpu_of(void* device) { return gpus()[reinterpret_cast<size_t>(device) - 1]; }

}  // namespace

extern "C" {

struct Memory {
  unsigned long long total, free, used;
};
struct Process {
  unsigned pid;
  unsigned long long bytes;
  unsigned gpu_instance, compute_instance;
};

int nvmlInit_v2() { return std::atoi(variable("FAKE_NVML_INIT").c_str()); }
int nvmlShutdown() { return kSuccess; }
const char* nvmlErrorString(int status) { return status == kMismatch ? "Driver/library version mismatch" : status == kLost ? "GPU is lost" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  std::snprintf(text, size, "%s", split(variable("FAKE_NVML_DRIVER"), ';')[0].c_str());
  return kSuccess;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = std::stoi(split(variable("FAKE_NVML_DRIVER"), ';')[1]);
  return kSuccess;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = static_cast<unsigned>(gpus().size());
  return kSuccess;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (gpus()[index][0] == "!") return kLost;
  *device = reinterpret_cast<void*>(static_cast<size_t>(index) + 1);
  return kSuccess;
}
int nvmlDeviceGetName(void* device, char* text, unsigned size) {
  std::snprintf(text, size, "%s", gpu_of(device)[0].c_str());
  return kSuccess;
}
int nvmlDeviceGetUUID(void* device, char* text, unsigned size) {
  std::snprintf(text, size, "GPU-%zu77-aaaa", reinterpret_cast<size_t>(device) - 1);
  return kSuccess;
}
int nvmlDeviceGetMemoryInfo(void* device, Memory* memory) {
  const Gpu gpu = gpu_of(device);
  memory->total = std::stoull(gpu[3]);
  memory->free = std::stoull(gpu[4]);
  memory->used = memory->total - memory->free;
  return kSuccess;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  const Gpu gpu = gpu_of(device);
  *major = std::stoi(gpu[1]);
  *minor = std::stoi(gpu[2]);
  return kSuccess;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, Process* processes) {
  const Gpu gpu = gpu_of(device);
  const unsigned there = static_cast<unsigned>((gpu.size() - 5) / 2), room = *count;
  *count = there;
  if (there > room) return kTooSmall;
  for (unsigned i = 0; i < there; ++i)
    processes[i] = {static_cast<unsigned>(std::stoul(gpu[5 + 2 * i])), static_cast<unsigned long long>(std::stoll(gpu[6 + 2 * i])), 0, 0};
  return kSuccess;
}
}
