#include "engine/cuda/tasks.h"

#include <cuda.h>

#include <atomic>
#include <thread>

namespace uly::engine::cuda {

Tasks::Tasks(int device, cudaStream_t stream) : device_(device), stream_(stream), counter_(Place::kHost, 4096) {
  *reinterpret_cast<uint32_t*>(counter_.base()) = 0;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", &wait_value_, 12000, cudaEnableDefault, &found) != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    wait_value_ = nullptr;
  }
  worker_.run([device] { cudaSetDevice(device); });
}

Tasks::~Tasks() {
  worker_.run([] {}).wait();
  for (cudaEvent_t e : all_events_) cudaEventDestroy(e);
}

cudaEvent_t Tasks::take_event() {
  const std::lock_guard lock(mutex_);
  if (free_events_.empty()) {
    cudaEvent_t e = nullptr;
    check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming | cudaEventBlockingSync), "an event");
    all_events_.push_back(e);
    return e;
  }
  cudaEvent_t e = free_events_.back();
  free_events_.pop_back();
  return e;
}

uint32_t Tasks::queue(std::function<void()> task) {
  cudaEvent_t begin = take_event();
  check(cudaEventRecord(begin, stream_), "an event");
  const uint32_t number = ++queued_;
  worker_.run([this, begin, number, task = std::move(task)] {
    try {
      check(cudaEventSynchronize(begin), "waiting for the GPU");
      const bool failed = [&] {
        const std::lock_guard lock(mutex_);
        return failure_ != nullptr;
      }();
      if (!failed) task();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    {
      const std::lock_guard lock(mutex_);
      free_events_.push_back(begin);
    }
    std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(counter_.base())).store(number, std::memory_order_release);
  });
  return number;
}

void Tasks::wait(uint32_t number) {
  rethrow();
  if (wait_value_ != nullptr) {
    const auto call = reinterpret_cast<CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int)>(wait_value_);
    void* on_device = nullptr;
    check(cudaHostGetDevicePointer(&on_device, counter_.base(), 0), "a counter that the GPU sees");
    if (call(stream_, reinterpret_cast<CUdeviceptr>(on_device), number, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS) return;
    wait_value_ = nullptr;
  }
  const std::atomic_ref<uint32_t> done(*reinterpret_cast<uint32_t*>(counter_.base()));
  while (static_cast<int32_t>(done.load(std::memory_order_acquire) - number) < 0) std::this_thread::yield();
  rethrow();
}

void Tasks::run(const std::function<void()>& task) {
  worker_.run(task).get();
}

void Tasks::rethrow() {
  const std::lock_guard lock(mutex_);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

}  // namespace uly::engine::cuda
