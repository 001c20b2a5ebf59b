// Numbers in host memory by which a GPU's streams and threads of the host wait for each other: a flag is raised to a number,
// and who awaits a number goes on when the flag has come to it.
//
// Threads call nothing of CUDA here. A call may wait for what the thread that launches holds until the GPU is idle: while a
// kernel is loaded, which happens at its first launch, or memory is freed, or a queue is full. A GPU that waited for such a
// thread would never be.
// Numbers wrap around: later is what lies less than 2^31 ahead.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "engine/cuda/memory.h"

namespace uly::engine::cuda {

class Flags {
 public:
  explicit Flags(int64_t count);  // all are 0

  // In a stream's order: when it has come here; before it goes on. Where the driver has no such operations the calling thread
  // waits in the stream's place.
  void raise(int64_t flag, uint32_t number, cudaStream_t stream);
  void await(int64_t flag, uint32_t number, cudaStream_t stream);

  // By a thread, at once.
  void raise(int64_t flag, uint32_t number);
  void await(int64_t flag, uint32_t number) const;  // throws where it is given up
  bool reached(int64_t flag, uint32_t number) const { return static_cast<int32_t>(value(flag) - number) >= 0; }

  // No stream raises anything any more: threads that still wait are let go.
  void give_up() { given_up_ = true; }

 private:
  static constexpr int64_t kApart = 64;  // bytes: a flag has a line of the cache for itself

  uint32_t value(int64_t flag) const { return std::atomic_ref<uint32_t>(*at(flag)).load(std::memory_order_acquire); }
  uint32_t* at(int64_t flag) const { return reinterpret_cast<uint32_t*>(memory_.base() + flag * kApart); }
  bool queue(void* operation, int64_t flag, uint32_t number, cudaStream_t stream);

  Memory memory_;
  std::byte* on_device_ = nullptr;           // where the GPU sees it
  void *write_ = nullptr, *wait_ = nullptr;  // of the driver; both or none
  std::atomic<bool> given_up_ = false;
};

}  // namespace uly::engine::cuda
