#include "engine/cuda/nccl.h"

#include <cstring>
#include <exception>
#include <thread>

#include "base/check.h"
#include "kernels/exchange.h"

namespace uly::engine::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kGoodbye{10};

ncclUniqueId unique_id(comm::Group& group) {
  ncclUniqueId id{};
  std::string mine;
  if (group.rank() == 0) {
    const ncclResult_t result = ncclGetUniqueId(&id);
    if (result != ncclSuccess) throw DeviceError(fmt::format("rank {}: NCCL cannot begin: {}", group.members().ranks[0], ncclGetLastError(nullptr)));
    mine.assign(id.internal, sizeof id.internal);
  }
  const std::string first = group.exchange(mine)[0];
  ULY_CHECK_EQ(first.size(), sizeof id.internal, "bytes of NCCL's id");
  std::memcpy(id.internal, first.data(), sizeof id.internal);
  return id;
}

}  // namespace

Nccl::Nccl(comm::Group& group, std::chrono::milliseconds timeout) : members_(group.members()), timeout_(timeout), pieces_(Place::kDevice, group.size() * kMostReduced * static_cast<int64_t>(sizeof(double))) {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "streams' priorities");
  // Before the kernels of compute that wait to start: an exchange needs few multiprocessors, but soon.
  check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "a stream");
  const ncclUniqueId id = unique_id(group);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  try {
    call(ncclCommInitRankConfig(&comm_, static_cast<int>(group.size()), id, static_cast<int>(group.rank()), &config), "connecting");
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
}

Nccl::~Nccl() {
  if (comm_ && std::uncaught_exceptions() == 0) {
    try {
      const ncclResult_t result = ncclCommFinalize(comm_);
      result == ncclInProgress ? settle("leaving", kGoodbye) : call(result, "leaving");
      ncclCommDestroy(comm_);
      comm_ = nullptr;
    } catch (const DeviceError&) {  // the others have gone before
    }
  }
  abort();
  cudaStreamSynchronize(stream_);
  for (const InFlight& f : in_flight_) idle_events_.push_back(f.begun), idle_events_.push_back(f.ended);
  for (const cudaEvent_t e : idle_events_) cudaEventDestroy(e);
  cudaStreamDestroy(stream_);
}

void Nccl::abort() {
  if (comm_) ncclCommAbort(comm_);
  comm_ = nullptr;
}

void Nccl::fail(const char* name, const std::string& why) {
  abort();
  throw DeviceError(fmt::format("rank {}: {} in group '{}' of {} ranks failed (NCCL): {}", members_.ranks[static_cast<size_t>(members_.mine)], name, members_.name, members_.ranks.size(), why));
}

void Nccl::call(ncclResult_t result, const char* name) {
  if (result == ncclInProgress) return settle(name, timeout_);
  if (result == ncclSuccess) return;
  const std::string last = ncclGetLastError(comm_);
  fail(name, last.empty() ? ncclGetErrorString(result) : fmt::format("{}: {}", ncclGetErrorString(result), last));
}

void Nccl::settle(const char* name, std::chrono::milliseconds limit) {
  const auto begin = Clock::now();
  for (int64_t turn = 0;; ++turn) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
    if (asked != ncclSuccess) return call(asked, name);
    if (state != ncclInProgress) return call(state, name);
    if (Clock::now() - begin > limit) fail(name, fmt::format("the peers did not answer within {} s", std::chrono::duration_cast<std::chrono::seconds>(limit).count()));
    if (turn > 1000) std::this_thread::sleep_for(std::chrono::microseconds(50));
    else std::this_thread::yield();
  }
}

cudaEvent_t Nccl::event() {
  if (idle_events_.empty()) {
    cudaEvent_t e = nullptr;
    check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "an event");
    return e;
  }
  const cudaEvent_t e = idle_events_.back();
  idle_events_.pop_back();
  return e;
}

