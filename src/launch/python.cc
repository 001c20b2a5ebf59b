#include "launch/python.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "launch/child.h"
#include "launch/environment.h"

namespace uly::launch {
namespace {

namespace fs = std::filesystem;

// A file that only this user can read, gone at the end of the scope.
class RequestFile {
 public:
  explicit RequestFile(const std::string& content) : path_(fs::temp_directory_path() / "ulysses-request-XXXXXX") {
    const int fd = ::mkostemp(path_.data(), O_CLOEXEC);
    ULY_USER_CHECK(fd >= 0, "{}: no temporary file can be made here: {}", fs::temp_directory_path().string(), std::strerror(errno));
    const bool written = ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size());
    const int error = errno;
    ::close(fd);
    if (written) return;
    ::unlink(path_.c_str());
    user_error("{}: cannot be written: {}", path_, std::strerror(error));
  }
  ~RequestFile() { ::unlink(path_.c_str()); }
  RequestFile(const RequestFile&) = delete;
  RequestFile& operator=(const RequestFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

bool is_ours(int code) {
  for (Exit e : {Exit::kUser, Exit::kWillNotFit, Exit::kInternal, Exit::kDevice, Exit::kNumerics, Exit::kPreempted})
    if (code == static_cast<int>(e)) return true;
  return false;
}

}  // namespace

Output run_and_capture(const std::vector<std::string>& command) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw DeviceError(fmt::format("no pipe to a new process: {}", std::strerror(errno)));
  ChildOptions options;
  options.command = command;
  options.environment = environment_with({});
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

std::string run_python(const std::string& module, const std::vector<std::string>& arguments) {
  const std::string python = python_path();
  ULY_USER_CHECK(fs::exists(python), "{}: expected the Python environment here; `make setup` makes it, ULYSSES_PYTHON names another", python);
  std::vector<std::string> command = {python, "-m", module};
  command.insert(command.end(), arguments.begin(), arguments.end());
  const Output output = run_and_capture(command);
  if (output.exit_code == 128 + SIGINT || output.exit_code == 128 + SIGTERM) throw Error(static_cast<Exit>(output.exit_code), "");
  if (output.exit_code > 128) {
    const int signal = output.exit_code - 128;
    const char* hint = signal == SIGKILL ? "; the machine may have run out of memory" : "";
    throw DeviceError(fmt::format("{} was killed by signal {} ({}){}", module, signal, signal_name(signal), hint));
  }
  if (is_ours(output.exit_code)) throw Error(static_cast<Exit>(output.exit_code), "");
  if (output.exit_code != 0) throw InternalError(fmt::format("{} failed with exit code {}", module, output.exit_code));
  const size_t last = output.text.find_last_not_of(" \n");
  if (last == std::string::npos) throw InternalError(fmt::format("{} printed no answer", module));
  const size_t before = output.text.rfind('\n', last);
  const size_t first = before == std::string::npos ? 0 : before + 1;
  return output.text.substr(first, last + 1 - first);
}

Json run_python(const std::string& module, const Json& request) {
  const RequestFile file(request.dump());
  const Json answer = Json::parse(run_python(module, std::vector<std::string>{"--request", file.path()}), nullptr, false);
  if (!answer.is_object()) throw InternalError(fmt::format("{} did not answer with a JSON object", module));
  return answer;
}

}  // namespace uly::launch
