// NVML: the driver's library that knows the GPUs. Opened at run time; where there is no driver there is none.
#pragma once

#include <string>
#include <vector>

#include "launch/gpus.h"

namespace uly::launch {

struct NvmlAnswer {
  Nvml nvml = Nvml::kMissing;
  std::string why;  // unless it has answered
  Driver driver;
  std::vector<Gpu> gpus;  // all of this machine, by number
};

NvmlAnswer ask_nvml();

}  // namespace uly::launch
