// A Chrome trace of what runs between start and stop: instructions, CUDA calls and kernels.
//
// Source      Kineto, through torch's profiler
#pragma once

#include <string>

namespace uly::engine {

void start_profile(bool cuda);
// Throws UserError where `path` cannot be written.
void stop_profile(const std::string& path);

}  // namespace uly::engine
