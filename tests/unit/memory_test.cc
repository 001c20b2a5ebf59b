#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/host_memory.h"
#include "memory/disk.h"
#include "memory/gauges.h"
#include "memory/host_arena.h"

namespace uly::memory {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMiB = int64_t{1} << 20;

// A folder of its own that ends with the test.
class Folder {
 public:
  explicit Folder(const std::string& in = fs::temp_directory_path()) : path_(in + "/memory_test_XXXXXX") {
    if (!mkdtemp(path_.data())) throw std::runtime_error("no folder in " + in);
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::string& path() const { return path_; }
  bool empty() const { return fs::is_empty(path_); }
  void write(const std::string& name, const std::string& text) const {
    fs::create_directories(fs::path(path_ + name).parent_path());
    std::ofstream(path_ + name) << text;
  }

 private:
  std::string path_;
};

// What `body` throws of type E; fails where it throws nothing.
template <typename E>
std::string thrown(const std::function<void()>& body) {
  try {
    body();
  } catch (const E& e) {
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// --- free memory

const char* const kMeminfo = "MemTotal: 4000 kB\nMemFree: 1000 kB\nMemAvailable:  2000 kB\nHugePages_Total:       0\n";

TEST(HostMemoryTest, IsTheHostsWithoutAGroup) {
  const Folder root;
  root.write("/proc/meminfo", kMeminfo);
  const HostMemory m = host_memory(root.path());
  EXPECT_EQ(m.free_bytes, 2000 * 1024);
  EXPECT_EQ(m.obtainable_bytes, 2000 * 1024);
  EXPECT_FALSE(m.in_group);
}

TEST(HostMemoryTest, TheTightestGroupAboveTheProcessLimits) {
  const Folder root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "0::/job/step\n");
  root.write("/sys/fs/cgroup/job/memory.max", "1000000\n");
  root.write("/sys/fs/cgroup/job/memory.current", "400000\n");
  root.write("/sys/fs/cgroup/job/memory.stat", "anon 250000\nfile 150000\ninactive_file 100000\nactive_file 50000\n");
  root.write("/sys/fs/cgroup/job/step/memory.max", "max\n");
  const HostMemory m = host_memory(root.path());
  EXPECT_EQ(m.free_bytes, 600000);
  EXPECT_EQ(m.obtainable_bytes, 750000);
  EXPECT_TRUE(m.in_group);
}

TEST(HostMemoryTest, WhereAGroupIsThrottledItIsFull) {
  const Folder root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "0::/job\n");
  root.write("/sys/fs/cgroup/job/memory.max", "1000000\n");
  root.write("/sys/fs/cgroup/job/memory.high", "900000\n");
  root.write("/sys/fs/cgroup/job/memory.current", "400000\n");
  EXPECT_EQ(host_memory(root.path()).free_bytes, 500000);
  root.write("/sys/fs/cgroup/job/memory.high", "max\n");
  EXPECT_EQ(host_memory(root.path()).free_bytes, 600000);
}

TEST(HostMemoryTest, AContainerSeesItsGroupAtTheTop) {
  const Folder root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "0::/../elsewhere\n");
  root.write("/sys/fs/elsewhere/memory.max", "1000\n");  // where that path would lead
  root.write("/sys/fs/cgroup/memory.max", "9000\n");
  root.write("/sys/fs/cgroup/memory.current", "4000\n");
  EXPECT_EQ(host_memory(root.path()).free_bytes, 5000);
  root.write("/sys/fs/cgroup/memory.current", "9500\n");
  EXPECT_EQ(host_memory(root.path()).free_bytes, 0);
  EXPECT_EQ(host_memory(root.path()).obtainable_bytes, 0);
}

TEST(HostMemoryTest, ReadsTheFirstVersionToo) {
  const Folder root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/b\n0::/\n");
  root.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  root.write("/sys/fs/cgroup/memory/docker/b/memory.limit_in_bytes", "500000\n");
  root.write("/sys/fs/cgroup/memory/docker/b/memory.usage_in_bytes", "200000\n");
  root.write("/sys/fs/cgroup/memory/docker/b/memory.stat", "inactive_file 1\ntotal_inactive_file 30000\ntotal_active_file 20000\n");
  const HostMemory m = host_memory(root.path());
  EXPECT_EQ(m.free_bytes, 300000);
  EXPECT_EQ(m.obtainable_bytes, 350000);
  EXPECT_TRUE(m.in_group);
}

TEST(HostMemoryTest, AProcessHasWhatIsNotMappedFromFiles) {
  const Folder root;
  root.write("/proc/self/status", "Name:\tulysses\nVmRSS:\t  600 kB\nRssAnon:\t  300 kB\nRssFile:\t  200 kB\nRssShmem:\t  100 kB\n");
  EXPECT_EQ(own_bytes(root.path()), 400 * 1024);
  EXPECT_GT(own_bytes(), 0);
}

TEST(HostMemoryTest, ThisHostHasSome) { EXPECT_GT(host_memory().free_bytes, 0); }

// --- memory

int64_t resident_pages(const HostArena& arena) {
  std::vector<unsigned char> pages(static_cast<size_t>(arena.bytes() / 4096));
  EXPECT_EQ(mincore(arena.base(), static_cast<size_t>(arena.bytes()), pages.data()), 0);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
}

TEST(HostArenaTest, HoldsWhatWasAskedForToTwoMiBAndTouchedIt) {
  for (const int threads : {1, 3, 16}) {
    const int64_t before = resident_bytes();
    const HostArena arena(33 * kMiB + 1, threads);
    EXPECT_EQ(arena.bytes(), 34 * kMiB);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(arena.base()) % (2 * kMiB), 0u);
    EXPECT_EQ(resident_pages(arena), 34 * kMiB / 4096);
    if (arena.words() != "huge pages") { EXPECT_GE(resident_bytes() - before, 33 * kMiB); }
    EXPECT_TRUE(has(arena.words(), "pages")) << arena.words();
    std::fill_n(arena.base(), arena.bytes(), std::byte{7});
    EXPECT_EQ(arena.base()[arena.bytes() - 1], std::byte{7});
  }
}

