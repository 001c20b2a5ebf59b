#include "engine/disk_tier.h"

#include <algorithm>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::engine {
namespace {

int64_t blocks(int64_t bytes) { return round_up(bytes, memory::Disk::kBlockBytes); }

}  // namespace

void DiskTier::reserve(int64_t bytes) {
  ULY_CHECK(!folders_.empty(), "a plan that uses the disk knows where");
  disk_.reset();
  disk_.emplace(folders_, blocks(bytes), static_cast<int>(kPieces), faults_);
}

void DiskTier::write(int64_t place, const std::byte* from, int64_t bytes) {
  const int64_t pieces = ceil_div(bytes, kPieceBytes);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t at = i * kPieceBytes, n = std::min(kPieceBytes, bytes - at);
    // Requests end in any order: a slot is free when its own tag has come.
    const int64_t slot = i < kPieces ? i : static_cast<int64_t>(disk_->complete());
    copy_(piece(slot), from + at, n);
    disk_->start_write(place + at, piece(slot), blocks(n), static_cast<uint64_t>(slot));
  }
  while (disk_->busy()) disk_->complete();
}

void DiskTier::read(int64_t place, std::byte* to, int64_t bytes) {
  const int64_t pieces = ceil_div(bytes, kPieceBytes);
  std::vector<int64_t> piece_in(static_cast<size_t>(kPieces));
  int64_t started = 0;
  const auto start = [&](int64_t slot) {
    const int64_t at = started * kPieceBytes;
    piece_in[static_cast<size_t>(slot)] = started++;
    disk_->start_read(place + at, piece(slot), blocks(std::min(kPieceBytes, bytes - at)), static_cast<uint64_t>(slot));
  };
  while (started < std::min(kPieces, pieces)) start(started);
  for (int64_t done = 0; done < pieces; ++done) {
    const int64_t slot = static_cast<int64_t>(disk_->complete()), at = piece_in[static_cast<size_t>(slot)] * kPieceBytes;
    copy_(to + at, piece(slot), std::min(kPieceBytes, bytes - at));
    if (started < pieces) start(slot);
  }
}

}  // namespace uly::engine
