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

}  // namespace uly::memory
