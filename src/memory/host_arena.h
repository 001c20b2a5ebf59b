// One piece of host memory of exactly the bytes asked for, every page of it touched: a tier beyond the GPU that is there
// from the start or refused at once. (`Arena` is address space; PyTorch's pinned memory comes in powers of two.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace uly::memory {

class HostArena {
 public:
  HostArena() = default;
  // Bytes are rounded up to 2 MiB; `threads` touch the pages, each a contiguous piece, so that first touch spreads them over
  // the threads' NUMA nodes. Throws UserError where the host, or the control group, clearly has less.
  explicit HostArena(int64_t bytes, int threads);
  ~HostArena();
  HostArena(HostArena&& o) noexcept { *this = static_cast<HostArena&&>(o); }
  HostArena& operator=(HostArena&& o) noexcept;
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  std::byte* base() const { return base_; }  // on a border of 2 MiB
  int64_t bytes() const { return bytes_; }
  const std::string& words() const { return words_; }  // the pages it got: "transparent huge pages"

 private:
  std::byte* base_ = nullptr;
  int64_t bytes_ = 0;
  std::string words_;
};

}  // namespace uly::memory
