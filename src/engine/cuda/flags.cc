#include "engine/cuda/flags.h"

#include <cuda.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "base/check.h"

namespace uly::engine::cuda {
namespace {

// Both operations' flags.
static_assert(static_cast<int>(CU_STREAM_WAIT_VALUE_GEQ) == static_cast<int>(CU_STREAM_WRITE_VALUE_DEFAULT));
using StreamOperation = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

void* of_driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) == cudaSuccess && found == cudaDriverEntryPointSuccess) return function;
  cudaGetLastError();
  return nullptr;
}

}  // namespace

Flags::Flags(int64_t count) : memory_(Place::kHost, count * kApart), write_(of_driver("cuStreamWriteValue32")), wait_(of_driver("cuStreamWaitValue32")) {
  std::memset(memory_.base(), 0, static_cast<size_t>(memory_.bytes()));
  void* p = nullptr;
  check(cudaHostGetDevicePointer(&p, memory_.base(), 0), "flags that the GPU sees");
  on_device_ = static_cast<std::byte*>(p);
  if (!write_ || !wait_) write_ = wait_ = nullptr;
}

// False where the driver refuses such operations.
bool Flags::queue(void* operation, int64_t flag, uint32_t number, cudaStream_t stream) {
  if (!operation) return false;
  const CUresult result = reinterpret_cast<StreamOperation>(operation)(stream, reinterpret_cast<CUdeviceptr>(on_device_ + flag * kApart), number, CU_STREAM_WAIT_VALUE_GEQ);
  if (result == CUDA_SUCCESS) return true;
  if (result != CUDA_ERROR_NOT_SUPPORTED) throw DeviceError(fmt::format("CUDA: a stream that waits for the host: error {}", static_cast<int>(result)));
  write_ = wait_ = nullptr;
  return false;
}

void Flags::raise(int64_t flag, uint32_t number, cudaStream_t stream) {
  if (queue(write_, flag, number, stream)) return;
  check(cudaStreamSynchronize(stream), "waiting in place of a stream");
  raise(flag, number);
}

void Flags::await(int64_t flag, uint32_t number, cudaStream_t stream) {
  if (!queue(wait_, flag, number, stream)) await(flag, number);
}

void Flags::raise(int64_t flag, uint32_t number) { std::atomic_ref<uint32_t>(*at(flag)).store(number, std::memory_order_release); }

void Flags::await(int64_t flag, uint32_t number) const {
  constexpr int kTurns = 200;  // what comes soon is not slept over
  for (int turn = 0; !reached(flag, number); ++turn) {
    if (given_up_ && !reached(flag, number)) throw DeviceError("the GPU has stopped");
    if (turn < kTurns) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

}  // namespace uly::engine::cuda
