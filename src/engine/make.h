// Engines by device. The GPU's lies in a library of its own, so that a run on the CPU loads nothing of CUDA.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "engine/engine.h"
#include "memory/disk.h"

namespace uly::engine {

struct CpuOptions {
  comm::Group* node = nullptr;            // of the ranks that share a second copy of the weights, where there is one
  std::vector<std::string> disk_folders;  // where the tier beyond host memory lies
  memory::Faults disk_faults;             // for tests
  uint64_t delays = 0;                    // for tests: seed of random pauses in all that happens beside the launching thread
  bool rehearsal = false;                 // see Engine
};

struct CudaOptions {
  comm::Group* node = nullptr;   // of the ranks that share a second copy of the weights, where there is one
  int device = 0;                // as CUDA counts the visible ones
  int64_t scratch_bytes = 0;     // for kernels that sum over rows
  bool deterministic = false;    // the same bits in every run
  bool rehearsal = false;        // see Engine
  bool nccl = false;             // ranks exchange by NCCL, from GPU to GPU; else through host memory
  std::chrono::milliseconds exchange_timeout = std::chrono::minutes(10);  // that an exchange by NCCL waits for its peers
  std::vector<std::string> disk_folders;  // where the tier beyond host memory lies
  memory::Faults disk_faults;    // for tests
  int host_threads = 0;          // that touch host memory first; 0: one a core
  // What to tell where so many bytes turn out to be all there are: who has the rest, the longest that fits.
  std::function<std::string(int64_t bytes)> advice;
};

std::unique_ptr<Engine> make_cpu_engine(comm::Group& world, comm::Group& sequence, const CpuOptions& options);

// Loads libulysses_cuda.so from `folder`. Throws UserError where it is missing, DeviceError where the GPU cannot be used.
std::unique_ptr<Engine> make_cuda_engine(const std::string& folder, comm::Group& world, comm::Group& sequence, const CudaOptions& options);

// What the library offers: the layouts that it was built with, and the engine.
using CudaLayouts = int64_t (*)();
constexpr int64_t kLayouts = static_cast<int64_t>(sizeof(Engine) * 4096 + sizeof(CudaOptions));
using MakeCudaEngine = Engine* (*)(comm::Group*, comm::Group*, const CudaOptions*);

}  // namespace uly::engine
