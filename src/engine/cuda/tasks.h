// Work of the host in the order of a GPU's stream: a task begins when the stream has come to where it was queued, and the
// stream can wait for its end, while the launching thread goes on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "engine/cuda/memory.h"
#include "engine/worker.h"

namespace uly::engine::cuda {

class Tasks {
 public:
  Tasks(int device, cudaStream_t stream);
  ~Tasks();

  // Queues a task; returns its number. One runs after the other, on a thread of its own.
  uint32_t queue(std::function<void()> task);
  // The stream waits for the end of that task.
  void wait(uint32_t number);
  // Runs a task now, after all that were queued, and returns when it is done.
  void run(const std::function<void()>& task);
  // Throws what a task has thrown, once. Whatever has failed, the stream goes on: what follows computes with garbage, and is
  // not used.
  void rethrow();

 private:
  cudaEvent_t take_event();

  int device_;
  cudaStream_t stream_;
  void* wait_value_ = nullptr;  // cuStreamWaitValue32; null where the driver has none: the launching thread waits
  Memory counter_;              // tasks done, where the GPU sees it
  uint32_t queued_ = 0;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_events_, all_events_;
  std::exception_ptr failure_;
  Worker worker_;               // last: it uses what is above
};

}  // namespace uly::engine::cuda
