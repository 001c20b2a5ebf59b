#include "memory/host_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/host_memory.h"
#include "base/units.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace uly::memory {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Explicit huge pages of 2 MiB that nobody has or has reserved.
int64_t free_huge_page_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, rest;
  int64_t free = 0, reserved = 0, kib = 0;
  for (int64_t n = 0; file >> key >> n; std::getline(file, rest)) {
    if (key == "HugePages_Free:") free = n;
    if (key == "HugePages_Rsvd:") reserved = n;
    if (key == "Hugepagesize:") kib = n;
  }
  return kib * 1024 == kHugePage ? (free - reserved) * kHugePage : 0;
}

bool transparent_huge_pages_are_off() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return !std::getline(file, line) || line.find("[never]") != std::string::npos;
}

// How much of the mapping that holds `base` lies in huge pages, of 100; -1 where the kernel does not say.
int huge_percent(const std::byte* base) {
  std::ifstream file("/proc/self/smaps");
  int64_t all = 0;
  bool here = false;
  for (std::string line; std::getline(file, line);) {
    uint64_t first = 0, last = 0;
    int64_t kib = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &first, &last) == 2)
      here = first <= reinterpret_cast<uint64_t>(base) && reinterpret_cast<uint64_t>(base) < last;
    else if (here && std::sscanf(line.c_str(), "Anonymous: %" SCNd64, &kib) == 1)
      all = kib;
    else if (here && std::sscanf(line.c_str(), "AnonHugePages: %" SCNd64, &kib) == 1)
      return all > 0 ? static_cast<int>(kib * 100 / all) : -1;
  }
  return -1;
}

// 0, or why the system has no page for all of [at, at + bytes).
int touch(std::byte* at, int64_t bytes) {
  for (;;) {
    if (madvise(at, static_cast<size_t>(bytes), MADV_POPULATE_WRITE) == 0) return 0;
    if (errno == EINVAL) break;  // before Linux 5.14
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  const int64_t page = sysconf(_SC_PAGESIZE);
  for (int64_t i = 0; i < bytes; i += page) *const_cast<volatile std::byte*>(at + i) = std::byte{0};
  return 0;
}

int touch(std::byte* base, int64_t bytes, int threads) {
  const int64_t piece = round_up((bytes + threads - 1) / threads, kHugePage), pieces = (bytes + piece - 1) / piece;
  std::vector<int> errors(static_cast<size_t>(pieces));
  {
    std::vector<std::jthread> running;
    for (int64_t i = 0; i < pieces; ++i)
      running.emplace_back([&, i] { errors[static_cast<size_t>(i)] = touch(base + i * piece, std::min(piece, bytes - i * piece)); });
  }
  const auto found = std::find_if(errors.begin(), errors.end(), [](int e) { return e != 0; });
  return found == errors.end() ? 0 : *found;
}

void* map(int64_t bytes, int more) { return mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | more, -1, 0); }

}  // namespace

// From a made object, so that the destructor gives the pages back where this throws.
HostArena::HostArena(int64_t bytes, int threads) : HostArena() {
  ULY_CHECK(bytes >= 0 && threads >= 1, "arena of host memory");
  if (bytes == 0) return;
  const int64_t size = round_up(bytes, kHugePage);

  if (free_huge_page_bytes() >= size) {  // another process may still be first: then the ordinary way
    if (void* p = map(size, MAP_HUGETLB | (21 << MAP_HUGE_SHIFT)); p != MAP_FAILED) {
      base_ = static_cast<std::byte*>(p), bytes_ = size, words_ = "huge pages";
      if (touch(base_, size, threads) == 0) return;
      *this = HostArena();
    }
  }

  const HostMemory host = host_memory();
  ULY_USER_CHECK(size <= host.obtainable_bytes, "host memory: {} wanted, {} free {}: lower memory.host, or give the run more memory", format_bytes(size),
                 format_bytes(host.obtainable_bytes), host.in_group ? "in this control group" : "on this host");
  const auto refused = [&](int error) { user_error("host memory: {} wanted, the system refused: {}: lower memory.host", format_bytes(size), std::strerror(error)); };
  void* p = map(size + kHugePage, MAP_NORESERVE);  // more address space than asked for, so that some of it begins on a border
  if (p == MAP_FAILED) refused(errno);
  const int64_t head = round_up(reinterpret_cast<int64_t>(p), kHugePage) - reinterpret_cast<int64_t>(p);
  base_ = static_cast<std::byte*>(p) + head, bytes_ = size;
  if (head > 0) munmap(p, static_cast<size_t>(head));
  if (head < kHugePage) munmap(base_ + size, static_cast<size_t>(kHugePage - head));

  const bool huge = madvise(base_, static_cast<size_t>(size), MADV_HUGEPAGE) == 0 && !transparent_huge_pages_are_off();
  if (const int error = touch(base_, size, threads)) refused(error);
  const int percent = huge ? huge_percent(base_) : 0;
  if (!huge) words_ = "4 KiB pages (transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled)";
  else if (percent >= 0 && percent < 90) words_ = fmt::format("transparent huge pages for {} % of it, 4 KiB pages for the rest (free memory is in small pieces)", percent);
  else words_ = "transparent huge pages";
}

HostArena::~HostArena() {
  if (base_) munmap(base_, static_cast<size_t>(bytes_));
}

HostArena& HostArena::operator=(HostArena&& o) noexcept {
  std::swap(base_, o.base_);
  std::swap(bytes_, o.bytes_);
  std::swap(words_, o.words_);
  return *this;
}

}  // namespace uly::memory
