#include "engine/cpu/cpu_engine.h"

#include <ATen/ops/from_blob.h>

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
    : Engine(world, sequence),
      ring_(DiskTier::kPieces * DiskTier::kPieceBytes),
      run_disk_(options.disk_folders, ring_.base(), &copy_bytes),
      step_disk_(options.disk_folders, ring_.base(), &copy_bytes),
      to_host_(options.delays),
      to_device_(options.delays),
      disk_(options.delays),
      host_(options.delays) {}

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
  if (b.tier == ops::Tier::kDisk) return disk_.run([&] { disk_of(b).read(place_bytes(b), static_cast<std::byte*>(host), b.bytes()); }).get();
  std::memcpy(host, address(b), static_cast<size_t>(b.bytes()));
}

void CpuEngine::write(const ops::Buffer& b, const void* host) {
  if (b.tier == ops::Tier::kDisk) return disk_.run([&] { disk_of(b).write(place_bytes(b), static_cast<const std::byte*>(host), b.bytes()); }).get();
  std::memcpy(address(b), host, static_cast<size_t>(b.bytes()));
}

ops::Event CpuEngine::started_by(Worker& worker, std::function<void()> task) {
  return started([done = worker.run(std::move(task))] { done.get(); });
}

ops::Event CpuEngine::move(ops::Buffer y, ops::Buffer x) {
  const int64_t bytes = x.bytes();
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) {
    const bool write = y.tier == ops::Tier::kDisk;
    const ops::Buffer& there = write ? y : x;
    DiskTier* disk = &disk_of(there);
    auto* here = static_cast<std::byte*>(address(write ? x : y));
    return started_by(disk_, [=, place = place_bytes(there)] {
      if (write) disk->write(place, here, bytes);
      else disk->read(place, here, bytes);
    });
  }
  return started_by(y.tier == ops::Tier::kHost ? to_host_ : to_device_, [to = address(y), from = address(x), bytes] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}

at::Tensor CpuEngine::tensor(const ops::Buffer& b) const {
  return at::from_blob(address(b), {b.rows, b.columns}, {b.stride, 1}, at::TensorOptions(scalar_type(b.dtype)));
}

}  // namespace uly::engine
