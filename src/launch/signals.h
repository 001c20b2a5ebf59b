// Signals as something that can be waited for beside pipes.
#pragma once

#include <chrono>
#include <csignal>
#include <vector>

namespace uly::launch {

// A signal that comes so soon after the first is not a second wish: `timeout` and others send theirs twice.
inline constexpr std::chrono::seconds kRepeat{1};

// Blocks SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGCHLD, which are read from a descriptor instead; gives them back at the end.
class Signals {
 public:
  Signals();
  ~Signals();
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  int fd() const { return fd_; }
  // Those that came and are to be passed on: all but SIGCHLD.
  std::vector<int> take();

 private:
  sigset_t before_;
  int fd_ = -1;
};

}  // namespace uly::launch
