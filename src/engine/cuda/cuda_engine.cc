#include "engine/cuda/cuda_engine.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include <ATen/Parallel.h>

#include "base/check.h"
#include "base/log.h"
#include "base/shapes.h"
#include "base/units.h"
#include "engine/cuda/flash.h"

namespace uly::engine::cuda {

CudaEngine::CudaEngine(comm::Group& world, comm::Group& sequence, const CudaOptions& options) : Engine(world, sequence), options_(options) {
  check(cudaSetDevice(options.device), fmt::format("GPU {}", options.device).c_str());
  for (cudaStream_t* stream : {&stream_, &to_host_, &to_device_, &disk_stream_}) check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "a stream");
  gemm_workspace_ = Memory(Place::kDevice, ops::kGemmWorkspaceBytes);
  scratch_ = Memory(Place::kDevice, options.scratch_bytes);
  gemm_.emplace(stream_, gemm_workspace_.base(), options.deterministic);
  attention_.emplace(stream_);
}

CudaEngine::~CudaEngine() {
  cudaStreamSynchronize(stream_);
  disk_.reset(), host_.reset();
  for (memory::HostArena* arena : {&run_host_, &step_host_}) release_host(*arena);
  attention_.reset();
  gemm_.reset();
  for (cudaEvent_t e : events_) cudaEventDestroy(e);
  for (cudaStream_t stream : {to_host_, to_device_, disk_stream_, stream_}) cudaStreamDestroy(stream);
}

std::byte* CudaEngine::reserve(ops::Life life, ops::Tier tier, int64_t bytes) {
  if (tier == ops::Tier::kHost) return reserve_host(life, bytes);
  if (tier == ops::Tier::kDisk) {
    reserve_disk(life, bytes);
    return nullptr;
  }
  Memory& memory = life == ops::Life::kRun ? run_ : step_;
  finish();
  memory = Memory();
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  if (bytes > static_cast<int64_t>(free)) out_of_memory(bytes);
  try {
    memory = Memory(Place::kDevice, bytes);
  } catch (const DeviceError&) {  // free, but not at one place; or somebody else has taken it
    out_of_memory(bytes);
  }
  if (life == ops::Life::kRun) check(cudaMemsetAsync(memory.base(), 0, static_cast<size_t>(bytes), stream_), "emptying memory");
  return memory.base();
}

void CudaEngine::release_host(memory::HostArena& arena) {
  if (arena.base() != nullptr && cudaHostUnregister(arena.base()) != cudaSuccess) cudaGetLastError();  // it may have been refused
  arena = memory::HostArena();
}

std::byte* CudaEngine::reserve_host(ops::Life life, int64_t bytes) {
  memory::HostArena& arena = life == ops::Life::kRun ? run_host_ : step_host_;
  finish();
  release_host(arena);
  arena = memory::HostArena(bytes, at::get_num_threads());
  if (const cudaError_t error = cudaHostRegister(arena.base(), static_cast<size_t>(arena.bytes()), cudaHostRegisterDefault); error != cudaSuccess) {
    cudaGetLastError();
    say("host memory: {} cannot be locked for the GPU ({}): copies to it will be slower and hold up the launching thread; `ulimit -l unlimited` allows it", format_bytes(bytes), cudaGetErrorString(error));
  }
  return arena.base();
}

void CudaEngine::reserve_disk(ops::Life life, int64_t bytes) {
  if (!disk_) {
    ring_ = Memory(Place::kHost, DiskTier::kPieces * DiskTier::kPieceBytes);
    disk_.emplace(options_.device, stream_);
    for (std::optional<DiskTier>* disk : {&run_disk_, &step_disk_})
      disk->emplace(options_.disk_folders, ring_.base(), [stream = disk_stream_](std::byte* to, const std::byte* from, int64_t n) {
        check(cudaMemcpyAsync(to, from, static_cast<size_t>(n), cudaMemcpyDefault, stream), "copy between the disk's ring and a tier");
        check(cudaStreamSynchronize(stream), "copy between the disk's ring and a tier");
      });
  }
  finish();
  (life == ops::Life::kRun ? run_disk_ : step_disk_)->reserve(bytes);
}

