#include "base/host_memory.h"

#include <algorithm>
#include <fstream>

namespace uly {
namespace {

// A number that stands alone in a file of the control group; -1 for "max" or no file.
int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t n = -1;
  return file >> n ? n : -1;
}

int64_t available_memory_bytes(const std::string& root) {
  std::ifstream file(root + "/proc/meminfo");
  std::string key, unit;
  for (int64_t kib = 0; file >> key >> kib; std::getline(file, unit))
    if (key == "MemAvailable:") return kib * 1024;
  return 0;
}

// How one of the two versions of control groups names its files.
struct Files {
  const char* limit;
  const char* used;
  const char* caches[2];
};
constexpr Files kFirst = {"/memory.limit_in_bytes", "/memory.usage_in_bytes", {"total_inactive_file", "total_active_file"}};
constexpr Files kSecond = {"/memory.max", "/memory.current", {"inactive_file", "active_file"}};
constexpr Files kThrottled = {"/memory.high", "/memory.current", {"inactive_file", "active_file"}};  // above it a group is slowed down to a crawl

int64_t file_cache_bytes(const std::string& folder, const Files& files) {
  std::ifstream file(folder + "/memory.stat");
  std::string key;
  int64_t sum = 0;
  for (int64_t n = 0; file >> key >> n;)
    if (key == files.caches[0] || key == files.caches[1]) sum += n;
  return sum;
}

void apply_limit(HostMemory& m, const std::string& folder, const Files& files) {
  const int64_t limit = number_in(folder + files.limit), used = std::max<int64_t>(0, number_in(folder + files.used));
  if (limit < 0) return;
  m.free_bytes = std::min(m.free_bytes, std::max<int64_t>(0, limit - used));
  const int64_t obtainable = std::max<int64_t>(0, limit - std::max<int64_t>(0, used - file_cache_bytes(folder, files)));
  if (obtainable >= m.obtainable_bytes) return;
  m.obtainable_bytes = obtainable;
  m.in_group = true;
}

// The group at `path` and all above it: the tightest limit holds. Within a container only the topmost may be visible.
void apply_limits(HostMemory& m, const std::string& mount, std::string path, const Files& files) {
  if (path.find("/..") != std::string::npos) path.clear();  // a group beyond what this namespace shows
  for (; path.size() > 1; path.resize(path.rfind('/'))) apply_limit(m, mount + path, files);
  apply_limit(m, mount, files);
}

}  // namespace

HostMemory host_memory(const std::string& root) {
  HostMemory m;
  m.free_bytes = m.obtainable_bytes = available_memory_bytes(root);
  // Lines of "number:controllers:path"; the second version has number 0 and no controllers.
  std::string first = "/", second = "/";
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (b == std::string::npos) continue;
    const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
    if (controllers == ",,") second = line.substr(b + 1);
    if (controllers.find(",memory,") != std::string::npos) first = line.substr(b + 1);
  }
  for (const Files& files : {kSecond, kThrottled}) apply_limits(m, root + "/sys/fs/cgroup", second, files);
  apply_limits(m, root + "/sys/fs/cgroup/memory", first, kFirst);
  return m;
}

int64_t own_bytes(const std::string& root) {
  std::ifstream file(root + "/proc/self/status");
  int64_t sum = 0;
  for (std::string line; std::getline(file, line);)
    for (const std::string key : {"RssAnon:", "RssShmem:"})
      if (line.starts_with(key)) sum += std::stoll(line.substr(key.size())) * 1024;
  return sum;
}

}  // namespace uly
