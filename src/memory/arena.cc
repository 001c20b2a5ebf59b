#include "memory/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/units.h"

namespace uly::memory {

Arena::Arena(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ULY_USER_CHECK(p != MAP_FAILED, "host memory: {} wanted for the step, the system refused: {}", format_bytes(bytes), std::strerror(errno));
  madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // advice: without huge pages it is merely slower
  base_ = static_cast<std::byte*>(p);
}

Arena::~Arena() {
  if (base_) munmap(base_, static_cast<size_t>(bytes_));
}

Arena& Arena::operator=(Arena&& o) noexcept {
  std::swap(base_, o.base_);
  std::swap(bytes_, o.bytes_);
  return *this;
}

int64_t Arena::touched_bytes() const {
  if (!base_) return 0;
  const int64_t page = sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> resident(static_cast<size_t>((bytes_ + page - 1) / page));
  if (mincore(base_, static_cast<size_t>(bytes_), resident.data()) != 0) return -1;
  return page * std::count_if(resident.begin(), resident.end(), [](unsigned char r) { return (r & 1) != 0; });
}

}  // namespace uly::memory
