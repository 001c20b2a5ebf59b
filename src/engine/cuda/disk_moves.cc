#include "engine/cuda/disk_moves.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::engine::cuda {
namespace {

int64_t blocks(int64_t bytes) { return round_up(bytes, memory::Disk::kBlockBytes); }

}  // namespace

DiskMoves::DiskMoves(std::vector<std::string> folders, const memory::Faults& faults, cudaStream_t compute, cudaStream_t copies) : folders_(std::move(folders)), faults_(faults), copies_(copies), flags_(2 * kSlots), tasks_(compute) {
  // As if a chunk had lain in each slot: the first that does is the one after it.
  for (uint32_t chunk = 0; chunk < kSlots; ++chunk) flags_.raise(copied(chunk), chunk), flags_.raise(moved(chunk), chunk);
}

void DiskMoves::reserve(ops::Life life, int64_t bytes) {
  ULY_CHECK(!folders_.empty(), "a plan that uses the disk knows where");
  if (const int64_t slot = std::clamp(round_up(bytes / kArenaInSlots, kPieceBytes), kLeastSlot, kMostSlot); slot > slot_bytes_) {
    ring_ = Memory();
    ring_ = Memory(Place::kHost, kSlots * slot);
    slot_bytes_ = slot;
  }
  disk(life).reset();
  disk(life).emplace(folders_, blocks(bytes), static_cast<int>(kInFlight), faults_);
}

int64_t DiskMoves::held_bytes() const {
  int64_t bytes = 0;
  for (const std::optional<memory::Disk>& d : disks_) bytes += d ? d->held_bytes() : 0;
  return bytes;
}

std::string DiskMoves::words(ops::Life life) const {
  const std::optional<memory::Disk>& d = disks_[static_cast<size_t>(life)];
  return d ? d->words() : "";
}

DiskMoves::Move DiskMoves::move(bool out, std::byte* host, At at, int64_t bytes) {
  const Move m{.out = out, .host = host, .disk = &*disk(at.life), .place = at.place, .bytes = bytes, .first = next_chunk_};
  next_chunk_ += static_cast<uint32_t>(ceil_div(bytes, slot_bytes_));
  return m;
}

// Calls f(chunk, at, bytes).
template <typename F>
void DiskMoves::for_chunks(const Move& m, F&& f) const {
  uint32_t chunk = m.first;
  for (int64_t at = 0; at < m.bytes; at += slot_bytes_) f(chunk++, at, std::min(slot_bytes_, m.bytes - at));
}

// The thread's part comes first: what is queued on the stream may have to wait for it. What comes from the disk it reads ahead,
// as far as there are slots.
void DiskMoves::queue_device(const Move& m, std::byte* device) {
  tasks_.queue_at_once(m.out ? "to disk" : "from disk", [this, m] { run(m); }, [this, m] { pass(m); });
  try {
    for_chunks(m, [&](uint32_t chunk, int64_t at, int64_t bytes) {
      flags_.await(moved(chunk), m.out ? chunk - kSlots : chunk, copies_);
      check(m.out ? cudaMemcpyAsync(slot(chunk), device + at, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, copies_)
                  : cudaMemcpyAsync(device + at, slot(chunk), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, copies_),
            "copy between GPU and disk");
      flags_.raise(copied(chunk), chunk, copies_);
    });
  } catch (...) {
    flags_.give_up();  // nobody sees to the rest
    throw;
  }
}

// Begins when the stream has come here: then host memory is as it is to be.
uint32_t DiskMoves::queue_host(const Move& m) {
  return tasks_.queue(m.out ? "host to disk" : "disk to host", [this, m] { run(m); }, [this, m] { pass(m); });
}

// --- the thread's part

void DiskMoves::run(const Move& m) {
  for_chunks(m, [&](uint32_t chunk, int64_t at, int64_t bytes) {
    Slot& s = slots_[chunk % kSlots];
    while (s.left > 0) complete(m);  // the chunk before in this slot, where it is of this move
    await_copied(chunk, m.out && !m.host ? chunk : chunk - kSlots);
    const int64_t pieces = ceil_div(bytes, kPieceBytes);
    s = {.chunk = chunk, .at = at, .left = pieces};
    for (int64_t i = 0; i < pieces; ++i) {
      while (in_flight_ >= kInFlight) complete(m);
      const int64_t from = i * kPieceBytes, n = std::min(kPieceBytes, bytes - from);
      std::byte* here = slot(chunk) + from;
      const uint64_t piece = static_cast<uint64_t>((here - ring_.base()) / kPieceBytes);
      if (m.out && m.host) std::memcpy(here, m.host + at + from, static_cast<size_t>(n));
      if (m.out) m.disk->start_write(m.place + at + from, here, blocks(n), piece);
      else m.disk->start_read(m.place + at + from, here, blocks(n), piece);
      ++in_flight_;
    }
  });
  while (in_flight_ > 0) complete(m);
}

// Waits for a piece; they end in any order.
void DiskMoves::complete(const Move& m) {
  const int64_t piece = static_cast<int64_t>(m.disk->complete()), in_slot = slot_bytes_ / kPieceBytes;
  --in_flight_;
  Slot& s = slots_[static_cast<size_t>(piece / in_slot)];
  if (const int64_t at = s.at + piece % in_slot * kPieceBytes; !m.out && m.host) std::memcpy(m.host + at, ring_.base() + piece * kPieceBytes, static_cast<size_t>(std::min(kPieceBytes, m.bytes - at)));
  if (--s.left > 0) return;
  if (m.host) flags_.raise(copied(s.chunk), s.chunk);
  flags_.raise(moved(s.chunk), s.chunk);
}

void DiskMoves::await_copied(uint32_t chunk, uint32_t number) {
  if (flags_.reached(copied(chunk), number)) return;
  const auto start = std::chrono::steady_clock::now();
  flags_.await(copied(chunk), number);
  if (in_flight_ == 0) idle_nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

// Of a move that is not made.
void DiskMoves::pass(const Move& m) {
  for_chunks(m, [&](uint32_t chunk, int64_t, int64_t) {
    if (m.host) flags_.raise(copied(chunk), chunk);
    flags_.raise(moved(chunk), chunk);
  });
}

}  // namespace uly::engine::cuda
