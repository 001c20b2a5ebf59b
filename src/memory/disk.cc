#include "memory/disk.h"

#include <fcntl.h>
#include <liburing.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/units.h"

namespace uly::memory {

// Moves bytes between memory and files, several moves at a time. A move ends with the bytes moved, maybe fewer than asked
// for, or with -errno.
class DiskQueue {
 public:
  struct Move {
    int fd;
    bool write;
    int64_t offset;
    std::byte* at;
    int64_t bytes;
  };
  struct Done {
    size_t slot;
    int64_t result;
  };

  virtual ~DiskQueue() = default;
  virtual void submit(size_t slot, const Move& move) = 0;
  virtual Done wait() = 0;
};

namespace {

class Ring final : public DiskQueue {
 public:
  // Throws nothing: `error` says why there is none.
  Ring(size_t depth, int& error) : vectors_(depth) {
    error = -io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0);
    made_ = error == 0;
  }
  ~Ring() override {
    if (made_) io_uring_queue_exit(&ring_);
  }

  void submit(size_t slot, const Move& m) override {
    if (broken_ != 0) return refused_.push_back({slot, broken_});
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    ULY_CHECK(entry, "the ring holds as many entries as there are slots");
    // The vectored calls, as kernels before 5.6 have no others.
    vectors_[slot] = {m.at, static_cast<size_t>(m.bytes)};
    if (m.write) io_uring_prep_writev(entry, m.fd, &vectors_[slot], 1, static_cast<uint64_t>(m.offset));
    else io_uring_prep_readv(entry, m.fd, &vectors_[slot], 1, static_cast<uint64_t>(m.offset));
    io_uring_sqe_set_data64(entry, slot);
    for (;;) {
      const int n = io_uring_submit(&ring_);
      if (n > 0) return;
      if (n != 0 && n != -EINTR && n != -EAGAIN && n != -EBUSY) {
        broken_ = n;
        return refused_.push_back({slot, n});
      }
      std::this_thread::yield();
    }
  }

  Done wait() override {
    if (!refused_.empty()) {
      const Done done = refused_.front();
      refused_.pop_front();
      return done;
    }
    for (;;) {
      io_uring_cqe* entry = nullptr;
      const int error = -io_uring_wait_cqe(&ring_, &entry);
      if (error == EINTR || error == EAGAIN) continue;
      if (error != 0) throw DeviceError(fmt::format("memory.disk: waiting for io_uring failed: {}", std::strerror(error)));
      const Done done{static_cast<size_t>(io_uring_cqe_get_data64(entry)), entry->res};
      io_uring_cqe_seen(&ring_, entry);
      return done;
    }
  }

 private:
  io_uring ring_{};
  bool made_ = false;
  std::vector<iovec> vectors_;  // of each slot; the kernel may read them until the move ends
  int broken_ = 0;              // why the kernel takes no more moves; what it has taken still comes back
  std::deque<Done> refused_;
};

// What stands in for io_uring where containers forbid it.
class Pool final : public DiskQueue {
 public:
  explicit Pool(size_t threads) {
    for (size_t i = 0; i < threads; ++i) threads_.emplace_back([this](const std::stop_token& stop) { work(stop); });
  }

  void submit(size_t slot, const Move& move) override {
    const std::lock_guard lock(mutex_);
    todo_.emplace_back(slot, move);
    submitted_.notify_one();
  }

  Done wait() override {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [&] { return !done_.empty(); });
    const Done done = done_.front();
    done_.pop_front();
    return done;
  }

