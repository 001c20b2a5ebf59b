#include <unistd.h>

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/host_memory.h"
#include "base/units.h"
#include "launch/gpus.h"
#include "launch/nccl.h"
#include "plan/plan.h"

namespace uly::plan {

Machine this_machine(bool cuda, int64_t gpus) {
  Machine m;
  m.cuda = cuda;
  m.gpus = gpus;
  m.cores = std::max<int64_t>(1, sysconf(_SC_NPROCESSORS_ONLN));
  m.memory_bytes = free_host_bytes();
  if (cuda) {
    const launch::Nccl nccl = launch::find_nccl();
    m.nccl_version = nccl.version, m.nccl_why = nccl.why;
  }
  m.words = fmt::format("{} core{}, {} of memory free", m.cores, m.cores == 1 ? "" : "s", format_bytes(m.memory_bytes));
  return m;
}

const launch::Gpu& use_gpus(Machine& m, std::span<const launch::Gpu> gpus) {
  const auto capability = [](const launch::Gpu& g) { return std::pair(g.major, g.minor); };
  const launch::Gpu& oldest = *std::min_element(gpus.begin(), gpus.end(), [&](const launch::Gpu& a, const launch::Gpu& b) { return capability(a) < capability(b); });
  const launch::Gpu& smallest = *std::min_element(gpus.begin(), gpus.end(), [](const launch::Gpu& a, const launch::Gpu& b) { return a.total_bytes < b.total_bytes; });
  const launch::Gpu& tightest = *std::min_element(gpus.begin(), gpus.end(), [](const launch::Gpu& a, const launch::Gpu& b) { return a.free_bytes < b.free_bytes; });
  m.gpu_major = oldest.major, m.gpu_minor = oldest.minor;
  m.gpu_total_bytes = smallest.total_bytes;
  m.gpu_name = tightest.name, m.gpu_free_bytes = tightest.free_bytes;
  return tightest;
}

}  // namespace uly::plan
