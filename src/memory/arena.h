// One piece of address space from which planned places are cut. Pages cost memory when they are first touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uly::memory {

class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes);  // throws UserError where the system refuses
  ~Arena();
  Arena(Arena&& o) noexcept : base_(o.base_), bytes_(o.bytes_) { o.base_ = nullptr, o.bytes_ = 0; }
  Arena& operator=(Arena&& o) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  int64_t bytes() const { return bytes_; }

  // Bytes of the pages that have been touched.
  int64_t touched_bytes() const;

 private:
  std::byte* base_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace uly::memory
