#include "launch/nccl.h"

#include <dlfcn.h>

#include <cstdlib>

#include "base/check.h"

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

}  // namespace uly::launch
