#include "engine/profile.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <filesystem>

#include "base/check.h"

namespace uly::engine {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;

void start_profile(bool cuda) {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  std::set<ActivityType> activities{ActivityType::CPU};
  if (cuda) activities.insert(ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities, {at::RecordScope::USER_SCOPE});
}

void stop_profile(const std::string& path) {
  const auto result = profiler::disableProfiler();
  ULY_USER_CHECK(result != nullptr, "--profile: no trace was taken");
  std::error_code error;
  std::filesystem::remove(path, error);
  result->save(path);
  ULY_USER_CHECK(std::filesystem::exists(path, error), "--profile {}: the trace cannot be written there", path);
}

}  // namespace uly::engine
