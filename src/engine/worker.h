// A thread that does one thing after the other, beside the launching thread.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <random>
#include <thread>

namespace uly::engine {

class Worker {
 public:
  // `delays`: for tests, seed of random pauses of up to 2 ms before each task; 0: none.
  explicit Worker(uint64_t delays = 0);
  ~Worker();  // after what it has been given
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // What the task throws is thrown by the future's get().
  std::shared_future<void> run(std::function<void()> task);

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::packaged_task<void()>> tasks_;
  bool ending_ = false;
  uint64_t delays_;
  std::mt19937_64 random_;
  std::thread thread_;
};

}  // namespace uly::engine
