#include "launch/gpus.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <set>
#include <string_view>

#include "launch/environment.h"
#include "launch/nvml.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

int64_t gpus_in_machine() {
  std::error_code error;
  int64_t files = 0, entries = 0;
  for (const auto& entry : fs::directory_iterator("/dev", error)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("nvidia") && whole_number(std::string_view(name).substr(6))) ++files;
  }
  if (files > 0) return files;
  // Device files appear only with the first use of the driver.
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator("/proc/driver/nvidia/gpus", error)) ++entries;
  return entries;
}

// Reads CUDA_VISIBLE_DEVICES up to the first entry that `identify` does not know.
std::vector<std::string> identities(const std::string& value, const std::function<std::optional<std::string>(const std::string&)>& identify) {
  std::vector<std::string> found;
  std::set<std::string> seen;
  for (size_t at = 0; at <= value.size();) {
    const size_t comma = std::min(value.find(',', at), value.size());
    std::string entry = value.substr(at, comma - at);
    entry.erase(0, entry.find_first_not_of(' '));
    entry.erase(entry.find_last_not_of(' ') + 1);
    const std::optional<std::string> identity = identify(entry);
    if (!identity) break;
    if (!seen.insert(*identity).second) return {};
    found.push_back(*identity);
    at = comma + 1;
  }
  return found;
}

}  // namespace

int64_t count_visible(const std::string& value, int64_t in_machine) {
  const auto identify = [&](const std::string& entry) -> std::optional<std::string> {
    const std::optional<int64_t> index = whole_number(entry);
    const bool exists = index ? *index >= 0 && *index < in_machine : in_machine > 0 && (entry.starts_with("GPU-") || entry.starts_with("MIG-"));
    return exists ? std::optional(entry) : std::nullopt;
  };
  return static_cast<int64_t>(identities(value, identify).size());
}

std::vector<Gpu> pick_visible(const std::string& value, const std::vector<Gpu>& in_machine) {
  const int64_t count = static_cast<int64_t>(in_machine.size());
  const auto identify = [&](const std::string& entry) -> std::optional<std::string> {
    if (const std::optional<int64_t> index = whole_number(entry)) return *index >= 0 && *index < count ? std::optional(std::to_string(*index)) : std::nullopt;
    if (count > 0 && entry.starts_with("MIG-")) return entry;
    std::optional<std::string> one;
    for (int64_t i = 0; entry.starts_with("GPU-") && i < count; ++i) {
      if (!in_machine[static_cast<size_t>(i)].uuid.starts_with(entry)) continue;
      if (one) return std::nullopt;
      one = std::to_string(i);
    }
    return one;
  };
  std::vector<Gpu> picked;
  for (const std::string& identity : identities(value, identify)) {
    if (const std::optional<int64_t> index = whole_number(identity)) {
      picked.push_back(in_machine[static_cast<size_t>(*index)]);
    } else {
      picked.emplace_back();
      picked.back().uuid = identity;
    }
  }
  return picked;
}

Gpus visible_gpus() {
  Gpus gpus;
  gpus.in_machine = gpus_in_machine();
  gpus.variable = variable("CUDA_VISIBLE_DEVICES");
  gpus.visible = gpus.variable ? count_visible(*gpus.variable, gpus.in_machine) : gpus.in_machine;
  gpus.shared = variable("ULYSSES_SHARE_GPU") == "1";
  return gpus;
}

Gpus ask_gpus() {
  Gpus gpus = visible_gpus();
  NvmlAnswer answer = ask_nvml();
  gpus.nvml = answer.nvml;
  gpus.why = std::move(answer.why);
  if (gpus.nvml != Nvml::kAnswered) return gpus;
  gpus.driver = std::move(answer.driver);
  gpus.in_machine = static_cast<int64_t>(answer.gpus.size());
  gpus.list = gpus.variable ? pick_visible(*gpus.variable, answer.gpus) : std::move(answer.gpus);
  gpus.visible = static_cast<int64_t>(gpus.list.size());
  return gpus;
}

std::string cuda_device_order() { return variable("CUDA_DEVICE_ORDER").value_or("PCI_BUS_ID"); }

std::string gpu_part_path() { return program_folder() + "/libulysses_cuda.so"; }

}  // namespace uly::launch