cudaEvent_t CudaEngine::next_event() {
  if (events_used_ == events_.size()) {
    cudaEvent_t e = nullptr;
    check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "an event");
    events_.push_back(e);
  }
  return events_[events_used_++];
}

ops::Event CudaEngine::pending(Pending p) {
  pending_.push_back(p);
  return {static_cast<int32_t>(pending_.size()) - 1};
}

ops::Event CudaEngine::move(ops::Buffer y, ops::Buffer x) {
  const int64_t bytes = x.bytes();
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) {
    const bool write = y.tier == ops::Tier::kDisk;
    const ops::Buffer& there = write ? y : x;
    auto* here = static_cast<std::byte*>(address(write ? x : y));
    const uint32_t number = disk_->queue([disk = &disk_of(there), place = place_bytes(there), here, bytes, write] {
      if (write) disk->write(place, here, bytes);
      else disk->read(place, here, bytes);
    });
    return pending({.tasks = &*disk_, .number = number});
  }
  const bool out = y.tier == ops::Tier::kHost;
  const cudaStream_t stream = out ? to_host_ : to_device_;
  const cudaEvent_t begin = next_event(), end = next_event();
  check(cudaEventRecord(begin, stream_), "an event");
  check(cudaStreamWaitEvent(stream, begin), "an event");
  check(cudaMemcpyAsync(address(y), address(x), static_cast<size_t>(bytes), out ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream), "copy between tiers");
  check(cudaEventRecord(end, stream), "an event");
  return pending({.event = end});
}

void CudaEngine::out_of_memory(int64_t bytes) {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  std::string words = fmt::format("GPU {} out of memory{}: {} wanted, {} free of {}", options_.device, where().empty() ? "" : " at " + where(), format_bytes(bytes), format_bytes(static_cast<int64_t>(free)), format_bytes(static_cast<int64_t>(total)));
  if (options_.advice) words += options_.advice(static_cast<int64_t>(free) + run_.bytes() + step_.bytes());
  throw DeviceError(words);
}

void CudaEngine::finish() {
  check(cudaStreamSynchronize(stream_), where().c_str());
  for (std::optional<Tasks>* tasks : {&disk_, &host_})
    if (*tasks) (*tasks)->rethrow();
  staged_used_ = 0;
}

void CudaEngine::read(void* host, const ops::Buffer& b) {
  ULY_CHECK(b.contiguous(), "only whole rows are read");
  if (b.tier != ops::Tier::kDevice) {
    finish();
    if (b.tier == ops::Tier::kHost) std::memcpy(host, address(b), static_cast<size_t>(b.bytes()));
    else disk_->run([&] { disk_of(b).read(place_bytes(b), static_cast<std::byte*>(host), b.bytes()); });
    return;
  }
  check(cudaMemcpyAsync(host, address(b), static_cast<size_t>(b.bytes()), cudaMemcpyDeviceToHost, stream_), "copy to the host");
  finish();
}

void CudaEngine::write(const ops::Buffer& b, const void* host) {
  ULY_CHECK(b.contiguous(), "only whole rows are written");
  if (b.tier != ops::Tier::kDevice) {
    finish();
    if (b.tier == ops::Tier::kHost) std::memcpy(address(b), host, static_cast<size_t>(b.bytes()));
    else disk_->run([&] { disk_of(b).write(place_bytes(b), static_cast<const std::byte*>(host), b.bytes()); });
    return;
  }
  check(cudaMemcpyAsync(address(b), host, static_cast<size_t>(b.bytes()), cudaMemcpyHostToDevice, stream_), "copy to the GPU");
  finish();
}

std::map<std::string, double> CudaEngine::seconds() { return timers_.take(); }

void CudaEngine::mark(std::string_view where, int64_t layer) {
  Engine::mark(where, layer);
  where_.reset();
  where_.emplace(this->where().c_str());
}

void* CudaEngine::scratch(int64_t bytes) {
  if (bytes > scratch_.bytes()) throw InternalError(fmt::format("{}: {} bytes of scratch wanted, {} planned", where(), bytes, scratch_.bytes()));
  return scratch_.base();
}

