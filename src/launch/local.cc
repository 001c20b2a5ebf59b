#include "launch/local.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <optional>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "launch/child.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "launch/lines.h"
#include "launch/signals.h"

namespace uly::launch {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Ranks that fail together are seen one after the other; after so long the first cause is chosen among those seen.
constexpr milliseconds kSettle{300};
// A rank that has said its error and does not end is quoted after so long.
constexpr milliseconds kHold{5000};
// Ranks save and end together: one that still runs so long after another has saved is stopped or hung.
constexpr milliseconds kAfterSaved{10000};

struct Rank {
  int64_t rank = 0;
  pid_t pid = -1;
  LineReader error;        // closed where it speaks for itself and after its end
  int log_fd = -1;
  std::string held;        // lines from "error: " on
  Clock::time_point held_since{};
  std::optional<int> status;  // as waitpid gave it

  bool failed() const { return status && *status != 0; }
  bool killed() const { return status && WIFSIGNALED(*status); }
  bool saved() const { return status && WIFEXITED(*status) && WEXITSTATUS(*status) == static_cast<int>(Exit::kPreempted); }
  int code() const { return killed() ? static_cast<int>(Exit::kDevice) : WEXITSTATUS(*status); }
};

class Watch {
 public:
  explicit Watch(const LocalJob& job) : job_(job) {}
  ~Watch() {
    kill_all(SIGKILL);
    for (Rank& r : ranks_) {
      if (r.pid > 0 && !r.status) ::waitpid(r.pid, nullptr, 0);
      r.error.close();
      if (r.log_fd >= 0) ::close(r.log_fd);
    }
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  int run() {
    const int port = job_.node ? job_.node->master_port : job_.master_port > 0 ? job_.master_port : free_port();
    for (int64_t r = 0; r < job_.ranks; ++r) start(r, port);
    while (std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return !r.status; })) {
      wait_for_news();
      for (int signal : signals_.take()) pass_on(signal);
      for (Rank& r : ranks_) read_errors(r);
      reap();
      act();
    }
    for (Rank& r : ranks_) read_errors(r);
    return conclude();
  }
  bool asked() const { return asked_to_end_ != 0; }

 private:
  void start(int64_t local_rank, int port);
  void open_log(Rank& r);
  void wait_for_news();
  void read_errors(Rank& r);
  void take_line(Rank& r, const std::string& line);
  void quote(Rank& r);
  void reap();
  void pass_on(int signal);
  void act();
  void choose_cause();
  int conclude();
  bool led() const { return job_.node && job_.node->leash; }
  void kill_all(int signal) {
    for (const Rank& r : ranks_)
      if (r.pid > 0 && !r.status) ::kill(-r.pid, signal);
  }

  const LocalJob& job_;
  const std::optional<std::string> token_ = job_.node ? variable("ULYSSES_JOB_TOKEN") : job_token();  // on several machines it is for all
  Signals signals_;
  std::vector<Rank> ranks_;
  const Rank* cause_ = nullptr;                 // the rank that failed first
  std::optional<Clock::time_point> failed_at_;  // when a failure was first seen
  std::optional<Clock::time_point> saved_at_;   // when a rank was first seen that had saved and ended
  std::optional<Clock::time_point> stop_at_;    // when SIGTERM was sent to the rest
  bool killed_rest_ = false;
  int asked_to_end_ = 0;  // the signal that was passed on
  Clock::time_point asked_at_{};
};

