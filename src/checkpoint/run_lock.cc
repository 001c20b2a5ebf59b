#include "checkpoint/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <random>
#include <thread>

#include "base/check.h"

namespace uly::checkpoint {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

std::string first_line(int fd) {
  char text[512] = {};
  const ssize_t n = ::pread(fd, text, sizeof text - 1, 0);
  const std::string found(text, n > 0 ? static_cast<size_t>(n) : 0);
  return found.substr(0, found.find('\n'));
}

}  // namespace

bool take_lock(int fd) {
  constexpr std::chrono::milliseconds kGrace = 10s, kAgain = 200ms;
  for (std::chrono::milliseconds waited{0}; ::flock(fd, LOCK_EX | LOCK_NB) != 0; waited += kAgain) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return true;
    if (waited >= kGrace) return false;
    std::this_thread::sleep_for(kAgain);
  }
  return true;
}

RunLock::RunLock(const std::string& folder, const std::string& holder) : path_((fs::path(folder) / "run.lock").string()) {
  std::error_code ignored;
  fs::create_directories(folder, ignored);
  fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) return;
  if (!take_lock(fd_)) {
    const std::string other = first_line(fd_);
    ::close(fd_);
    user_error("{}: in use by another run ({}): wait until it has ended, or choose another output_dir", folder, other.empty() ? "it does not say which" : other);
  }
  std::random_device random;
  content_ = fmt::format("{}\n{:08x}{:08x}\n", holder, random(), random());
  const bool written = ::ftruncate(fd_, 0) == 0 && ::pwrite(fd_, content_.data(), content_.size(), 0) == static_cast<ssize_t>(content_.size());
  ::fsync(fd_);
  if (!written) content_.clear();
}

RunLock::~RunLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace uly::checkpoint
