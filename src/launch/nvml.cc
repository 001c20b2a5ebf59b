#include "launch/nvml.h"

#include <dlfcn.h>

#include <array>
#include <limits>

#include <fmt/format.h>

namespace uly::launch {
namespace {

// Its interface as far as it is used here: the header comes with the CUDA toolkit, which this wing does without.
using Device = struct nvmlDevice_st*;
struct Memory {
  unsigned long long total, free, used;
};
struct ProcessInfo {
  unsigned pid;
  unsigned long long used_bytes;
  unsigned gpu_instance, compute_instance;
};
constexpr int kSuccess = 0, kTooSmall = 7;
constexpr unsigned long long kNotKnown = std::numeric_limits<unsigned long long>::max();
constexpr std::array<const char*, 3> kFiles = {"libnvidia-ml.so.1", "libnvidia-ml.so", "/usr/local/nvidia/lib64/libnvidia-ml.so.1"};

// What is wrong with the driver, for all GPUs.
struct Failure {
  std::string why;
};

class Library {
 public:
  Library() {
    for (const char* file : kFiles) {
      handle_ = ::dlopen(file, RTLD_NOW | RTLD_LOCAL);
      if (handle_) return;
      const char* error = ::dlerror();
      if (why_.empty() && error) why_ = error;  // of the first file: the others are guesses
    }
  }
  ~Library() {
    if (begun_) call<int()>("nvmlShutdown")();
    if (handle_) ::dlclose(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  bool is_here() const { return handle_ != nullptr; }
  const std::string& why() const { return why_; }

  void begin() {
    check(call<int()>("nvmlInit_v2")());
    begun_ = true;
  }

  // Null where this driver is too old to have it.
  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(::dlsym(handle_, name));
  }
  template <typename Function>
  Function* call(const char* name) const {
    Function* f = find<Function>(name);
    if (f == nullptr) throw Failure{fmt::format("{} has no {}", kFiles[0], name)};
    return f;
  }
  std::string words(int status) const {
    auto* text = find<const char*(int)>("nvmlErrorString");
    const char* words = text ? text(status) : nullptr;
    return words ? words : fmt::format("NVML error {}", status);
  }
  void check(int status) const {
    if (status != kSuccess) throw Failure{words(status)};
  }

 private:
  void* handle_ = nullptr;
  std::string why_;
  bool begun_ = false;
};

std::vector<Gpu::Process> processes_on(const Library& nvml, Device device) {
  const auto ask = nvml.find<int(Device, unsigned*, ProcessInfo*)>("nvmlDeviceGetComputeRunningProcesses_v3");
  if (ask == nullptr) return {};
  std::vector<ProcessInfo> infos(64);
  unsigned count = static_cast<unsigned>(infos.size());
  int status = ask(device, &count, infos.data());
  if (status == kTooSmall) {
    infos.resize(count + 64);  // more may start meanwhile
    count = static_cast<unsigned>(infos.size());
    status = ask(device, &count, infos.data());
  }
  std::vector<Gpu::Process> processes;
  for (unsigned i = 0; status == kSuccess && i < count; ++i)
    processes.push_back({.pid = infos[i].pid, .bytes = infos[i].used_bytes == kNotKnown ? 0 : static_cast<int64_t>(infos[i].used_bytes)});
  return processes;
}

// What a GPU does not tell stays unknown: some know no memory of their own, some drivers hide processes.
Gpu ask(const Library& nvml, unsigned index) {
  Gpu gpu;
  gpu.index = index;
  Device device = nullptr;
  const int status = nvml.call<int(unsigned, Device*)>("nvmlDeviceGetHandleByIndex_v2")(index, &device);
  if (status != kSuccess) {
    gpu.trouble = nvml.words(status);
    return gpu;
  }
  char text[96] = "";
  if (nvml.call<int(Device, char*, unsigned)>("nvmlDeviceGetUUID")(device, text, sizeof text) == kSuccess) gpu.uuid = text;
  if (nvml.call<int(Device, char*, unsigned)>("nvmlDeviceGetName")(device, text, sizeof text) == kSuccess) gpu.name = text;
  Memory memory{};
  if (nvml.call<int(Device, Memory*)>("nvmlDeviceGetMemoryInfo")(device, &memory) == kSuccess) {
    gpu.total_bytes = static_cast<int64_t>(memory.total);
    gpu.free_bytes = static_cast<int64_t>(memory.free);
  }
  int major = 0, minor = 0;
  if (nvml.call<int(Device, int*, int*)>("nvmlDeviceGetCudaComputeCapability")(device, &major, &minor) == kSuccess) {
    gpu.major = major;
    gpu.minor = minor;
  }
  gpu.processes = processes_on(nvml, device);
  return gpu;
}

}  // namespace

NvmlAnswer ask_nvml() {
  NvmlAnswer answer;
  Library nvml;
  answer.why = nvml.why();
  if (!nvml.is_here()) return answer;
  answer.nvml = Nvml::kFailed;
  try {
    nvml.begin();
    char version[96] = "";
    nvml.check(nvml.call<int(char*, unsigned)>("nvmlSystemGetDriverVersion")(version, sizeof version));
    answer.driver.version = version;
    nvml.check(nvml.call<int(int*)>("nvmlSystemGetCudaDriverVersion_v2")(&answer.driver.cuda_version));
    unsigned count = 0;
    nvml.check(nvml.call<int(unsigned*)>("nvmlDeviceGetCount_v2")(&count));
    for (unsigned i = 0; i < count; ++i) answer.gpus.push_back(ask(nvml, i));
  } catch (const Failure& failure) {
    answer.why = failure.why;
    answer.gpus.clear();
    return answer;
  }
  answer.nvml = Nvml::kAnswered;
  answer.why.clear();
  return answer;
}

}  // namespace uly::launch
