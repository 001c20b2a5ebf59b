#include "launch/nccl.h"

#include <dlfcn.h>
#include <sys/statvfs.h>

#include <cstdlib>
#include <filesystem>

#include "base/check.h"
#include "base/units.h"

namespace uly::launch {

Nccl find_nccl() {
  Nccl found;
  void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = ::dlerror();
    found.why = error ? error : "libnccl.so.2 cannot be loaded";
    return found;
  }
  const auto version = reinterpret_cast<int (*)(int*)>(::dlsym(library, "ncclGetVersion"));
  if (!version || version(&found.version) != 0) found.version = 0, found.why = "libnccl.so.2 does not tell its version";
  return found;
}

std::string nccl_words(int version) { return fmt::format("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100); }

std::string wanted_comm() {
  const char* value = std::getenv("ULYSSES_COMM");
  const std::string wanted = value ? value : "";
  ULY_USER_CHECK(wanted.empty() || wanted == "gloo" || wanted == "nccl", "environment variable ULYSSES_COMM: expected gloo or nccl, found '{}'", wanted);
  return wanted;
}

void prepare_nccl(bool shared_gpus, bool one_machine) {
  if (shared_gpus) ::setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
  if (one_machine) ::setenv("NCCL_SOCKET_IFNAME", "=lo", 0);
}

std::string missing_plugin(const std::string& devices) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::string efa;
  for (const auto& device : fs::directory_iterator(devices, error)) {
    std::error_code none;
    const fs::path driver = fs::read_symlink(device.path() / "device" / "driver", none);
    if (driver.filename() == "efa" && (efa.empty() || device.path().filename() < efa)) efa = device.path().filename();
  }
  if (efa.empty()) return "";
  const char* given = std::getenv("NCCL_NET_PLUGIN");
  const std::string name = given ? given : "";
  for (const std::string& library : {name, "libnccl-net-" + name + ".so", std::string("libnccl-net.so"), std::string("libnccl-net-ofi.so")})
    if (!library.empty() && ::dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL)) return "";
  return fmt::format("{} is an EFA device, and NCCL finds no plugin for it (libnccl-net.so): machines will exchange over TCP, many times slower; install aws-ofi-nccl and put its folder on LD_LIBRARY_PATH", efa);
}

std::string little_shared_memory(const std::string& folder) {
  constexpr int64_t kLittle = int64_t{1} << 30;
  struct statvfs shared {};
  if (::statvfs(folder.c_str(), &shared) != 0) return "";
  const int64_t room = static_cast<int64_t>(shared.f_bavail) * static_cast<int64_t>(shared.f_frsize);
  return room >= kLittle ? "" : fmt::format("{} has room for {} only; GPUs that exchange through it may need more (of a container: --shm-size)", folder, format_bytes(room));
}

}  // namespace uly::launch
