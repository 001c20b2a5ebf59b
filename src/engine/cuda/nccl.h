// Exchanges of one group of ranks by NCCL: from GPU to GPU, on a stream of their own, with no wait of the launching thread for
// the GPU.
//
// What NCCL gives back at once is asked for until it is settled: connections are made at the first exchange. What fails later,
// because a peer is gone or a link is down, is found by look(), which the engine calls while it waits for the GPU: an exchange
// that has begun and does not end within the time-out has failed too. After a failure the communicator is aborted: kernels that
// wait for a peer end.
//
// Throws      DeviceError naming this rank, the operation and the group
#pragma once

#include <cuda_runtime.h>
#include <nccl.h>

#include <chrono>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "comm/group.h"
#include "engine/cuda/memory.h"

namespace uly::engine::cuda {

class Nccl {
 public:
  // Collective over `group`, through which the ranks find each other; the current device is this rank's.
  Nccl(comm::Group& group, std::chrono::milliseconds timeout);
  // Leaves together with the others; where an exception is on its way, or something has failed, alone.
  ~Nccl();
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  cudaStream_t stream() const { return stream_; }

  // As in comm::Group; in the order of stream().
  void all_to_all(void* receive, const void* send, const std::vector<int64_t>& receive_bytes, const std::vector<int64_t>& send_bytes);
  void all_gather(void* whole, const void* shard, int64_t bytes);
  // Added in the order of ranks. At most kMostReduced.
  void all_reduce_sum(double* x, int64_t count);
  static constexpr int64_t kMostReduced = 256;

  // Throws what has failed. Cheap.
  void look();

 private:
  struct InFlight {
    const char* name = "";
    cudaEvent_t begun = nullptr, ended = nullptr;
    std::optional<std::chrono::steady_clock::time_point> since;  // when it was seen to have begun
  };

  void exchange(const char* name, const std::function<void()>& start);
  void call(ncclResult_t result, const char* name);
  // Until what was asked of the communicator is no longer under way, at most so long.
  void settle(const char* name, std::chrono::milliseconds limit);
  void abort();
  [[noreturn]] void fail(const char* name, const std::string& why);
  cudaEvent_t event();

  const comm::Members members_;
  std::chrono::milliseconds timeout_;
  cudaStream_t stream_ = nullptr;
  ncclComm_t comm_ = nullptr;
  Memory pieces_;  // of sums
  std::deque<InFlight> in_flight_;
  std::vector<cudaEvent_t> idle_events_;
};

}  // namespace uly::engine::cuda