TEST(HostArenaTest, GivesBackWhenItEnds) {
  const int64_t before = resident_bytes();
  for (int i = 0; i < 3; ++i) HostArena(64 * kMiB, 2);
  EXPECT_LT(resident_bytes() - before, 32 * kMiB);
}

// In a process and a mount namespace of its own, with a file in place of the kernel's switch.
TEST(HostArenaTest, SaysWhereHugePagesAreOff) {
  const Folder folder;
  folder.write("/enabled", "always madvise [never]\n");
  folder.write("/said", "");
  constexpr int kCannot = 77;
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(CLONE_NEWNS) != 0 || mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) _exit(kCannot);
    if (mount((folder.path() + "/enabled").c_str(), "/sys/kernel/mm/transparent_hugepage/enabled", nullptr, MS_BIND, nullptr) != 0) _exit(kCannot);
    const HostArena arena(4 * kMiB, 2);
    std::ofstream(folder.path() + "/said") << arena.words();
    _exit(arena.base()[4 * kMiB - 1] == std::byte{0} ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kCannot) GTEST_SKIP() << "no file can be put in place of the kernel's switch here";
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  std::string said;
  std::getline(std::ifstream(folder.path() + "/said"), said);
  // Explicit huge pages, where there are free ones, come first.
  EXPECT_TRUE(said == "huge pages" || said == "4 KiB pages (transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled)") << said;
}

TEST(HostArenaTest, MovesWithoutACopy) {
  HostArena a(4 * kMiB, 2);
  std::byte* const base = a.base();
  base[12345] = std::byte{42};
  HostArena b = std::move(a);
  EXPECT_EQ(b.base(), base);
  EXPECT_EQ(b.bytes(), 4 * kMiB);
  HostArena c(2 * kMiB, 1);
  c = std::move(b);
  EXPECT_EQ(c.base(), base);
  EXPECT_EQ(c.base()[12345], std::byte{42});
  EXPECT_TRUE(has(c.words(), "pages"));
  EXPECT_EQ(HostArena(0, 1).base(), nullptr);
}

TEST(HostArenaTest, RefusesBeforeItTouches) {
  const int64_t before = peak_resident_bytes();
  const std::string said = thrown<UserError>([] { HostArena(int64_t{1} << 50, 2); });
  EXPECT_TRUE(has(said, "host memory: 1.0 PiB wanted, ")) << said;
  EXPECT_TRUE(has(said, " free on this host: lower memory.host") || has(said, " free in this control group: lower memory.host")) << said;
  EXPECT_LT(peak_resident_bytes() - before, 64 * kMiB);
}

