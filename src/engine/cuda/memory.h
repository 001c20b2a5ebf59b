// Memory of a GPU, or of the host where the GPU can reach it (pinned).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace uly::engine::cuda {

// Throws DeviceError with CUDA's words; `what` was being done.
void check(cudaError_t error, const char* what);

enum class Place : uint8_t { kDevice, kHost };

class Memory {
 public:
  Memory() = default;
  Memory(Place place, int64_t bytes);  // throws DeviceError
  Memory(Memory&& o) noexcept { swap(o); }
  Memory& operator=(Memory&& o) noexcept {
    swap(o);
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  std::byte* base() const { return base_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Memory& o) noexcept { std::swap(place_, o.place_), std::swap(base_, o.base_), std::swap(bytes_, o.bytes_); }
  Place place_ = Place::kDevice;
  std::byte* base_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace uly::engine::cuda
