#include "launch/python.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "launch/child.h"
#include "launch/environment.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

// A file without a name, in memory: however this process ends nothing is left of it, which may hold a token.
class Request {
 public:
  explicit Request(const std::string& content) : fd_(::memfd_create("ulysses-request", MFD_CLOEXEC)) {
    if (fd_ < 0) throw DeviceError(fmt::format("no memory for a request to another process: {}", std::strerror(errno)));
    if (::write(fd_, content.data(), content.size()) == static_cast<ssize_t>(content.size())) return;
    const int error = errno;
    ::close(fd_);
    throw DeviceError(fmt::format("no memory for a request to another process: {}", std::strerror(error)));
  }
  ~Request() { ::close(fd_); }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

bool is_ours(int code) {
  for (Exit e : {Exit::kUser, Exit::kWillNotFit, Exit::kInternal, Exit::kDevice, Exit::kNumerics, Exit::kPreempted})
    if (code == static_cast<int>(e)) return true;
  return false;
}

}  // namespace

Output run_and_capture(const std::vector<std::string>& command, int in_fd) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw DeviceError(fmt::format("no pipe to a new process: {}", std::strerror(errno)));
  ChildOptions options;
  options.command = command;
  options.environment = environment_with({});
  options.in_fd = in_fd;
  options.out_fd = ends[1];
  pid_t pid = -1;
  try {
    pid = start_child(options);
  } catch (...) {
    ::close(ends[0]);
    ::close(ends[1]);
    throw;
  }
  ::close(ends[1]);
  Output output;
  char buffer[4096];
  for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0 || (n < 0 && errno == EINTR);)
    if (n > 0) output.text.append(buffer, static_cast<size_t>(n));
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  output.exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return output;
}

namespace {

std::string run(const std::string& module, const std::vector<std::string>& arguments, int in_fd) {
  const std::string python = python_path();
  ULY_USER_CHECK(::access(python.c_str(), X_OK) == 0, "{}: expected the Python environment here: {}; `make setup` makes it, ULYSSES_PYTHON names another", python, std::strerror(errno));
  std::vector<std::string> command = {python, "-m", module};
  command.insert(command.end(), arguments.begin(), arguments.end());
  const Output output = run_and_capture(command, in_fd);
  if (output.exit_code == 128 + SIGINT || output.exit_code == 128 + SIGTERM) throw Error(static_cast<Exit>(output.exit_code), "");
  if (output.exit_code > 128) {
    const int signal = output.exit_code - 128;
    const char* hint = signal == SIGKILL ? "; the machine may have run out of memory" : "";
    throw DeviceError(fmt::format("{} was killed by signal {} ({}){}", module, signal, signal_name(signal), hint));
  }
  if (is_ours(output.exit_code)) throw Error(static_cast<Exit>(output.exit_code), "");
  constexpr int kTraceback = 1;  // of Python itself: what is ours ends with another code
  ULY_USER_CHECK(output.exit_code != kTraceback || !variable("ULYSSES_PYTHON"), "environment variable ULYSSES_PYTHON: {} cannot run {}, see above: expected a Python with ulysses_plus and what it needs", python, module);
  if (output.exit_code != 0) throw InternalError(fmt::format("{} failed with exit code {}", module, output.exit_code));
  const size_t last = output.text.find_last_not_of(" \n");
  if (last == std::string::npos) throw InternalError(fmt::format("{} printed no answer", module));
  const size_t before = output.text.rfind('\n', last);
  const size_t first = before == std::string::npos ? 0 : before + 1;
  return output.text.substr(first, last + 1 - first);
}

}  // namespace

std::string run_python(const std::string& module, const std::vector<std::string>& arguments) { return run(module, arguments, -1); }

Json run_python(const std::string& module, const Json& request) {
  const Request file(request.dump());
  const Json answer = Json::parse(run(module, {"--request", "/proc/self/fd/0"}, file.fd()), nullptr, false);
  if (!answer.is_object()) throw InternalError(fmt::format("{} did not answer with a JSON object", module));
  return answer;
}

}  // namespace uly::launch