// --- disks

// Blocks of 4096 bytes that tell where they are and when they were written.
class Blocks {
 public:
  explicit Blocks(int64_t bytes) : arena_(bytes, 1) {}
  std::byte* at(int64_t offset) { return arena_.base() + offset; }

  void fill(int64_t at, int64_t bytes, uint64_t seed) {
    for (int64_t i = 0; i < bytes / 8; ++i) reinterpret_cast<uint64_t*>(this->at(at))[i] = word(seed, i);
  }
  bool holds(int64_t at, int64_t bytes, uint64_t seed) {
    for (int64_t i = 0; i < bytes / 8; ++i)
      if (reinterpret_cast<uint64_t*>(this->at(at))[i] != word(seed, i)) return false;
    return true;
  }

 private:
  static uint64_t word(uint64_t seed, int64_t i) { return (seed + 1) * 0x9E3779B97F4A7C15u ^ static_cast<uint64_t>(i) * 0xD1B54A32D192ED03u; }
  HostArena arena_;
};

void write_and_wait(Disk& disk, int64_t offset, const std::byte* from, int64_t bytes) {
  disk.start_write(offset, from, bytes, 1);
  EXPECT_EQ(disk.complete(), 1u);
}
void read_and_wait(Disk& disk, int64_t offset, std::byte* to, int64_t bytes) {
  disk.start_read(offset, to, bytes, 2);
  EXPECT_EQ(disk.complete(), 2u);
}