void CudaEngine::send(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return;
  if (staged_used_ == staged_.size()) staged_.emplace_back();
  Memory& pinned = staged_[staged_used_++];
  if (pinned.bytes() < bytes) {
    pinned = Memory();
    pinned = Memory(Place::kHost, bytes + bytes / 4);
  }
  std::memcpy(pinned.base(), from, static_cast<size_t>(bytes));
  check(cudaMemcpyAsync(to, pinned.base(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_), "copy to the GPU");
}

void CudaEngine::load_batch(const ops::Buffer& table) {
  const auto bytes = [](const auto& v) { return static_cast<int64_t>(v.size() * sizeof v[0]); };
  send(address(input(ops::Input::kIds_s)), batch().ids.data(), bytes(batch().ids));
  send(address(input(ops::Input::kLabels_s)), batch().labels.data(), bytes(batch().labels));
  send(address(input(ops::Input::kPositions_s)), batch().positions.data(), bytes(batch().positions));
  planned_ = false;
  exchanges_.clear();
  pending_.clear();
  events_used_ = 0;
  if (!table.exists()) return;  // a program of updates alone
  // The table holds what kernels look up: rope's frequencies first, then the documents of attention's calls.
  table_ = table;
  table_used_ = round_up(bytes(batch().inverse_frequencies), 256);
  inverse_frequencies_ = static_cast<const float*>(address(table));
  send(address(table), batch().inverse_frequencies.data(), bytes(batch().inverse_frequencies));
}

// --- linear maps

void CudaEngine::linear(ops::Buffer y, ops::Buffer x, ops::Buffer w) {
  const Range r = range(Work::kGemm, "linear");
  gemm_->linear(matrix(y), matrix(x), matrix(w));
}
void CudaEngine::linear_add(ops::Buffer y, ops::Buffer x, ops::Buffer w, ops::Buffer r_tO) {
  const Range r = range(Work::kGemm, "linear_add");
  gemm_->linear_add(matrix(y), matrix(x), matrix(w), matrix(r_tO));
}
void CudaEngine::linear_dx(ops::Buffer dx, ops::Buffer dy, ops::Buffer w) {
  const Range r = range(Work::kGemm, "linear_dx");
  gemm_->linear_dx(matrix(dx), matrix(dy), matrix(w));
}
void CudaEngine::linear_dw(ops::Buffer dw, ops::Buffer dy, ops::Buffer x, bool add) {
  const Range r = range(Work::kGemm, "linear_dw");
  gemm_->linear_dw(matrix(dw), matrix(dy), matrix(x), add);
}

// --- attention

AttentionArgs CudaEngine::attention_args(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  AttentionArgs a{.qkv = matrix(qkv), .o = matrix(o), .lse = matrix(lse), .dqkv = {}, .d_o = {}, .workspace = matrix(workspace), .heads = heads, .schedule = schedule};
  if (!planned_) {  // once a batch: its documents are the same in every layer
    std::byte* at = static_cast<std::byte*>(address(table_)) + table_used_;
    if (schedule.backend == ops::AttentionBackend::kCudnn) {
      const std::vector<std::byte> image = attention_->plan(batch().document_starts, a, at);
      ULY_CHECK(table_used_ + static_cast<int64_t>(image.size()) <= table_.bytes(), "the table of documents has room");
      send(at, image.data(), static_cast<int64_t>(image.size()));
    } else {
      const std::vector<int32_t> starts(batch().document_starts.begin(), batch().document_starts.end());
      send(at, starts.data(), static_cast<int64_t>(starts.size() * sizeof(int32_t)));
    }
    planned_ = true;
  }
  return a;
}

void CudaEngine::attention(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  const Range r = range(Work::kAttention, "attention");
  const AttentionArgs a = attention_args(o, lse, qkv, workspace, heads, schedule);
  if (schedule.backend == ops::AttentionBackend::kCudnn) attention_->forward(a);
  else flash_forward(a, batch().document_starts, static_cast<std::byte*>(address(table_)) + table_used_, stream_, options_.device);
}

void CudaEngine::attention_grad(ops::Buffer dqkv, ops::Buffer d_o, ops::Buffer qkv, ops::Buffer o, ops::Buffer lse, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  const Range r = range(Work::kAttentionGrad, "attention_grad");
  AttentionArgs a = attention_args(o, lse, qkv, workspace, heads, schedule);
  a.dqkv = matrix(dqkv), a.d_o = matrix(d_o);
  if (schedule.backend == ops::AttentionBackend::kCudnn) attention_->backward(a);
  else flash_backward(a, batch().document_starts, static_cast<std::byte*>(address(table_)) + table_used_, stream_, options_.device);
}

// --- exchanges, through pinned host memory

Memory CudaEngine::pinned(int64_t bytes) {
  if (bytes == 0) return Memory();
  const int64_t size = round_up(bytes, std::max<int64_t>(4096, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)) / 8)));
  for (Memory& m : pinned_)
    if (m.bytes() == size) {
      Memory found = std::move(m);
      m = std::move(pinned_.back());
      pinned_.pop_back();
      return found;
    }
  return Memory(Place::kHost, size);
}

