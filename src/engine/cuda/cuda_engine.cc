#include "engine/cuda/cuda_engine.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/shapes.h"
#include "base/units.h"
#include "engine/cuda/flash.h"

namespace uly::engine::cuda {
namespace {

// Host memory is registered by so many bytes: CUDA's drivers have refused 512 GiB at once, and refuse copies that lie in two
// registrations.
constexpr int64_t kRegisteredBytes = int64_t{64} << 30;

// Takes seconds.
constexpr int64_t kWorthSaying = int64_t{16} << 30;

// As far as it is registered.
void unregister(const memory::HostArena& arena) {
  for (int64_t at = 0; at < arena.bytes() && cudaHostUnregister(arena.base() + at) == cudaSuccess; at += kRegisteredBytes) {
  }
  cudaGetLastError();
}

}  // namespace

CudaEngine::CudaEngine(comm::Group& world, comm::Group& sequence, const CudaOptions& options) : Engine(world, sequence, options.node, options.rehearsal), options_(options) {
  check(cudaSetDevice(options.device), fmt::format("GPU {}", options.device).c_str());
  for (cudaStream_t* stream : {&stream_, &to_host_, &to_device_, &disk_stream_}) check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "a stream");
  gemm_workspace_ = Memory(Place::kDevice, ops::kGemmWorkspaceBytes);
  scratch_ = Memory(Place::kDevice, options.scratch_bytes);
  gemm_.emplace(stream_, gemm_workspace_.base(), options.deterministic);
  attention_.emplace(stream_);
  if (!options.nccl) return;
  // Of one rank only where there is no other: then for tests.
  for (const ops::Group which : {ops::Group::kWorld, ops::Group::kSequence, ops::Group::kNode})
    if (has(which) && (group(which).size() > 1 || world.size() == 1)) nccl_[static_cast<size_t>(which)].emplace(group(which), options.exchange_timeout);
}

CudaEngine::~CudaEngine() {
  for (auto& nccl : nccl_) nccl.reset();  // first: streams wait for exchanges, which a failure ends
  for (cudaStream_t stream : {stream_, to_host_, to_device_, disk_stream_}) cudaStreamSynchronize(stream);
  disk_.reset(), host_.reset();
  for (HostMemory* host : {&run_host_, &step_host_}) release_host(*host);
  attention_.reset();
  gemm_.reset();
  for (cudaEvent_t e : events_) cudaEventDestroy(e);
  for (cudaStream_t stream : {to_host_, to_device_, disk_stream_, stream_}) cudaStreamDestroy(stream);
}

std::byte* CudaEngine::reserve(ops::Life life, ops::Tier tier, int64_t bytes) {
  finish();
  if (tier == ops::Tier::kDevice) return reserve_device(life, bytes);
  if (tier == ops::Tier::kHost) return reserve_host(life, bytes);
  if (!disk_) disk_.emplace(options_.disk_folders, options_.disk_faults, stream_, disk_stream_);
  disk_->reserve(life, bytes);
  return nullptr;
}