struct Way {
  const char* name;
  Faults faults;
};
class DiskWaysTest : public testing::TestWithParam<Way> {
 protected:
  Faults faults(int64_t fail_after_bytes = -1, int error = 0) const {
    Faults f = GetParam().faults;
    f.fail_after_bytes = fail_after_bytes, f.error = error;
    return f;
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, DiskWaysTest,
                         testing::Values(Way{"best", {}}, Way{"threads", {.no_io_uring = true}}, Way{"cached", {.no_direct = true}}, Way{"named", {.no_tmpfile = true, .no_fallocate = true}},
                                         Way{"short_moves", {.longest = 100 * 4096}}, Way{"odd_moves", {.longest = 150 * 4096 + 1}}, Way{"odd_cached_threads", {.longest = 65537, .no_direct = true, .no_io_uring = true}}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(DiskWaysTest, SaysHowItWorks) {
  const Folder a;
  const Faults f = faults();
  const Disk disk({a.path()}, 40 * kMiB, 4, f);
  EXPECT_EQ(disk.bytes(), 40 * kMiB);
  EXPECT_TRUE(has(disk.words(), "40.0 MiB in " + a.path())) << disk.words();
  EXPECT_EQ(has(disk.words(), "without O_DIRECT in " + a.path()), f.no_direct) << disk.words();
  if (f.no_io_uring) { EXPECT_TRUE(has(disk.words(), "4 threads (no io_uring: Function not implemented)")) << disk.words(); }
  EXPECT_EQ(has(disk.words(), "not reserved"), f.no_fallocate) << disk.words();
}

// Against a model of the same bytes: what was last written to each block.
TEST_P(DiskWaysTest, RandomRequestsOverTwoFolders) {
  constexpr int64_t kBlocks = 60 * kMiB / 4096, kLongest = 2 * kMiB / 4096, kAtOnce = 24;
  const Folder a, b;
  Disk disk({a.path(), b.path()}, kBlocks * 4096, 5, faults());
  std::vector<uint64_t> model(kBlocks);  // seed of each block; 0: never written
  Blocks out(kLongest * kAtOnce * 4096), in(kLongest * kAtOnce * 4096);
  std::mt19937_64 random(1);
  for (int round = 0; round < 8; ++round) {
    // Disjoint requests: one in each of kAtOnce stretches.
    std::vector<std::pair<int64_t, int64_t>> requests;  // first block, blocks
    for (int64_t i = 0; i < kAtOnce; ++i) {
      const int64_t first = i * (kBlocks / kAtOnce), room = std::min(kLongest, kBlocks / kAtOnce);
      const int64_t skip = static_cast<int64_t>(random() % static_cast<uint64_t>(room));
      requests.emplace_back(first + skip, 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(room - skip)));
    }
    std::shuffle(requests.begin(), requests.end(), random);
    std::multiset<uint64_t> waiting;
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto [first, blocks] = requests[i];
      for (int64_t k = 0; k < blocks; ++k) out.fill((static_cast<int64_t>(i) * kLongest + k) * 4096, 4096, model[static_cast<size_t>(first + k)] = random() | 1);
      disk.start_write(first * 4096, out.at(static_cast<int64_t>(i) * kLongest * 4096), blocks * 4096, i);
      waiting.insert(i);
    }
    for (; disk.busy(); waiting.erase(disk.complete())) ASSERT_FALSE(waiting.empty());
    EXPECT_TRUE(waiting.empty());

    for (size_t i = 0; i < requests.size(); ++i) disk.start_read(requests[i].first * 4096, in.at(static_cast<int64_t>(i) * kLongest * 4096), requests[i].second * 4096, i);
    for (size_t i = 0; i < requests.size(); ++i) disk.complete();
    EXPECT_FALSE(disk.busy());
    for (size_t i = 0; i < requests.size(); ++i)
      for (int64_t k = 0; k < requests[i].second; ++k)
        ASSERT_TRUE(in.holds((static_cast<int64_t>(i) * kLongest + k) * 4096, 4096, model[static_cast<size_t>(requests[i].first + k)])) << round << " " << i << " " << k;
  }
  // Nothing was written beside what was asked for: never written blocks are zero, others hold what was last written.
  Blocks whole(kBlocks * 4096);
  read_and_wait(disk, 0, whole.at(0), kBlocks * 4096);
  const std::vector<std::byte> zero(4096);
  for (int64_t k = 0; k < kBlocks; ++k) {
    const uint64_t seed = model[static_cast<size_t>(k)];
    ASSERT_TRUE(seed ? whole.holds(k * 4096, 4096, seed) : std::equal(zero.begin(), zero.end(), whole.at(k * 4096))) << k;
  }
}

TEST_P(DiskWaysTest, RequestsLongerThanAChunkAndThanTheDepth) {
  const Folder a, b, c;
  constexpr int64_t kBytes = 3 * Disk::kChunkBytes + 5 * kMiB;
  Disk disk({a.path(), b.path(), c.path()}, kBytes, 2, faults());
  Blocks out(kBytes), in(kBytes);
  out.fill(0, kBytes, 1);
  write_and_wait(disk, 0, out.at(0), kBytes);
  read_and_wait(disk, 0, in.at(0), kBytes);
  EXPECT_TRUE(in.holds(0, kBytes, 1));
  // Across two borders, from the middle, to another address.
  out.fill(0, 20 * kMiB, 2);
  write_and_wait(disk, 14 * kMiB, out.at(0), 20 * kMiB);
  read_and_wait(disk, 14 * kMiB, in.at(8 * kMiB), 20 * kMiB);
  EXPECT_TRUE(in.holds(8 * kMiB, 20 * kMiB, 2));
}

TEST_P(DiskWaysTest, AFailedRequestIsToldOnceAndTheOthersEnd) {
  const Folder a;
  for (const int error : {EIO, ENOSPC}) {
    Disk disk({a.path()}, 64 * kMiB, 8, faults(20 * kMiB, error));
    Blocks out(64 * kMiB);
    for (uint64_t i = 0; i < 8; ++i) disk.start_write(static_cast<int64_t>(i) * 8 * kMiB, out.at(static_cast<int64_t>(i) * 8 * kMiB), 8 * kMiB, i);
    std::set<uint64_t> done;
    std::vector<std::string> said;
    while (disk.busy()) {
      try {
        done.insert(disk.complete());
      } catch (const DeviceError& e) {
        EXPECT_EQ(error, EIO) << e.what();
        said.push_back(e.what());
      } catch (const UserError& e) {
        EXPECT_EQ(error, ENOSPC) << e.what();
        said.push_back(e.what());
      }
    }
    EXPECT_EQ(done.size(), 7u);
    ASSERT_EQ(said.size(), 1u);
    EXPECT_TRUE(has(said[0], a.path()) && has(said[0], error == EIO ? "writing failed: Input/output error" : "disk full")) << said[0];
  }
}

TEST_P(DiskWaysTest, AFailedReadSaysSo) {
  const Folder a;
  Disk disk({a.path()}, 20 * kMiB, 1, faults(0, EIO));
  Blocks in(20 * kMiB);
  disk.start_read(0, in.at(0), 20 * kMiB, 1);
  EXPECT_TRUE(has(thrown<DeviceError>([&] { disk.complete(); }), "reading failed: Input/output error"));
  EXPECT_FALSE(disk.busy());
}

TEST_P(DiskWaysTest, WhatIsToBeTriedAgainIs) {
  const Folder a;
  for (const int error : {EINTR, EAGAIN}) {
    Disk disk({a.path()}, 32 * kMiB, 4, faults(kMiB, error));
    Blocks out(32 * kMiB), in(32 * kMiB);
    out.fill(0, 32 * kMiB, 5);
    write_and_wait(disk, 0, out.at(0), 32 * kMiB);
    read_and_wait(disk, 0, in.at(0), 32 * kMiB);
    EXPECT_TRUE(in.holds(0, 32 * kMiB, 5));
  }
}

TEST_P(DiskWaysTest, EndsOnceWhatIsInFlightHasArrived) {
  const Folder a;
  Blocks out(32 * kMiB), in(32 * kMiB);
  out.fill(0, 32 * kMiB, 6);
  {
    Disk disk({a.path()}, 32 * kMiB, 16, faults());
    write_and_wait(disk, 0, out.at(0), 32 * kMiB);
    for (uint64_t i = 0; i < 16; ++i) disk.start_read(static_cast<int64_t>(i) * 2 * kMiB, in.at(static_cast<int64_t>(i) * 2 * kMiB), 2 * kMiB, i);
  }
  EXPECT_TRUE(in.holds(0, 32 * kMiB, 6));
  EXPECT_TRUE(a.empty());
}

TEST_P(DiskWaysTest, LeavesNothingBehindEvenWhenKilled) {
  const Folder a;
  {
    const Disk disk({a.path()}, 20 * kMiB, 2, faults());
    EXPECT_TRUE(a.empty());
  }
  EXPECT_TRUE(a.empty());
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    Disk disk({a.path()}, 20 * kMiB, 2, faults());
    Blocks out(20 * kMiB);
    disk.start_write(0, out.at(0), 20 * kMiB, 1);
    if (write(ready[1], "x", 1) != 1) _exit(1);
    for (;;) pause();
  }
  close(ready[1]);
  char byte = 0;
  EXPECT_EQ(read(ready[0], &byte, 1), 1);
  close(ready[0]);
  kill(child, SIGKILL);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(a.empty());
}