ops::Event CudaEngine::exchange(const ops::Buffer& to, const ops::Buffer& from, const std::function<comm::Work(void*, void*)>& start) {
  const Range r = range(Work::kExchange, "exchange");
  Exchange& e = exchanges_.emplace_back();
  e.from = pinned(from.bytes());
  e.to = pinned(to.bytes());
  e.into = to;
  check(cudaMemcpyAsync(e.from.base(), address(from), static_cast<size_t>(from.bytes()), cudaMemcpyDeviceToHost, stream_), "copy to the host");
  check(cudaStreamSynchronize(stream_), where().c_str());
  e.work = start(e.to.base(), e.from.base());
  return pending({.exchange = static_cast<int64_t>(exchanges_.size()) - 1});
}

ops::Event CudaEngine::all_to_all(ops::Buffer received, ops::Buffer send, ops::Group which, const std::vector<int64_t>& receive_elements, const std::vector<int64_t>& send_elements) {
  return exchange(received, send, [&](void* to, void* from) { return group(which).all_to_all(to, from, in_bytes(receive_elements, received.dtype), in_bytes(send_elements, send.dtype)); });
}

ops::Event CudaEngine::all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group which) {
  return exchange(whole, shard, [&](void* to, void* from) { return group(which).all_gather(to, from, shard.bytes()); });
}

ops::Event CudaEngine::scatter(ops::Buffer received, ops::Buffer whole, ops::Group which) {
  const int64_t ranks = group(which).size();
  const std::vector<int64_t> each(static_cast<size_t>(ranks), whole.bytes() / ranks);
  return exchange(received, whole, [&](void* to, void* from) { return group(which).all_to_all(to, from, each, each); });
}

ops::Event CudaEngine::all_reduce(ops::Buffer x, ops::Group which) {
  ULY_CHECK(x.dtype == Dtype::kF64, "sums over ranks are fp64");
  return exchange(x, x, [&](void* to, void* from) {
    std::memcpy(to, from, static_cast<size_t>(x.bytes()));
    return group(which).all_reduce_sum(static_cast<double*>(to), x.elements());
  });
}

void CudaEngine::wait(ops::Event event) {
  if (event.id < 0) return;
  const Pending& p = pending_[static_cast<size_t>(event.id)];
  if (p.event != nullptr) return check(cudaStreamWaitEvent(stream_, p.event), "waiting for a copy");
  if (p.tasks != nullptr) return p.tasks->wait(p.number);
  const Range r = range(Work::kExchange, "wait");
  Exchange& e = exchanges_[static_cast<size_t>(p.exchange)];
  e.work.wait();
  if (!e.to.base()) return;
  check(cudaMemcpyAsync(address(e.into), e.to.base(), static_cast<size_t>(e.into.bytes()), cudaMemcpyHostToDevice, stream_), "copy to the GPU");
  check(cudaStreamSynchronize(stream_), where().c_str());
  for (Memory* m : {&e.from, &e.to}) pinned_.push_back(std::move(*m));
}

}  // namespace uly::engine::cuda

extern "C" __attribute__((visibility("default"))) uly::engine::Engine* ulysses_make_cuda_engine(uly::comm::Group* world, uly::comm::Group* sequence, const uly::engine::CudaOptions* options) {
  return new uly::engine::cuda::CudaEngine(*world, *sequence, *options);
}

extern "C" __attribute__((visibility("default"))) int64_t ulysses_cuda_layouts() { return uly::engine::kLayouts; }
