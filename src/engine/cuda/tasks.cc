#include "engine/cuda/tasks.h"

#include <chrono>

#include "engine/cuda/range.h"

namespace uly::engine::cuda {

uint32_t Tasks::start(const char* name, bool at_once, std::function<void()> task, std::function<void()> pass) {
  const uint32_t number = ++queued_;
  if (!at_once) flags_.raise(kBegun, number, stream_);
  worker_.run([this, name, at_once, number, task = std::move(task), pass = std::move(pass)] {
    try {
      if (!failed_) {
        if (!at_once) flags_.await(kBegun, number);
        run(name, task);
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      failure_ = std::current_exception();
      failed_ = true;
    }
    if (failed_ && pass) pass();
    flags_.raise(kEnded, number);
  });
  return number;
}

void Tasks::run(const char* name, const std::function<void()>& task) {
  const Named named(name);
  const auto start = std::chrono::steady_clock::now();
  task();
  nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

void Tasks::finish() {
  worker_.run([] {}).wait();
  rethrow();
}

void Tasks::rethrow() const {
  if (!failed_) return;
  const std::lock_guard lock(mutex_);
  std::rethrow_exception(failure_);
}

}  // namespace uly::engine::cuda
