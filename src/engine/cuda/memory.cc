#include "engine/cuda/memory.h"

#include "base/check.h"
#include "base/units.h"

namespace uly::engine::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick is taken back
  throw DeviceError(fmt::format("CUDA: {}: {}", what, cudaGetErrorString(error)));
}

Memory::Memory(Place place, int64_t bytes) : place_(place) {
  if (bytes == 0) return;
  void* p = nullptr;
  check(place == Place::kDevice ? cudaMalloc(&p, static_cast<size_t>(bytes)) : cudaMallocHost(&p, static_cast<size_t>(bytes)),
        fmt::format("{} of {} memory", format_bytes(bytes), place == Place::kDevice ? "GPU" : "pinned host").c_str());
  base_ = static_cast<std::byte*>(p);
  bytes_ = bytes;
}

Memory::~Memory() {
  if (!base_) return;
  if (place_ == Place::kDevice) cudaFree(base_);
  else cudaFreeHost(base_);
}

}  // namespace uly::engine::cuda
