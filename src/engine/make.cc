#include "engine/make.h"

#include <dlfcn.h>

#include "base/check.h"
#include "engine/cpu/cpu_engine.h"

namespace uly::engine {

std::unique_ptr<Engine> make_cpu_engine(comm::Group& world, comm::Group& sequence, const CpuOptions& options) { return std::make_unique<CpuEngine>(world, sequence, options); }

std::unique_ptr<Engine> make_cuda_engine(const std::string& folder, comm::Group& world, comm::Group& sequence, const CudaOptions& options) {
  const std::string path = folder + "/libulysses_cuda.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  ULY_USER_CHECK(library != nullptr, "the GPU part of this program cannot be loaded: {}", dlerror());
  const auto make = reinterpret_cast<MakeCudaEngine>(dlsym(library, "ulysses_make_cuda_engine"));
  const auto layouts = reinterpret_cast<CudaLayouts>(dlsym(library, "ulysses_cuda_layouts"));
  ULY_USER_CHECK(make != nullptr && layouts != nullptr && layouts() == kLayouts, "{}: not this program's GPU part: run `make build`", path);
  return std::unique_ptr<Engine>(make(&world, &sequence, &options));
}

}  // namespace uly::engine
