// The disk as a tier of a GPU: moves between it and the GPU, or host memory, through a ring of pinned memory.
//
// The GPU copies between itself and the ring, on a stream of its own on which a move is queued at once and whole; a thread
// moves between ring and disk, several pieces at a time. They wait for each other by flags, and nobody else waits: a move to
// the disk has ended for the GPU when all of it lies in the ring.
//
// Slots       few and large: streams hold about a thousand operations, and where one is full the launching thread waits
// Source      what a thread beside the launching one must not do: flags.h
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "engine/cuda/flags.h"
#include "engine/cuda/memory.h"
#include "engine/cuda/tasks.h"
#include "engine/disk_tier.h"
#include "memory/disk.h"
#include "ops/buffer.h"

namespace uly::engine::cuda {

class DiskMoves {
 public:
  // Tasks that move host memory follow `compute`; the GPU's copies go on `copies`.
  DiskMoves(std::vector<std::string> folders, const memory::Faults& faults, cudaStream_t compute, cudaStream_t copies);
  ~DiskMoves() { flags_.give_up(); }

  // A place: of the arena of its life, a multiple of a block; the last block's rest is overwritten.
  struct At {
    ops::Life life = ops::Life::kStep;
    int64_t place = 0;
  };

  // In place of the arena that there was; nothing is under way. Throws UserError where there is no room.
  void reserve(ops::Life life, int64_t bytes);

  // Queue moves of GPU memory. What is done on `copies` after them is done after them.
  void to_disk(At to, const std::byte* from, int64_t bytes) { queue_device(move(true, nullptr, to, bytes), const_cast<std::byte*>(from)); }
  void from_disk(std::byte* to, At from, int64_t bytes) { queue_device(move(false, nullptr, from, bytes), to); }
  // Queue moves of host memory in the order of `compute`; return the number of the task.
  uint32_t host_to_disk(At to, const std::byte* from, int64_t bytes) { return queue_host(move(true, const_cast<std::byte*>(from), to, bytes)); }
  uint32_t disk_to_host(std::byte* to, At from, int64_t bytes) { return queue_host(move(false, to, from, bytes)); }
  Tasks& tasks() { return tasks_; }

  // Seconds in which something was under way between ring and disk, since the last call.
  double seconds() { return tasks_.seconds() - static_cast<double>(idle_nanoseconds_.exchange(0)) / 1e9; }
  int64_t held_bytes() const;
  std::string words(ops::Life life) const;

 private:
  static constexpr int64_t kSlots = 4, kPieceBytes = DiskTier::kPieceBytes, kInFlight = DiskTier::kPieces;
  static constexpr int64_t kLeastSlot = 4 * kPieceBytes, kMostSlot = 16 * kPieceBytes, kArenaInSlots = 512;  // between the two, a part of the arena

  // A move is cut into chunks of a slot's bytes; chunk n of all that ever moved lies in slot n % kSlots.
  struct Move {
    bool out = true;            // to the disk
    std::byte* host = nullptr;  // what is moved there or from there; null: the GPU sees to it
    memory::Disk* disk = nullptr;
    int64_t place = 0, bytes = 0;
    uint32_t first = 0;         // chunk
  };
  // What of a move lies in a slot.
  struct Slot {
    uint32_t chunk = 0;
    int64_t at = 0;    // its first byte, of the move's
    int64_t left = 0;  // pieces that the disk has not done
  };
  // Copied: the GPU has filled the slot with a chunk, or taken the chunk. Moved: the disk has taken it, or filled the slot.
  static int64_t copied(uint32_t chunk) { return chunk % kSlots; }
  static int64_t moved(uint32_t chunk) { return kSlots + chunk % kSlots; }

  std::optional<memory::Disk>& disk(ops::Life life) { return disks_[static_cast<size_t>(life)]; }
  std::byte* slot(uint32_t chunk) const { return ring_.base() + chunk % kSlots * slot_bytes_; }
  Move move(bool out, std::byte* host, At at, int64_t bytes);
  void queue_device(const Move& m, std::byte* device);
  uint32_t queue_host(const Move& m);
  template <typename F>
  void for_chunks(const Move& m, F&& f) const;

  // On the thread.
  void run(const Move& m);
  void complete(const Move& m);
  void await_copied(uint32_t chunk, uint32_t number);
  void pass(const Move& m);

  std::vector<std::string> folders_;
  memory::Faults faults_;
  cudaStream_t copies_;
  Flags flags_;
  Memory ring_;
  int64_t slot_bytes_ = 0;
  std::array<std::optional<memory::Disk>, 2> disks_;  // by life
  uint32_t next_chunk_ = kSlots;
  std::array<Slot, kSlots> slots_;
  int64_t in_flight_ = 0;
  std::atomic<int64_t> idle_nanoseconds_ = 0;
  Tasks tasks_;  // last: its thread uses what is above
};

}  // namespace uly::engine::cuda