 private:
  void work(const std::stop_token& stop) {
    for (std::unique_lock lock(mutex_); submitted_.wait(lock, stop, [&] { return !todo_.empty(); });) {
      const auto [slot, m] = todo_.front();
      todo_.pop_front();
      lock.unlock();
      const ssize_t n = m.write ? ::pwrite(m.fd, m.at, static_cast<size_t>(m.bytes), m.offset) : ::pread(m.fd, m.at, static_cast<size_t>(m.bytes), m.offset);
      const Done done{slot, n < 0 ? -errno : n};
      lock.lock();
      done_.push_back(done);
      ended_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable_any submitted_;
  std::condition_variable ended_;
  std::deque<std::pair<size_t, Move>> todo_;
  std::deque<Done> done_;
  std::vector<std::jthread> threads_;  // last: they end before what they use
};

// -1 and errno where the folder takes no file.
int open_without_name(const std::string& folder, bool no_tmpfile) {
  int fd = no_tmpfile ? -1 : ::open(folder.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  if (!no_tmpfile && errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) return -1;
  std::string path = folder + "/.ulysses-XXXXXX";  // a file system that has no O_TMPFILE (NFS)
  fd = ::mkostemp(path.data(), O_CLOEXEC);
  if (fd >= 0) ::unlink(path.c_str());
  return fd;
}

int64_t free_bytes_at(int fd) {
  struct statvfs s;
  return ::fstatvfs(fd, &s) == 0 ? static_cast<int64_t>(s.f_bavail) * static_cast<int64_t>(s.f_frsize) : -1;
}

[[noreturn]] void no_room(const std::string& folder, int64_t free, int64_t wanted) {
  user_error("memory.disk: {} has {} free, {} wanted: make room there, or name other folders", folder, format_bytes(free), format_bytes(wanted));
}

// Takes the room now, so that a full disk is found before the run. False where the file system cannot promise it.
bool reserve(int fd, const std::string& folder, int64_t bytes, bool no_fallocate) {
  // Not tried where it cannot succeed: it would fill the disk for a moment, and others write there too.
  if (const int64_t free = free_bytes_at(fd); free >= 0 && free < bytes) no_room(folder, free, bytes);
  int error = no_fallocate ? EOPNOTSUPP : 0;
  if (!no_fallocate)
    do error = ::fallocate(fd, 0, 0, bytes) == 0 ? 0 : errno;
    while (error == EINTR);
  const bool reserved = error == 0;
  if (error == EOPNOTSUPP || error == ENOSYS) error = ::ftruncate(fd, bytes) == 0 ? 0 : errno;
  if (error == ENOSPC && ::ftruncate(fd, 0) == 0) {  // what it got of it counts as free again
    if (const int64_t free = free_bytes_at(fd); free < bytes) no_room(folder, free, bytes);
  }
  ULY_USER_CHECK(error == 0, "memory.disk: {} takes no file of {}: {}: name other folders", folder, format_bytes(bytes), std::strerror(error));
  return reserved;
}

}  // namespace

Faults faults_from(const std::string& words) {
  Faults f;
  std::istringstream in(words);
  for (std::string word; std::getline(in, word, ',');) {
    const auto number = [&](const char* name) { return word.rfind(name, 0) == 0 ? std::atoll(word.c_str() + std::strlen(name)) : -1; };
    if (const long long n = number("after="); n >= 0) f.fail_after_bytes = n;
    else if (const long long e = number("error="); e > 0) f.error = static_cast<int>(e);
    else if (word == "no_tmpfile") f.no_tmpfile = true;
    else if (word == "no_direct") f.no_direct = true;
    else if (word == "no_fallocate") f.no_fallocate = true;
    else if (word == "no_io_uring") f.no_io_uring = true;
    else user_error("faults of a disk: expected after=BYTES, error=NUMBER, no_tmpfile, no_direct, no_fallocate or no_io_uring, found '{}'", word);
  }
  return f;
}

Disk::File::~File() {
  if (fd >= 0) ::close(fd);
}

Disk::Disk(const std::vector<std::string>& folders, int64_t bytes, int depth, const Faults& faults) : faults_(faults) {
  ULY_CHECK(bytes >= 0 && depth >= 1, "scratch files");
  ULY_USER_CHECK(!folders.empty(), "memory.disk: no folder is named");
  bytes_ = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  const int64_t chunks = (bytes_ + kChunkBytes - 1) / kChunkBytes, n = static_cast<int64_t>(folders.size());
  std::string names, remarks;
  for (int64_t k = 0; k < n; ++k) {
    int64_t share = (chunks - k + n - 1) / n * kChunkBytes;
    if (chunks > 0 && (chunks - 1) % n == k) share -= chunks * kChunkBytes - bytes_;  // the last chunk may be short
    const std::string& folder = folders[static_cast<size_t>(k)];
    make_file(folder, std::max<int64_t>(0, share), remarks);
    names += (k ? ", " : "") + folder;
  }
  pieces_.resize(static_cast<size_t>(depth));
  for (size_t slot = pieces_.size(); slot-- > 0;) free_.push_back(slot);

  int error = ENOSYS;
  if (!faults.no_io_uring) queue_ = std::make_unique<Ring>(pieces_.size(), error);
  if (error) {
    const size_t threads = std::min<size_t>(pieces_.size(), 16);
    queue_ = std::make_unique<Pool>(threads);
    remarks += fmt::format(", {} thread{} (no io_uring: {})", threads, threads == 1 ? "" : "s", std::strerror(error));
  } else {
    remarks += ", io_uring";
  }
  const bool all_direct = std::all_of(files_.begin(), files_.end(), [](const File& f) { return f.direct; });
  words_ = fmt::format("{} in {}{}{}", format_bytes(bytes_), names, all_direct ? ", O_DIRECT" : "", remarks);
}

Disk::~Disk() {
  faults_ = {};
  try {
    while (free_.size() < pieces_.size()) reap();
  } catch (const std::exception&) {  // nothing comes back any more
  }
}

void Disk::make_file(const std::string& folder, int64_t bytes, std::string& remarks) {
  struct stat s;
  ULY_USER_CHECK(::stat(folder.c_str(), &s) == 0 || errno != ENOENT, "memory.disk: there is no folder {}: create it, or name another", folder);
  File& file = files_.emplace_back();
  file.folder = folder;
  file.fd = open_without_name(folder, faults_.no_tmpfile);
  ULY_USER_CHECK(file.fd >= 0, "memory.disk: cannot write in {}: {}: name another folder", folder, std::strerror(errno));
  // Asked for afterwards: a file system that refuses it to open() may have left a file behind.
  const int flags = ::fcntl(file.fd, F_GETFL);
  file.direct = !faults_.no_direct && ::fcntl(file.fd, F_SETFL, flags | O_DIRECT) == 0;
  if (!file.direct) remarks += fmt::format(", without O_DIRECT in {} (its file system refuses it)", folder);
  if (bytes > 0 && !reserve(file.fd, folder, bytes, faults_.no_fallocate)) remarks += fmt::format(", room in {} not reserved (its file system cannot)", folder);
}

int64_t Disk::held_bytes() const {
  constexpr int64_t kUnit = 512;  // of st_blocks, whatever the file system's blocks are
  int64_t bytes = 0;
  struct stat s;
  for (const File& file : files_)
    if (::fstat(file.fd, &s) == 0) bytes += static_cast<int64_t>(s.st_blocks) * kUnit;
  return bytes;
}

void Disk::start_write(int64_t offset, const std::byte* from, int64_t bytes, uint64_t tag) { start(true, offset, const_cast<std::byte*>(from), bytes, tag); }
void Disk::start_read(int64_t offset, std::byte* to, int64_t bytes, uint64_t tag) { start(false, offset, to, bytes, tag); }

void Disk::start(bool write, int64_t offset, std::byte* at, int64_t bytes, uint64_t tag) {
  ULY_CHECK(offset % kBlockBytes == 0 && bytes % kBlockBytes == 0 && reinterpret_cast<uintptr_t>(at) % kBlockBytes == 0, "whole blocks of 4096 bytes");
  ULY_CHECK(offset >= 0 && bytes > 0 && bytes <= bytes_ - offset, "within what was asked for");
  const int64_t first = offset / kChunkBytes, last = (offset + bytes - 1) / kChunkBytes, n = static_cast<int64_t>(files_.size());
  const auto request = std::make_shared<Request>(Request{.tag = tag, .write = write, .left = last - first + 1});
  for (int64_t chunk = first; chunk <= last; ++chunk) {
    const int64_t from = std::max(offset, chunk * kChunkBytes), to = std::min(offset + bytes, (chunk + 1) * kChunkBytes);
    while (free_.empty()) reap();
    const size_t slot = free_.back();
    free_.pop_back();
    pieces_[slot] = {.request = request,
                     .file = &files_[static_cast<size_t>(chunk % n)],
                     .offset = chunk / n * kChunkBytes + from % kChunkBytes,
                     .at = at + (from - offset),
                     .bytes = to - from};
    submit(slot);
  }
}

void Disk::submit(size_t slot) {
  const Piece& p = pieces_[slot];
  int64_t bytes = p.bytes;
  if (faults_.longest > 0) bytes = std::min(bytes, (faults_.longest + kBlockBytes - 1) / kBlockBytes * kBlockBytes);
  queue_->submit(slot, {.fd = p.file->fd, .write = p.request->write, .offset = p.offset, .at = p.at, .bytes = bytes});
}

void Disk::reap() {
  auto [slot, result] = queue_->wait();
  Piece& p = pieces_[slot];
  if (faults_.longest > 0) result = std::min(result, faults_.longest);
  moved_bytes_ += std::max<int64_t>(0, result);
  if (faults_.fail_after_bytes >= 0 && moved_bytes_ > faults_.fail_after_bytes) {
    faults_.fail_after_bytes = -1;
    result = -faults_.error;
  }

  if (result == -EINTR || result == -EAGAIN) return submit(slot);
  if (result > 0 && result < p.bytes) {
    if (p.file->direct) result -= result % kBlockBytes;  // a block that came in part comes again
    p.offset += result, p.at += result, p.bytes -= result;
    if (result > 0) return submit(slot);
  }
  if (result == 0) result = -EIO;  // the file holds its share: one that ends early or takes nothing is broken

  Request& r = *p.request;
  if (result < 0 && r.error == 0) r.error = static_cast<int>(-result), r.file = p.file;
  if (--r.left == 0) finished_.push_back(p.request);
  p.request.reset();
  free_.push_back(slot);
}

uint64_t Disk::complete() {
  ULY_CHECK(busy(), "nothing was started");
  while (finished_.empty()) reap();
  const std::shared_ptr<Request> r = finished_.front();
  finished_.pop_front();
  if (r->error == 0) return r->tag;
  if (r->error == ENOSPC || r->error == EDQUOT) user_error("memory.disk: {}: disk full: {}: make room there, or name other folders", r->file->folder, std::strerror(r->error));
  throw DeviceError(fmt::format("memory.disk: {}: {} failed: {}", r->file->folder, r->write ? "writing" : "reading", std::strerror(r->error)));
}

}  // namespace uly::memory
