#include "memory/gauges.h"

#include <fstream>
#include <string>

namespace uly::memory {
namespace {

int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind(key, 0) == 0) return std::stoll(line.substr(key.size())) * 1024;
  return 0;
}

}  // namespace

int64_t resident_bytes() { return status("VmRSS:"); }
int64_t peak_resident_bytes() { return status("VmHWM:"); }

int64_t group_peak_bytes() {
  std::ifstream groups("/proc/self/cgroup");
  std::string path;
  for (std::string line; std::getline(groups, line);)
    if (line.starts_with("0::")) path = line.substr(3);
  // Within a container the group is the root of what is visible.
  for (const std::string& folder : {path, std::string()}) {
    std::ifstream file("/sys/fs/cgroup" + folder + "/memory.peak");
    if (int64_t bytes = 0; file >> bytes) return bytes;
  }
  return -1;
}

}  // namespace uly::memory
