// The disk as a tier: an arena in scratch files, reached through a ring of pieces of host memory. One thread uses it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "memory/disk.h"

namespace uly::engine {

class DiskTier {
 public:
  static constexpr int64_t kPieceBytes = int64_t{8} << 20;
  static constexpr int64_t kPieces = 8;

  // `ring`: kPieces * kPieceBytes bytes, aligned to memory::Disk::kBlockBytes. `copy(to, from, bytes)` copies between the ring and
  // a tier, and returns when that is done.
  using Copy = std::function<void(std::byte* to, const std::byte* from, int64_t bytes)>;
  DiskTier(std::vector<std::string> folders, std::byte* ring, Copy copy, const memory::Faults& faults = {}) : folders_(std::move(folders)), faults_(faults), ring_(ring), copy_(std::move(copy)) {}

  // In place of the arena that there was. Throws UserError where there is no room.
  void reserve(int64_t bytes);

  // Places in the arena are multiples of the block; the last block's rest is overwritten. Throw as memory::Disk does: then others may be
  // under way, and nothing more is to be asked of it.
  void write(int64_t place, const std::byte* from, int64_t bytes);
  void read(int64_t place, std::byte* to, int64_t bytes);

  std::string words() const { return disk_ ? disk_->words() : ""; }
  int64_t held_bytes() const { return disk_ ? disk_->held_bytes() : 0; }

 private:
  std::byte* piece(int64_t i) const { return ring_ + i * kPieceBytes; }

  std::vector<std::string> folders_;
  memory::Faults faults_;
  std::byte* ring_;
  Copy copy_;
  std::optional<memory::Disk> disk_;
};

}  // namespace uly::engine
