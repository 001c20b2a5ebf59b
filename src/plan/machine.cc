#include <unistd.h>

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "base/host_memory.h"
#include "base/units.h"
#include "launch/gpus.h"
#include "launch/nccl.h"
#include "plan/plan.h"

namespace uly::plan {

namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name"))
      if (const size_t at = line.find(": "); at != std::string::npos) return line.substr(at + 2);
  return "";
}

}  // namespace

Machine this_machine(bool cuda, int64_t gpus, int64_t own_bytes) {
  Machine m;
  m.cuda = cuda;
  m.gpus = gpus;
  m.cores = std::max<int64_t>(1, sysconf(_SC_NPROCESSORS_ONLN));
  if (cuda) {
    const launch::Nccl nccl = launch::find_nccl();
    m.nccl_version = nccl.version, m.nccl_why = nccl.why;
  }
  m.processor = processor_name();
  const HostMemory memory = host_memory();
  m.memory_bytes = memory.obtainable_bytes > 0 ? memory.obtainable_bytes + own_bytes : 0, m.in_group = memory.in_group;
  m.words = fmt::format("{} core{}, {} of memory free{}", m.cores, m.cores == 1 ? "" : "s", format_bytes(m.memory_bytes), m.in_group ? " in this control group" : "");
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

void use_rates(Machine& m, const std::optional<std::string>& text, const std::string& path) {
  m.measured.reset(), m.rates_words.clear();
  if (!text || m.imagined) return;
  RatesFile file = rates_file_from(*text, path);
  std::optional<Measured>& found = m.cuda ? file.cuda : file.cpu;
  const std::string& processor = m.cuda ? m.gpu_name : m.processor;
  if (!found) return;
  if (found->processor != processor || found->cores != m.cores) {
    m.rates_words = fmt::format("the rates in {} are of another machine ({}, {} cores): not used; `ulysses doctor --measure` measures this one", path, found->processor, found->cores);
    return;
  }
  m.rates_words = fmt::format("from rates measured on this machine on {} ({})", found->date, path);
  m.measured = std::move(found);
}

}  // namespace uly::plan