int64_t free_bytes(const std::string& folder) {
  struct statvfs s;
  EXPECT_EQ(statvfs(folder.c_str(), &s), 0);
  return static_cast<int64_t>(s.f_bavail) * static_cast<int64_t>(s.f_frsize);
}

// The process's open files in a folder, which have no name there.
std::vector<int> files_in(const Folder& folder) {
  std::vector<int> found;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    if (fs::read_symlink(entry.path(), gone).string().starts_with(folder.path())) found.push_back(std::stoi(entry.path().filename().string()));
  }
  return found;
}

TEST(DiskTest, TakesItsRoomAtOnceInStripes) {
  const Folder a, b, c;
  const Disk disk({a.path(), b.path(), c.path()}, 3 * Disk::kChunkBytes + 4097, 2);  // chunks 0 and 3, 1, 2
  EXPECT_EQ(disk.bytes(), 3 * Disk::kChunkBytes + 8192);
  for (const auto& [folder, bytes] : {std::pair{&a, Disk::kChunkBytes + 8192}, std::pair{&b, Disk::kChunkBytes}, std::pair{&c, Disk::kChunkBytes}}) {
    const std::vector<int> files = files_in(*folder);
    ASSERT_EQ(files.size(), 1u);
    struct stat s;
    ASSERT_EQ(fstat(files[0], &s), 0);
    EXPECT_EQ(s.st_size, bytes);
    EXPECT_GE(s.st_blocks * 512, bytes);
  }
}

