#include "launch/signals.h"

#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace uly::launch {

Signals::Signals() {
  std::signal(SIGCHLD, SIG_DFL);  // where it is ignored, ended children could not be waited for
  sigset_t set;
  ::sigemptyset(&set);
  for (int s : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGCHLD}) ::sigaddset(&set, s);
  ::sigprocmask(SIG_BLOCK, &set, &before_);
  fd_ = ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  if (fd_ < 0) throw DeviceError(fmt::format("signalfd: {}", std::strerror(errno)));
}

Signals::~Signals() {
  ::close(fd_);
  ::sigprocmask(SIG_SETMASK, &before_, nullptr);
}

std::vector<int> Signals::take() {
  std::vector<int> came;
  signalfd_siginfo info;
  while (::read(fd_, &info, sizeof info) == sizeof info)
    if (info.ssi_signo != SIGCHLD) came.push_back(static_cast<int>(info.ssi_signo));
  return came;
}

}  // namespace uly::launch