void Watch::start(int64_t local_rank, int port) {
  const std::string threads = variable("OMP_NUM_THREADS").value_or(std::to_string(std::max<int64_t>(1, job_.cores / job_.ranks)));
  const int64_t rank = (job_.node ? job_.node->first_rank() : 0) + local_rank, world = job_.node ? job_.node->world() : job_.ranks;
  const bool speaks = rank == 0 && job_.log_folder.empty();
  ChildOptions options;
  options.command = job_.command;
  options.own_group = true;
  options.hold_signals = true;
  options.environment = environment_with({{"RANK", std::to_string(rank)},
                                          {"LOCAL_RANK", std::to_string(local_rank)},
                                          {"WORLD_SIZE", std::to_string(world)},
                                          {"LOCAL_WORLD_SIZE", std::to_string(job_.ranks)},
                                          {"LOCAL_SIZE", std::to_string(job_.ranks)},
                                          {"CROSS_RANK", std::to_string(job_.node ? job_.node->index : 0)},
                                          {"CROSS_SIZE", std::to_string(job_.node ? job_.node->hosts.size() : 1)},
                                          {"MASTER_ADDR", job_.node ? job_.node->master_address : "127.0.0.1"},
                                          {"MASTER_PORT", std::to_string(port)},
                                          {"OMP_NUM_THREADS", threads},
                                          {"CUDA_DEVICE_ORDER", cuda_device_order()},
                                          {"ULYSSES_HOST", job_.node ? std::optional(job_.node->hosts[static_cast<size_t>(job_.node->index)].name) : std::nullopt},
                                          {"ULYSSES_JOB_TOKEN", token_},
                                          {"ULYSSES_STARTED", job_.node && !led() ? "apart" : "together"},
                                          {"TORCHELASTIC_USE_AGENT_STORE", std::nullopt}});
  Rank r;
  r.rank = rank;
  int ends[2] = {-1, -1}, nothing = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (!speaks && ::pipe2(ends, O_CLOEXEC) != 0) throw DeviceError(fmt::format("no pipe to rank {}: {}", rank, std::strerror(errno)));
  if (!speaks) {
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
    options.error_fd = ends[1];
    if (rank > 0) options.out_fd = ends[1];
  }
  options.in_fd = nothing;  // stdin is a leader's, or a terminal that ranks have no use for
  r.error.fd = ends[0];
  open_log(r);
  ranks_.push_back(r);
  ranks_.back().pid = start_child(options);
  ::setpgid(ranks_.back().pid, ranks_.back().pid);  // here too: a signal must not come before the child did it
  ::close(nothing);
  if (!speaks) ::close(ends[1]);
}

void Watch::open_log(Rank& r) {
  if (job_.log_folder.empty()) return;
  const std::string path = fmt::format("{}/rank_{}.log", job_.log_folder, r.rank);
  r.log_fd = ::open(path.c_str(), O_WRONLY | O_CREAT | (job_.again ? O_APPEND : O_TRUNC) | O_CLOEXEC, 0666);
  ULY_USER_CHECK(r.log_fd >= 0, "--enable_each_rank_log: {} cannot be written: {}", path, std::strerror(errno));
}

void Watch::wait_for_news() {
  std::vector<pollfd> fds = {{signals_.fd(), POLLIN, 0}};
  for (const Rank& r : ranks_)
    if (r.error.fd >= 0) fds.push_back({r.error.fd, POLLIN, 0});
  // Deadlines are few and coarse: look ten times a second while one is running.
  const bool deadline = failed_at_ || std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return !r.held.empty(); });
  ::poll(fds.data(), fds.size(), deadline ? 100 : 1000);
}

void Watch::read_errors(Rank& r) {
  r.error.read([&](const std::string& line) { take_line(r, line); });
  if (!r.held.empty() && !stop_at_ && Clock::now() - r.held_since > kHold) quote(r);
}

void Watch::take_line(Rank& r, const std::string& line) {
  if (r.log_fd >= 0) write_all(r.log_fd, line + "\n");
  if (r.rank == 0) return write_all(STDERR_FILENO, line + "\n");
  const std::string text = fmt::format("[rank {}] {}\n", r.rank, line);
  if (r.held.empty() && !line.starts_with("error: ")) return write_all(STDERR_FILENO, text);
  if (r.held.empty()) r.held_since = Clock::now();
  r.held += text;
}

void Watch::quote(Rank& r) {
  tell_of_end(r.held, led());
  r.held.clear();
}

void Watch::reap() {
  for (Rank& r : ranks_) {
    int status = 0;
    if (r.status || ::waitpid(r.pid, &status, WNOHANG) != r.pid) continue;
    r.status = status;
    if (r.failed() && !r.saved() && !failed_at_) failed_at_ = Clock::now();
    if (r.saved() && !saved_at_) saved_at_ = Clock::now();
  }
}

void Watch::pass_on(int signal) {
  if (asked_to_end_ == 0) {
    asked_to_end_ = signal;
    asked_at_ = Clock::now();
    return kill_all(signal);
  }
  if (Clock::now() - asked_at_ >= kRepeat) kill_all(SIGKILL);
}