TEST(DiskTest, ChunksAlternateBetweenFolders) {
  const Folder a, b;
  Disk disk({a.path(), b.path()}, 4 * Disk::kChunkBytes, 2, {.no_direct = true});
  Blocks out(4 * Disk::kChunkBytes), in(2 * Disk::kChunkBytes);
  for (int64_t i = 0; i < 4; ++i) out.fill(i * Disk::kChunkBytes, Disk::kChunkBytes, static_cast<uint64_t>(i));
  write_and_wait(disk, 0, out.at(0), 4 * Disk::kChunkBytes);
  for (const auto& [folder, first] : {std::pair{&a, 0u}, std::pair{&b, 1u}}) {
    const std::vector<int> files = files_in(*folder);
    ASSERT_EQ(files.size(), 1u);
    ASSERT_EQ(pread(files[0], in.at(0), static_cast<size_t>(2 * Disk::kChunkBytes), 0), 2 * Disk::kChunkBytes);
    EXPECT_TRUE(in.holds(0, Disk::kChunkBytes, first));
    EXPECT_TRUE(in.holds(Disk::kChunkBytes, Disk::kChunkBytes, first + 2));
  }
}

TEST(DiskTest, FaultsHaveNames) {
  const Faults f = faults_from("after=12,error=28,no_direct,no_io_uring");
  EXPECT_EQ(f.fail_after_bytes, 12);
  EXPECT_EQ(f.error, 28);
  EXPECT_TRUE(f.no_direct && f.no_io_uring && !f.no_tmpfile && !f.no_fallocate);
  EXPECT_EQ(faults_from("").fail_after_bytes, -1);
  EXPECT_TRUE(faults_from("no_tmpfile,no_fallocate").no_fallocate);
  EXPECT_THROW(faults_from("no_luck"), UserError);
}

TEST(DiskTest, WorksInMemory) {
  const Folder shm("/dev/shm");
  Disk disk({shm.path()}, 20 * kMiB, 3);
  Blocks out(20 * kMiB), in(20 * kMiB);
  out.fill(0, 20 * kMiB, 3);
  write_and_wait(disk, 0, out.at(0), 20 * kMiB);
  read_and_wait(disk, 0, in.at(0), 20 * kMiB);
  EXPECT_TRUE(in.holds(0, 20 * kMiB, 3));
  EXPECT_TRUE(shm.empty());
}

TEST(DiskTest, RefusesFoldersThatCannotBeUsed) {
  const Folder a;
  const std::string missing = a.path() + "/missing";
  EXPECT_TRUE(has(thrown<UserError>([&] { Disk({a.path(), missing}, kMiB, 1); }), "memory.disk: there is no folder " + missing));
  EXPECT_TRUE(has(thrown<UserError>([] { Disk({"/proc"}, kMiB, 1); }), "memory.disk: cannot write in /proc: "));
  a.write("/file", "");
  EXPECT_TRUE(has(thrown<UserError>([&] { Disk({a.path() + "/file"}, kMiB, 1); }), "Not a directory"));
  EXPECT_THROW(Disk({}, kMiB, 1), UserError);
}

TEST(DiskTest, RefusesWhatTheDiskHasNoRoomFor) {
  const Folder a;
  const int64_t before = free_bytes(a.path());
  const std::string said = thrown<UserError>([&] { Disk({a.path()}, before + 1024 * kMiB, 1); });
  EXPECT_TRUE(has(said, "memory.disk: " + a.path() + " has ") && has(said, " free, ") && has(said, " wanted: make room there, or name other folders")) << said;
  EXPECT_TRUE(a.empty());
  // Where it would fit in halves, but both lie on one disk.
  EXPECT_THROW(Disk({a.path(), a.path()}, before + 1024 * kMiB, 1), UserError);
  EXPECT_GT(free_bytes(a.path()), before / 2) << "what was taken was given back";
}

TEST(DiskTest, TakesWholeBlocksWithinItsBytesOnly) {
  const Folder a;
  Disk disk({a.path()}, 8192, 1);
  Blocks block(2 * kMiB);
  EXPECT_THROW(disk.start_write(1, block.at(0), 4096, 1), InternalError);
  EXPECT_THROW(disk.start_write(0, block.at(512), 4096, 1), InternalError);
  EXPECT_THROW(disk.start_write(0, block.at(0), 4097, 1), InternalError);
  EXPECT_THROW(disk.start_read(4096, block.at(0), 8192, 1), InternalError);
  EXPECT_THROW(disk.start_read(0, block.at(0), 0, 1), InternalError);
  EXPECT_THROW(disk.start_read(-4096, block.at(0), 4096, 1), InternalError);
  EXPECT_FALSE(disk.busy());
  EXPECT_THROW(disk.complete(), InternalError);
  disk.start_write(4096, block.at(0), 4096, 9);
  EXPECT_EQ(disk.complete(), 9u);
}

}  // namespace
}  // namespace uly::memory
