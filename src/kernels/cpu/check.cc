#include "base/check.h"

#include "kernels/access.h"

namespace uly::kernels {

void unsupported_dtype(const char* kernel) { throw InternalError(std::string(kernel) + ": a dtype it has no version for"); }

void unsupported_head(const char* kernel) { throw InternalError(std::string(kernel) + ": a head size it has no version for"); }

void launch_failed(const char* kernel, const char* text) { throw DeviceError(std::string(kernel) + ": " + text); }

}  // namespace uly::kernels
