// Work of the host in the order of a GPU's stream: a task begins when the stream has come to where it was queued, and the
// stream can wait for its end, while the launching thread goes on. Tasks call nothing of CUDA (flags.h says why).
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

#include "engine/cuda/flags.h"
#include "engine/worker.h"

namespace uly::engine::cuda {

class Tasks {
 public:
  explicit Tasks(cudaStream_t stream) : stream_(stream), flags_(2) {}
  ~Tasks() { flags_.give_up(); }  // what the stream has not come to is not done

  // Queues a task; returns its number. One runs after the other, on a thread of its own; once one has failed none does anything.
  // `name`: for traces; it lasts. `pass` is done where a task has failed or does nothing, so that nobody waits for it for ever.
  uint32_t queue(const char* name, std::function<void()> task, std::function<void()> pass = {}) { return start(name, false, std::move(task), std::move(pass)); }
  // One that waits for those before it, but not for the stream.
  uint32_t queue_at_once(const char* name, std::function<void()> task, std::function<void()> pass) { return start(name, true, std::move(task), std::move(pass)); }
  // The stream waits for the end of that task.
  void wait(uint32_t number) { flags_.await(kEnded, number, stream_); }
  // Returns when all that was queued has ended; throws what has failed. The stream has come to all of them.
  void finish();
  // Throws what has failed, every time: what follows it is computed with garbage.
  void rethrow() const;
  // Seconds that tasks took since the last call.
  double seconds() { return static_cast<double>(nanoseconds_.exchange(0)) / 1e9; }

 private:
  enum Flag : int64_t { kBegun, kEnded };
  uint32_t start(const char* name, bool at_once, std::function<void()> task, std::function<void()> pass);
  void run(const char* name, const std::function<void()>& task);

  cudaStream_t stream_;
  Flags flags_;  // numbers of tasks
  uint32_t queued_ = 0;
  mutable std::mutex mutex_;
  std::exception_ptr failure_;
  std::atomic<bool> failed_ = false;
  std::atomic<int64_t> nanoseconds_ = 0;
  Worker worker_;  // last: it uses what is above
};

}  // namespace uly::engine::cuda
