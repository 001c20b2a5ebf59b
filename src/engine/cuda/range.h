// Names of what runs, for profilers (NVTX and Kineto), and time by kind, for benches.
#pragma once

#include <ATen/record_function.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace uly::engine::cuda {

enum class Work : uint8_t { kGemm, kAttention, kAttentionGrad, kElementwise, kExchange, kOptimizer, kToHost, kToDevice };
inline constexpr std::array<const char*, 8> kWorkNames = {"gemm", "attention_forward", "attention_backward", "elementwise", "exchange", "optimizer", "to_host", "to_device"};

// Seconds on a stream by kind of work, from pairs of events; off unless asked for.
class Timers {
 public:
  bool on = false;

  void begin(Work work, cudaStream_t stream) { mark(work, stream); }
  void end(Work work, cudaStream_t stream) { mark(work, stream); }
  // Sums since the last call; all must have been done.
  std::map<std::string, double> take() {
    std::map<std::string, double> sums;
    for (size_t i = 0; i + 1 < used_; i += 2) {
      float ms = 0;
      cudaEventSynchronize(events_[i + 1]);  // a copy's may be behind the others
      cudaEventElapsedTime(&ms, events_[i], events_[i + 1]);
      sums[kWorkNames[static_cast<size_t>(works_[i])]] += static_cast<double>(ms) / 1e3;
    }
    used_ = 0;
    works_.clear();
    return sums;
  }
  ~Timers() {
    for (cudaEvent_t e : events_) cudaEventDestroy(e);
  }

 private:
  void mark(Work work, cudaStream_t stream) {
    if (used_ == events_.size()) {
      cudaEvent_t e = nullptr;
      cudaEventCreate(&e);
      events_.push_back(e);
    }
    cudaEventRecord(events_[used_++], stream);
    works_.push_back(work);
  }
  std::vector<cudaEvent_t> events_;
  std::vector<Work> works_;
  size_t used_ = 0;
};

// A name over a scope: an NVTX range, and a range in Kineto's trace where one is being taken.
class Named {
 public:
  explicit Named(const char* name) : record_(at::RecordScope::USER_SCOPE) {
    nvtxRangePushA(name);
    if (record_.isActive()) record_.before(name);
  }
  Named(const Named&) = delete;
  Named& operator=(const Named&) = delete;
  ~Named() { nvtxRangePop(); }

 private:
  at::RecordFunction record_;
};

// An instruction: named and, where timers are on, timed.
class Range {
 public:
  Range(Timers& timers, Work work, const char* name, cudaStream_t stream) : named_(name), timers_(timers), work_(work), stream_(stream) {
    if (timers_.on) timers_.begin(work_, stream_);
  }
  ~Range() {
    if (timers_.on) timers_.end(work_, stream_);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Named named_;
  Timers& timers_;
  Work work_;
  cudaStream_t stream_;
};

}  // namespace uly::engine::cuda