void Watch::act() {
  const auto now = Clock::now();
  if (!failed_at_ && saved_at_ && now - *saved_at_ > kAfterSaved && !std::exchange(killed_rest_, true)) {
    choose_cause();
    kill_all(SIGKILL);
  }
  if (!failed_at_ || now - *failed_at_ < kSettle) return;
  if (!stop_at_) {
    choose_cause();
    stop_at_ = now;
    kill_all(SIGTERM);
  } else if (!killed_rest_ && now - *stop_at_ > job_.grace) {
    killed_rest_ = true;
    kill_all(SIGKILL);
  }
}

// A rank that died of a signal is the cause before one that ended by itself, and "a peer failed" (75) is the effect of
// another's end, if there is one. Having saved and ended (85) is no failure: the others are left to do the same.
void Watch::choose_cause() {
  if (cause_) return;
  const auto weight = [](const Rank& r) { return r.killed() ? 0 : r.saved() ? 3 : r.code() == static_cast<int>(Exit::kDevice) ? 2 : 1; };
  for (const Rank& r : ranks_)
    if (r.failed() && (!cause_ || weight(r) < weight(*cause_))) cause_ = &r;
}

int Watch::conclude() {
  choose_cause();
  // Where rank 0 came to the same end later than kSettle, it is the cause to speak of: what it said was shown as it came.
  if (const Rank& first = ranks_.front(); cause_ && first.rank == 0 && first.failed() && !first.killed() && !cause_->killed() && first.code() == cause_->code()) cause_ = &first;
  for (Rank& r : ranks_) {
    const bool echo = cause_ && &r != cause_ && r.failed() && (r.killed() || r.code() == static_cast<int>(Exit::kDevice) || r.code() == cause_->code());
    if (!echo) quote(r);
  }
  const bool killed = cause_ && cause_->killed();
  if (led()) job_.node->leash->ended(cause_ ? cause_->code() : 0, killed && asked_to_end_ == 0);
  if (!cause_) return 0;
  if (asked_to_end_ != 0 && killed) {
    if (!led()) say("stopped by {}", signal_name(asked_to_end_));
    return 128 + asked_to_end_;
  }
  const char* others = ranks_.size() > 1 ? "; the other ranks were stopped" : "";
  if (killed)
    tell_of_end(fmt::format("rank {} (pid {}) was killed by signal {} ({}){}\n", cause_->rank, cause_->pid, WTERMSIG(*cause_->status), signal_name(WTERMSIG(*cause_->status)), others), led());
  else if (cause_->rank > 0 && !cause_->saved())  // rank 0 has spoken for itself
    tell_of_end(fmt::format("rank {} ended with exit code {}{}\n", cause_->rank, cause_->code(), others), led());
  return cause_->code();
}

}  // namespace

Ended run_local(const LocalJob& job) {
  std::fflush(stdout);
  Watch watch(job);
  const int code = watch.run();
  return {.code = code, .asked = watch.asked()};
}

int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_ANY);
  socklen_t size = sizeof at;
  const bool found = fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0 && ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (!found) throw DeviceError(fmt::format("no free port on this machine: {}", std::strerror(error)));
  return ntohs(at.sin_port);
}

void check_meeting_place(const std::string& address, bool serves, const std::string& said_by) {
  constexpr std::chrono::seconds kPatience{10};
  const auto end = Clock::now() + kPatience;
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  for (int error; (error = ::getaddrinfo(address.c_str(), nullptr, &hints, &found)) != 0; std::this_thread::sleep_for(milliseconds(500)))
    ULY_USER_CHECK(Clock::now() < end, "{}: the ranks are to meet at {}, a name that has no address here: {}: expected an address of rank 0's machine that all can reach", said_by, address, ::gai_strerror(error));
  bool own = !serves;
  for (const addrinfo* at = found; at && !own; at = at->ai_next) {
    const int fd = ::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    own = fd >= 0 && (::bind(fd, at->ai_addr, at->ai_addrlen) == 0 || errno != EADDRNOTAVAIL);  // at any port
    if (fd >= 0) ::close(fd);
  }
  ::freeaddrinfo(found);
  ULY_USER_CHECK(own, "{}: rank 0 cannot listen at {}: it is not an address of this machine: expected one of its own that all can reach", said_by, address);
}

}  // namespace uly::launch