std::byte* CudaEngine::reserve_device(ops::Life life, int64_t bytes) {
  Memory& memory = life == ops::Life::kRun ? run_ : step_;
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

std::byte* CudaEngine::reserve_host(ops::Life life, int64_t bytes) {
  HostMemory& host = host_of(life);
  release_host(host);
  const auto begin = std::chrono::steady_clock::now();
  const auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  if (bytes >= kWorthSaying) say("host memory: taking {}", format_bytes(bytes));
  host.arena = memory::HostArena(bytes, options_.host_threads > 0 ? options_.host_threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
  const double taken = since();
  cudaError_t error = cudaSuccess;
  for (int64_t at = 0; at < host.arena.bytes() && error == cudaSuccess; at += kRegisteredBytes)
    error = cudaHostRegister(host.arena.base() + at, static_cast<size_t>(std::min(kRegisteredBytes, host.arena.bytes() - at)), cudaHostRegisterDefault);
  host.locked = error == cudaSuccess;
  if (bytes >= kWorthSaying) say("host memory: {} in {}: {:.1f} s, locked for the GPU in {:.1f} s", format_bytes(bytes), host.arena.words(), taken, since() - taken);
  if (host.locked) return host.arena.base();
  unregister(host.arena);
  say("host memory: {} cannot be locked for the GPU ({}): copies to it are slower and hold up the launching thread; `ulimit -l unlimited` may allow it", format_bytes(bytes), cudaGetErrorString(error));
  return host.arena.base();
}

void CudaEngine::release_host(HostMemory& host) {
  if (host.locked) unregister(host.arena);
  host = HostMemory();
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

void CudaEngine::begin_beside(cudaStream_t stream) {
  const cudaEvent_t begin = next_event();
  check(cudaEventRecord(begin, stream_), "an event");
  check(cudaStreamWaitEvent(stream, begin), "an event");
}

ops::Event CudaEngine::end_beside(cudaStream_t stream) {
  const cudaEvent_t end = next_event();
  check(cudaEventRecord(end, stream), "an event");
  return pending({.event = end});
}

ops::Event CudaEngine::move(ops::Buffer y, ops::Buffer x) {
  ULY_CHECK(y.contiguous() && x.contiguous() && y.bytes() == x.bytes() && y.tier != x.tier, "a move is of the same bytes in another tier");
  rethrow();
  const int64_t bytes = x.bytes();
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) {
    const bool out = y.tier == ops::Tier::kDisk;
    const ops::Buffer& there = out ? y : x;
    const ops::Buffer& here = out ? x : y;
    auto* memory = static_cast<std::byte*>(address(here));
    const Named named(out ? "move to disk" : "move from disk");
    if (here.tier == ops::Tier::kHost) return pending({.tasks = &disk_->tasks(), .number = out ? disk_->host_to_disk(on_disk(there), memory, bytes) : disk_->disk_to_host(memory, on_disk(there), bytes)});
    begin_beside(disk_stream_);
    if (out) disk_->to_disk(on_disk(there), memory, bytes);
    else disk_->from_disk(memory, on_disk(there), bytes);
    return end_beside(disk_stream_);
  }
  const bool out = y.tier == ops::Tier::kHost;
  const ops::Buffer& there = out ? y : x;
  const cudaStream_t stream = out ? to_host_ : to_device_;
  if (!host_of(there.life).locked) check(cudaStreamSynchronize(stream_), where().c_str());
  begin_beside(stream);
  {
    const Range r(timers_, out ? Work::kToHost : Work::kToDevice, out ? "move to host" : "move to device", stream);
    auto *to = static_cast<std::byte*>(address(y)), *from = static_cast<std::byte*>(address(x));
    for (int64_t done = 0, n = 0; done < bytes; done += n) {
      n = std::min(bytes - done, kRegisteredBytes - (place_bytes(there) + done) % kRegisteredBytes);
      check(cudaMemcpyAsync(to + done, from + done, static_cast<size_t>(n), out ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream), "copy between tiers");
    }
  }
  return end_beside(stream);
}

void CudaEngine::out_of_memory(int64_t bytes) {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  std::string words = fmt::format("GPU {} out of memory{}: {} wanted, {} free of {}", options_.device, where().empty() ? "" : " at " + where(), format_bytes(bytes), format_bytes(static_cast<int64_t>(free)), format_bytes(static_cast<int64_t>(total)));
  if (options_.advice) words += options_.advice(static_cast<int64_t>(free) + run_.bytes() + step_.bytes());
  throw DeviceError(words);
}

void CudaEngine::finish() {
  // A peer that is gone is noticed here.
  const auto working = [&](cudaStream_t stream) {
    const cudaError_t error = cudaStreamQuery(stream);
    if (error != cudaErrorNotReady) check(error, where().c_str());
    return error != cudaSuccess;
  };
  for (auto& nccl : nccl_)
    while (nccl && (working(nccl->stream()) || working(stream_))) {
      for (auto& each : nccl_)
        if (each) each->look();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  for (cudaStream_t stream : {stream_, to_host_, to_device_, disk_stream_}) check(cudaStreamSynchronize(stream), where().c_str());
  if (disk_) disk_->tasks().finish();
  if (host_) host_->finish();
  staged_used_ = 0;
}

void CudaEngine::rethrow() {
  if (disk_) disk_->tasks().rethrow();
  if (host_) host_->rethrow();
}

void CudaEngine::read(void* host, const ops::Buffer& b) {
  ULY_CHECK(b.contiguous(), "only whole rows are read");
  finish();
  if (b.tier == ops::Tier::kHost) {
    std::memcpy(host, address(b), static_cast<size_t>(b.bytes()));
    return;
  }
  if (b.tier == ops::Tier::kDisk) disk_->disk_to_host(static_cast<std::byte*>(host), on_disk(b), b.bytes());
  else check(cudaMemcpyAsync(host, address(b), static_cast<size_t>(b.bytes()), cudaMemcpyDeviceToHost, stream_), "copy to the host");
  finish();
}

void CudaEngine::write(const ops::Buffer& b, const void* host) {
  ULY_CHECK(b.contiguous(), "only whole rows are written");
  finish();
  if (b.tier == ops::Tier::kHost) {
    std::memcpy(address(b), host, static_cast<size_t>(b.bytes()));
    return;
  }
  if (b.tier == ops::Tier::kDisk) disk_->host_to_disk(on_disk(b), static_cast<const std::byte*>(host), b.bytes());
  else check(cudaMemcpyAsync(address(b), host, static_cast<size_t>(b.bytes()), cudaMemcpyHostToDevice, stream_), "copy to the GPU");
  finish();
}

void CudaEngine::time(bool on) {
  seconds();  // what came before counts for nobody
  timers_.on = on;
}

std::map<std::string, double> CudaEngine::seconds() {
  std::map<std::string, double> sums = timers_.take();
  if (const double s = disk_ ? disk_->seconds() : 0; s > 0 && timers_.on) sums["disk"] = s;
  if (const double s = host_ ? host_->seconds() : 0; s > 0 && timers_.on) sums["host_update"] = s;
  return sums;
}

// Of the host every page has been touched.
std::array<int64_t, ops::kNumTiers> CudaEngine::held_bytes() const {
  return {run_.bytes() + step_.bytes(), run_host_.arena.bytes() + step_host_.arena.bytes(), disk_ ? disk_->held_bytes() : 0};
}

std::vector<std::string> CudaEngine::tier_words() const {
  std::vector<std::string> words;
  for (const ops::Life life : {ops::Life::kRun, ops::Life::kStep}) {
    const HostMemory& host = life == ops::Life::kRun ? run_host_ : step_host_;
    const char* const when = life == ops::Life::kRun ? "between steps" : "within one";
    if (host.arena.bytes() > 0) words.push_back(fmt::format("host memory, {}: {} in {}{}", when, format_bytes(host.arena.bytes()), host.arena.words(), host.locked ? ", locked" : ", not locked"));
    if (const std::string disk = disk_ ? disk_->words(life) : ""; !disk.empty()) words.push_back(fmt::format("disk, {}: {}", when, disk));
  }
  return words;
}

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
  if (!cut(Map::kLinear, w, {&x}, &y)) return;
  const Range r = range(Work::kGemm, "linear");
  gemm_->linear(matrix(y), matrix(x), matrix(w));
}
void CudaEngine::linear_add(ops::Buffer y, ops::Buffer x, ops::Buffer w, ops::Buffer r_tO) {
  if (!cut(Map::kLinearAdd, w, {&x, &r_tO}, &y)) return;
  const Range r = range(Work::kGemm, "linear_add");
  gemm_->linear_add(matrix(y), matrix(x), matrix(w), matrix(r_tO));
}
void CudaEngine::linear_dx(ops::Buffer dx, ops::Buffer dy, ops::Buffer w) {
  if (!cut(Map::kDx, w, {&dy}, &dx)) return;
  const Range r = range(Work::kGemm, "linear_dx");
  gemm_->linear_dx(matrix(dx), matrix(dy), matrix(w));
}
void CudaEngine::linear_dw(ops::Buffer dw, ops::Buffer dy, ops::Buffer x, bool add) {
  if (!cut(Map::kDw, dw, {&dy, &x})) return;
  const Range r = range(Work::kGemm, "linear_dw");
  gemm_->linear_dw(matrix(dw), matrix(dy), matrix(x), add);
}

// --- attention

// Of the tokens of the documents that `starts` tells of.
AttentionArgs CudaEngine::attention_args(const std::vector<int64_t>& starts, ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  for (ops::Buffer* b : {&o, &lse, &qkv}) *b = b->row_range(0, starts.back());
  AttentionArgs a{.qkv = matrix(qkv), .o = matrix(o), .lse = matrix(lse), .dqkv = {}, .d_o = {}, .workspace = matrix(workspace), .heads = heads, .schedule = schedule};
  if (!planned_) {  // once a batch: its documents are the same in every layer
    std::byte* at = static_cast<std::byte*>(address(table_)) + table_used_;
    if (schedule.backend == ops::AttentionBackend::kCudnn) {
      const std::vector<std::byte> image = attention_->plan(starts, a, at);
      ULY_CHECK(table_used_ + static_cast<int64_t>(image.size()) <= table_.bytes(), "the table of documents has room");
      send(at, image.data(), static_cast<int64_t>(image.size()));
    } else {
      const std::vector<int32_t> in_words(starts.begin(), starts.end());
      send(at, in_words.data(), static_cast<int64_t>(in_words.size() * sizeof(int32_t)));
    }
    planned_ = true;
  }
  return a;
}

void CudaEngine::attention(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  const std::vector<int64_t> starts = documents(qkv.rows);
  zero_from(o, starts.back()), zero_from(lse, starts.back());
  const Range r = range(Work::kAttention, "attention");
  const AttentionArgs a = attention_args(starts, o, lse, qkv, workspace, heads, schedule);
  if (schedule.backend == ops::AttentionBackend::kCudnn) attention_->forward(a);
  else flash_forward(a, starts, static_cast<std::byte*>(address(table_)) + table_used_, stream_, options_.device);
}

void CudaEngine::attention_grad(ops::Buffer dqkv, ops::Buffer d_o, ops::Buffer qkv, ops::Buffer o, ops::Buffer lse, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) {
  const std::vector<int64_t> starts = documents(qkv.rows);
  zero_from(dqkv, starts.back());
  const Range r = range(Work::kAttentionGrad, "attention_grad");
  AttentionArgs a = attention_args(starts, o, lse, qkv, workspace, heads, schedule);
  a.dqkv = matrix(dqkv.row_range(0, starts.back())), a.d_o = matrix(d_o.row_range(0, starts.back()));
  if (schedule.backend == ops::AttentionBackend::kCudnn) attention_->backward(a);
  else flash_backward(a, starts, static_cast<std::byte*>(address(table_)) + table_used_, stream_, options_.device);
}

// --- exchanges: by NCCL, or through pinned host memory

ops::Event CudaEngine::exchange_by(Nccl& nccl, const char* name, const std::function<void()>& start) {
  rethrow();
  begin_beside(nccl.stream());
  {
    const Range r(timers_, Work::kExchange, name, nccl.stream());
    start();
  }
  return end_beside(nccl.stream());
}

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
  if (Nccl* n = nccl(which)) return exchange_by(*n, "all_to_all", [&] { n->all_to_all(address(received), address(send), in_bytes(receive_elements, received.dtype), in_bytes(send_elements, send.dtype)); });
  return exchange(received, send, [&](void* to, void* from) { return group(which).all_to_all(to, from, in_bytes(receive_elements, received.dtype), in_bytes(send_elements, send.dtype)); });
}

ops::Event CudaEngine::all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group which) {
  if (Nccl* n = nccl(which)) return exchange_by(*n, "all_gather", [&] { n->all_gather(address(whole), address(shard), shard.bytes()); });
  return exchange(whole, shard, [&](void* to, void* from) { return group(which).all_gather(to, from, shard.bytes()); });
}

ops::Event CudaEngine::scatter(ops::Buffer received, ops::Buffer whole, ops::Group which) {
  const int64_t ranks = group(which).size();
  const std::vector<int64_t> each(static_cast<size_t>(ranks), whole.bytes() / ranks);
  if (Nccl* n = nccl(which)) return exchange_by(*n, "scatter", [&] { n->all_to_all(address(received), address(whole), each, each); });
  return exchange(received, whole, [&](void* to, void* from) { return group(which).all_to_all(to, from, each, each); });
}

ops::Event CudaEngine::all_reduce(ops::Buffer x, ops::Group which) {
  ULY_CHECK(x.dtype == Dtype::kF64, "sums over ranks are fp64");
  if (Nccl* n = nccl(which)) return exchange_by(*n, "all_reduce", [&] { n->all_reduce_sum(static_cast<double*>(address(x)), x.elements()); });
  return exchange(x, x, [&](void* to, void* from) {
    std::memcpy(to, from, static_cast<size_t>(x.bytes()));
    return group(which).all_reduce_sum(static_cast<double*>(to), x.elements());
  });
}

void CudaEngine::wait(ops::Event event) {
  if (event.id < 0) return;
  rethrow();
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