void Nccl::exchange(const char* name, const std::function<void()>& start) {
  look();
  InFlight& f = in_flight_.emplace_back();
  f.name = name, f.begun = event(), f.ended = event();
  check(cudaEventRecord(f.begun, stream_), "an event");
  start();
  check(cudaEventRecord(f.ended, stream_), "an event");
}

void Nccl::look() {
  if (!comm_) fail("an exchange", "the group has failed before");
  ncclResult_t state = ncclSuccess;
  call(ncclCommGetAsyncError(comm_, &state), "an exchange");
  if (state != ncclInProgress) call(state, in_flight_.empty() ? "an exchange" : in_flight_.front().name);
  const auto done = [](cudaEvent_t e) {
    const cudaError_t error = cudaEventQuery(e);
    if (error != cudaErrorNotReady) check(error, "an exchange by NCCL");
    return error == cudaSuccess;
  };
  while (!in_flight_.empty() && done(in_flight_.front().ended)) {
    idle_events_.push_back(in_flight_.front().begun), idle_events_.push_back(in_flight_.front().ended);
    in_flight_.pop_front();
  }
  if (in_flight_.empty()) return;
  InFlight& first = in_flight_.front();
  if (!first.since && done(first.begun)) first.since = Clock::now();
  if (first.since && Clock::now() - *first.since > timeout_) fail(first.name, fmt::format("it did not end within {} s", std::chrono::duration_cast<std::chrono::seconds>(timeout_).count()));
}

void Nccl::all_to_all(void* receive, const void* send, const std::vector<int64_t>& receive_bytes, const std::vector<int64_t>& send_bytes) {
  const size_t size = members_.ranks.size(), me = static_cast<size_t>(members_.mine);
  ULY_CHECK(receive_bytes.size() == size && send_bytes.size() == size && receive_bytes[me] == send_bytes[me], "counts of an all_to_all");
  exchange("all_to_all", [&] {
    auto* to = static_cast<std::byte*>(receive);
    auto* from = static_cast<const std::byte*>(send);
    bool others = false;
    for (size_t p = 0; p < size; ++p) others = others || (p != me && (receive_bytes[p] > 0 || send_bytes[p] > 0));
    if (others) call(ncclGroupStart(), "all_to_all");
    for (size_t p = 0; p < size; ++p) {
      if (p == me) {
        if (receive_bytes[p] > 0) check(cudaMemcpyAsync(to, from, static_cast<size_t>(receive_bytes[p]), cudaMemcpyDeviceToDevice, stream_), "copy on the GPU");
      } else {
        const auto queue = [&](ncclResult_t result) {
          if (result != ncclInProgress) call(result, "all_to_all");  // it is the group that is under way
        };
        if (send_bytes[p] > 0) queue(ncclSend(from, static_cast<size_t>(send_bytes[p]), ncclInt8, static_cast<int>(p), comm_, stream_));
        if (receive_bytes[p] > 0) queue(ncclRecv(to, static_cast<size_t>(receive_bytes[p]), ncclInt8, static_cast<int>(p), comm_, stream_));
      }
      to += receive_bytes[p], from += send_bytes[p];
    }
    if (others) call(ncclGroupEnd(), "all_to_all");
  });
}

void Nccl::all_gather(void* whole, const void* shard, int64_t bytes) {
  if (bytes == 0) return;
  exchange("all_gather", [&] { call(ncclAllGather(shard, whole, static_cast<size_t>(bytes), ncclInt8, comm_, stream_), "all_gather"); });
}

void Nccl::all_reduce_sum(double* x, int64_t count) {
  ULY_CHECK(count <= kMostReduced, "few numbers are summed over ranks");
  if (count == 0) return;
  auto* pieces = reinterpret_cast<double*>(pieces_.base());
  exchange("all_reduce", [&] {
    call(ncclAllGather(x, pieces, static_cast<size_t>(count), ncclFloat64, comm_, stream_), "all_reduce");
    kernels::sum_of_ranks({.y = x, .x = pieces, .count = count, .ranks = static_cast<int64_t>(members_.ranks.size())}, stream_);
  });
}

}  // namespace uly::engine::cuda
