#include "launch/child.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "base/check.h"

namespace uly::launch {
namespace {

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> p;
  for (const std::string& t : texts) p.push_back(const_cast<char*>(t.c_str()));
  p.push_back(nullptr);
  return p;
}

// In the child, between fork and exec: system calls only.
[[noreturn]] void become(const ChildOptions& o, char* const* arguments, char* const* environment, pid_t parent, int report_fd) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);  // it died before the line above
  if (o.own_group) {
    ::setpgid(0, 0);
    std::signal(SIGTTOU, SIG_IGN);  // it may write to the terminal all the same
  }
  if (o.in_fd >= 0) ::dup2(o.in_fd, STDIN_FILENO);
  if (o.out_fd >= 0) ::dup2(o.out_fd, STDOUT_FILENO);
  if (o.error_fd >= 0) ::dup2(o.error_fd, STDERR_FILENO);
  sigset_t held;
  ::sigemptyset(&held);
  if (o.hold_signals)
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaddset(&held, signal);
  ::sigprocmask(SIG_SETMASK, &held, nullptr);
  ::execve(arguments[0], arguments, environment);
  const int error = errno;
  [[maybe_unused]] const ssize_t written = ::write(report_fd, &error, sizeof error);
  ::_exit(127);
}

}  // namespace

void keep_standard_streams() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(fd, F_GETFD) < 0 && errno == EBADF) [[maybe_unused]] const int opened = ::open("/dev/null", O_RDWR);  // the lowest that is free
}

pid_t start_child(const ChildOptions& options) {
  const std::vector<char*> arguments = pointers(options.command), environment = pointers(options.environment);
  int report[2];
  if (::pipe2(report, O_CLOEXEC) != 0) throw DeviceError(fmt::format("no pipe to a new process: {}", std::strerror(errno)));
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) become(options, arguments.data(), environment.data(), parent, report[1]);
  const int fork_error = errno;
  ::close(report[1]);
  int error = 0;
  const bool failed = pid > 0 && ::read(report[0], &error, sizeof error) == sizeof error;
  ::close(report[0]);
  if (pid < 0) throw DeviceError(fmt::format("cannot start another process: {}", std::strerror(fork_error)));
  if (!failed) return pid;
  ::waitpid(pid, nullptr, 0);
  user_error("{}: cannot be started: {}", options.command[0], std::strerror(error));
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name ? std::string("SIG") + name : "unknown";
}

}  // namespace uly::launch
