#include "engine/cpu/cpu_engine.h"

#include <ATen/ops/from_blob.h>
#include <malloc.h>

#include <chrono>
#include <cstring>

#include "base/check.h"

namespace uly::engine {
namespace {

void copy_bytes(std::byte* to, const std::byte* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64: return at::kDouble;
    case Dtype::kF32: return at::kFloat;
    case Dtype::kBf16: return at::kBFloat16;
    case Dtype::kF16: return at::kHalf;
    case Dtype::kI64: return at::kLong;
    case Dtype::kI32: return at::kInt;
    case Dtype::kI16: return at::kShort;
    case Dtype::kU8: return at::kByte;
  }
  ULY_CHECK(false, "a dtype without a tensor type");
}

}  // namespace

CpuEngine::CpuEngine(comm::Group& world, comm::Group& sequence, const CpuOptions& options)
    : Engine(world, sequence, options.node, options.rehearsal),
      ring_(DiskTier::kPieces * DiskTier::kPieceBytes),
      run_disk_(options.disk_folders, ring_.base(), &copy_bytes, options.disk_faults),
      step_disk_(options.disk_folders, ring_.base(), &copy_bytes, options.disk_faults),
      to_host_(options.delays),
      to_device_(options.delays),
      disk_(options.delays),
      host_(options.delays) {
  // Where glibc raises this by itself, large results that were freed stay, and in pieces: up to 110 MiB more.
  ::mallopt(M_MMAP_THRESHOLD, 1 << 20);
}

CpuEngine::~CpuEngine() = default;

std::byte* CpuEngine::reserve(ops::Life life, ops::Tier tier, int64_t bytes) {
  if (tier == ops::Tier::kDisk) {
    (life == ops::Life::kRun ? run_disk_ : step_disk_).reserve(bytes);
    return nullptr;
  }
  memory::Arena& arena = (life == ops::Life::kRun ? run_arenas_ : step_arenas_)[static_cast<size_t>(tier)];
  arena = memory::Arena();
  arena = memory::Arena(bytes);
  return arena.base();
}

void CpuEngine::load_batch(const ops::Buffer&) {
  write(input(ops::Input::kIds_s), batch().ids.data());
  write(input(ops::Input::kLabels_s), batch().labels.data());
  write(input(ops::Input::kPositions_s), batch().positions.data());
}

void CpuEngine::read(void* host, const ops::Buffer& b) {
  if (b.tier == ops::Tier::kDisk) return disk_.run([&] { with_disk([&] { disk_of(b).read(place_bytes(b), static_cast<std::byte*>(host), b.bytes()); }); }).get();
  std::memcpy(host, address(b), static_cast<size_t>(b.bytes()));
}

void CpuEngine::write(const ops::Buffer& b, const void* host) {
  if (b.tier == ops::Tier::kDisk) return disk_.run([&] { with_disk([&] { disk_of(b).write(place_bytes(b), static_cast<const std::byte*>(host), b.bytes()); }); }).get();
  std::memcpy(address(b), host, static_cast<size_t>(b.bytes()));
}

std::array<int64_t, ops::kNumTiers> CpuEngine::held_bytes() const {
  const auto touched = [&](ops::Tier tier) { return run_arenas_[static_cast<size_t>(tier)].touched_bytes() + step_arenas_[static_cast<size_t>(tier)].touched_bytes(); };
  return {touched(ops::Tier::kDevice), touched(ops::Tier::kHost), run_disk_.held_bytes() + step_disk_.held_bytes()};
}

std::vector<std::string> CpuEngine::tier_words() const {
  std::vector<std::string> words;
  for (const DiskTier* disk : {&run_disk_, &step_disk_})
    if (const std::string w = disk->words(); !w.empty()) words.push_back((disk == &run_disk_ ? "disk, between steps: " : "disk, within one: ") + w);
  return words;
}

void CpuEngine::with_disk(const std::function<void()>& task) {
  if (disk_failure_) std::rethrow_exception(disk_failure_);
  try {
    task();
  } catch (...) {
    disk_failure_ = std::current_exception();
    throw;
  }
}

void CpuEngine::finish() {
  for (Worker* worker : {&to_host_, &to_device_, &host_}) worker->run([] {}).get();
  disk_.run([this] { with_disk([] {}); }).get();
}

std::map<std::string, double> CpuEngine::seconds() {
  constexpr std::array<const char*, 5> kNames = {"to_host", "to_device", "disk", "host_update", "exchange"};
  std::map<std::string, double> sums;
  for (size_t i = 0; i < kNames.size(); ++i)
    if (const int64_t n = nanoseconds_[i].exchange(0); n > 0) sums[kNames[i]] = static_cast<double>(n) / 1e9;
  return sums;
}

void CpuEngine::timed(Aside kind, const std::function<void()>& task) {
  if (!timed_) return task();
  const auto begin = std::chrono::steady_clock::now();
  task();
  nanoseconds_[static_cast<size_t>(kind)] += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
}

ops::Event CpuEngine::started_by(Worker& worker, Aside kind, std::function<void()> task) {
  return started([done = worker.run([this, kind, task = std::move(task)] { timed(kind, task); })] { done.get(); });
}

ops::Event CpuEngine::exchange(comm::Work work) {
  return started([this, shared = std::make_shared<comm::Work>(std::move(work))] { timed(Aside::kExchange, [&] { shared->wait(); }); });
}

ops::Event CpuEngine::move(ops::Buffer y, ops::Buffer x) {
  const int64_t bytes = x.bytes();
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) {
    const bool write = y.tier == ops::Tier::kDisk;
    const ops::Buffer& there = write ? y : x;
    DiskTier* disk = &disk_of(there);
    auto* here = static_cast<std::byte*>(address(write ? x : y));
    return started_by(disk_, Aside::kDisk, [=, this, place = place_bytes(there)] {
      with_disk([&] {
        if (write) disk->write(place, here, bytes);
        else disk->read(place, here, bytes);
      });
    });
  }
  const bool leaves = y.tier == ops::Tier::kHost;
  return started_by(leaves ? to_host_ : to_device_, leaves ? Aside::kToHost : Aside::kToDevice, [to = address(y), from = address(x), bytes] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}

at::Tensor CpuEngine::tensor(const ops::Buffer& b) const {
  return at::from_blob(address(b), {b.rows, b.columns}, {b.stride, 1}, at::TensorOptions(scalar_type(b.dtype)));
}

}  // namespace uly::engine
