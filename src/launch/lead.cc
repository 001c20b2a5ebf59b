#include "launch/nodes.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "launch/child.h"
#include "launch/environment.h"
#include "launch/exports.h"
#include "launch/lines.h"
#include "launch/signals.h"

namespace uly::launch {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kBeat{2};          // between signs of life
constexpr seconds kLook{1};          // between looks at why to stop
constexpr seconds kHello{60};        // for all machines to answer
constexpr milliseconds kSettle{700}; // machines that fail together are seen one after the other
constexpr seconds kGrace{6};         // between SIGTERM, SIGKILL for what is left, and the end of the connection
constexpr int kSshFailed = 255, kNotFound = 127, kNotExecutable = 126;

std::string joined(const std::vector<std::string>& parts, const char* between) {
  std::string all;
  for (const std::string& part : parts) all += (all.empty() ? "" : between) + part;
  return all;
}

// As one word of a POSIX shell.
std::string quoted(const std::string& text) {
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

Json to_json(const std::vector<Host>& hosts) {
  Json all = Json::array();
  for (const Host& h : hosts) all.push_back({{"name", h.name}, {"slots", h.slots}});
  return all;
}

struct Follower {
  Host host;
  bool here = false;  // no ssh
  pid_t pid = -1;
  int in = -1;
  std::string unsent;  // for it: the pipe is full
  LineReader out, error;
  std::string spoken;                // on stderr before it has said what it is
  std::string held;                  // of its end
  std::optional<Json> facts, ended;
  bool ready = false;
  std::optional<int> status;
  Clock::time_point ended_at{};

  bool killed() const { return status && (WIFSIGNALED(*status) || (!ended && !here && WEXITSTATUS(*status) == kSshFailed)); }
  int code() const { return killed() ? static_cast<int>(Exit::kDevice) : WEXITSTATUS(*status); }
  bool failed() const { return status && *status != 0; }
  bool saved() const { return status && !killed() && code() == static_cast<int>(Exit::kPreempted); }
  // Who failed by itself comes before who lost a peer.
  int weight() const {
    if (killed() || (ended && ended->value("killed", false))) return 0;
    if (saved()) return 3;
    if (code() > 128) return 4;  // by a signal from here, or from nobody: see conclude()
    return code() == static_cast<int>(Exit::kDevice) ? 2 : 1;
  }
};

class Leader {
 public:
  explicit Leader(const Lead& job) : job_(job) {
    std::signal(SIGPIPE, SIG_IGN);
    std::error_code error;
    folder_ = std::filesystem::current_path(error).string();
    ULY_USER_CHECK(is_utf8(folder_), "{}: expected a folder whose path is UTF-8, as other machines are told it", Json(folder_).dump(-1, ' ', true, Json::error_handler_t::replace));
    for (const std::string& argument : job.arguments)
      ULY_USER_CHECK(is_utf8(argument), "command line: expected UTF-8, as other machines are told it, found {}", Json(argument).dump(-1, ' ', true, Json::error_handler_t::replace));
    followers_.reserve(job.hosts.size());
    for (const Host& host : job.hosts) start(host);
  }
  ~Leader() {
    for (Follower& f : followers_) {
      close_in(f);
      if (f.pid > 0 && !f.status) ::kill(-f.pid, f.here ? SIGTERM : SIGKILL), ::waitpid(f.pid, nullptr, 0);
      f.out.close(), f.error.close();
    }
  }
  Leader(const Leader&) = delete;
  Leader& operator=(const Leader&) = delete;

  int run() {
    const auto deadline = Clock::now() + kHello;
    while (!all([](const Follower& f) { return f.facts.has_value(); })) {
      turn();
      for (const Follower& f : followers_)
        if (f.status && !f.facts) refuse(f);
      if (asked_to_end_ != 0) return stopped();
      if (Clock::now() > deadline) {
        std::vector<std::string> silent;
        for (const Follower& f : followers_)
          if (!f.facts) silent.push_back(f.host.name);
        throw DeviceError(fmt::format("{}: no answer within {} s", joined(silent, ", "), kHello.count()));
      }
    }
    send_job();
    while (!all([](const Follower& f) { return f.status.has_value() && f.error.fd < 0; })) {
      turn();
      if (!gone_ && all([](const Follower& f) { return f.ready; })) gone_ = true, tell("go\n");
      act();
    }
    return conclude();
  }
  bool asked() const { return asked_to_end_ != 0; }
  bool lost() const {
    return std::any_of(followers_.begin(), followers_.end(), [](const Follower& f) { return !f.here && !f.ended && f.killed(); });
  }

 private:
  // Asked to end, nothing having been saved.
  int stopped() const {
    if (job_.saves && !gone_) {
      say("stopped before the first step; start again");
      return static_cast<int>(Exit::kPreempted);
    }
    if (asked_by_itself_) return static_cast<int>(Exit::kDone);
    say("stopped by {}", signal_name(asked_to_end_));
    return 128 + asked_to_end_;
  }
  template <typename F>
  bool all(F&& is) const { return std::all_of(followers_.begin(), followers_.end(), is); }

  void start(const Host& host);
  void send_job();
  void turn();
  void look();
  void read(Follower& f);
  void take(Follower& f, const std::string& line, bool error);
  void act();
  int conclude();
  [[noreturn]] void refuse(const Follower& f);

  void tell(const std::string& line) {
    for (Follower& f : followers_) tell(f, line);
  }
  void tell(Follower& f, const std::string& line) {
    if (f.in < 0) return;
    f.unsent += line;
    send(f);
  }
  // As much as the pipe takes.
  void send(Follower& f) {
    while (f.in >= 0 && !f.unsent.empty()) {
      const ssize_t n = ::write(f.in, f.unsent.data(), f.unsent.size());
      if (n > 0) f.unsent.erase(0, static_cast<size_t>(n));
      else if (errno == EAGAIN) return;
      else if (errno != EINTR) f.unsent.clear();  // its end is seen elsewhere
    }
  }
  void close_in(Follower& f) {
    if (f.in >= 0) ::close(f.in);
    f.in = -1;
  }
  std::string prefix(const Follower& f) const { return &f == &followers_[0] ? "" : fmt::format("[{}] ", f.host.name); }

  const Lead& job_;
  const Variables variables_ = exported_variables();  // what is wrong with them is said before anything is started
  std::string folder_;
  Signals signals_;
  std::vector<Follower> followers_;
  Clock::time_point beat_ = Clock::now();
  std::optional<Clock::time_point> failed_at_, stopped_at_;
  const Follower* cause_ = nullptr;
  bool killed_rest_ = false;
  int asked_to_end_ = 0;
  Clock::time_point asked_at_{}, looked_at_{};
  bool asked_by_itself_ = false;  // by the recipe, not by a signal
  bool gone_ = false;           // all are ready: ranks run
  std::set<std::string> said_;  // until then; what each machine finds for itself is told once
};

void Leader::start(const Host& host) {
  Follower f{.host = host, .here = is_this_machine(host.name)};
  int in[2], out[2], error[2];
  for (int* ends : {in, out, error})
    if (::pipe2(ends, O_CLOEXEC) != 0) throw DeviceError(fmt::format("no pipe to {}: {}", host.name, std::strerror(errno)));
  const std::string program = program_folder() + "/ulysses";
  ChildOptions child{.environment = environment_with({}), .in_fd = in[0], .out_fd = out[1], .error_fd = error[1], .own_group = true};
  if (f.here) {
    child.command = {program, "follow"};
  } else {
    child.command = {"/usr/bin/env", "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=4", "-o", "ServerAliveCountMax=3"};
    if (job_.ssh_port > 0) child.command.insert(child.command.end(), {"-p", std::to_string(job_.ssh_port)});
    child.command.insert(child.command.end(), {"--", host.name, "exec " + quoted(program) + " follow"});
  }
  f.pid = start_child(child);
  ::setpgid(f.pid, f.pid);
  for (int fd : {in[0], out[1], error[1]}) ::close(fd);
  for (int fd : {in[1], out[0], error[0]}) ::fcntl(fd, F_SETFL, O_NONBLOCK);
  f.in = in[1], f.out.fd = out[0], f.error.fd = error[0];
  followers_.push_back(std::move(f));
}

// Before it has answered.
void Leader::refuse(const Follower& f) {
  std::string why = f.spoken;
  while (why.ends_with('\n')) why.pop_back();
  why = why.substr(why.rfind('\n') == std::string::npos ? 0 : why.rfind('\n') + 1);
  const std::string program = program_folder() + "/ulysses";
  const int code = WIFEXITED(*f.status) ? WEXITSTATUS(*f.status) : -1;
  if (code == kNotFound || code == kNotExecutable) user_error("{}: no {} there: use a path that all machines share, or install it there", f.host.name, program);
  if (code == kSshFailed && !f.here) {
    const bool key = why.find("ermission denied") != std::string::npos || why.find("Host key") != std::string::npos;
    if (key) user_error("{}: ssh: {}: expected to log in without a password: `ssh {}{} true` has to work", f.host.name, why, job_.ssh_port > 0 ? fmt::format("-p {} ", job_.ssh_port) : "", f.host.name);
    throw DeviceError(fmt::format("{}: ssh: {}", f.host.name, why.empty() ? "the connection was lost" : why));
  }
  throw DeviceError(fmt::format("{}: ulysses there ended before it began (exit code {}){}", f.host.name, code, why.empty() ? "" : ": " + why));
}

void Leader::send_job() {
  std::vector<Json> facts;
  for (const Follower& f : followers_) facts.push_back(*f.facts);
  for (size_t i = 0; i < followers_.size(); ++i) {
    const std::string& name = followers_[i].host.name;
    ULY_USER_CHECK(facts[i].at("engine").get<std::string>().empty(), "{}: {}", name, facts[i].at("engine").get<std::string>());
    ULY_USER_CHECK(facts[i].at("build") == facts[0].at("build"), "{}: another build of ulysses ({}) than on {} ({}): install the same on all machines", name, facts[i].at("build").get<std::string>(), followers_[0].host.name, facts[0].at("build").get<std::string>());
  }
  const std::vector<std::string> more = job_.agree(facts);
  std::string address = job_.master_address;
  if (address.empty()) {
    const auto addresses = facts[0].at("addresses").get<std::vector<std::string>>();
    const bool alone = followers_.size() == 1;
    ULY_USER_CHECK(alone || !addresses.empty(), "{}: it has no address but its own loopback: give --master_addr", followers_[0].host.name);
    address = alone ? "127.0.0.1" : addresses[0];
  }
  Json job = {{"folder", folder_}, {"hosts", to_json(job_.hosts)}, {"master_address", address}, {"master_port", job_.master_port > 0 ? job_.master_port : facts[0].at("port").get<int>()}, {"arguments", job_.arguments}, {"variables", Json::array()}};
  for (const std::string& argument : more) job["arguments"].push_back(argument);
  job["variables"].push_back({"ULYSSES_JOB_TOKEN", job_token()});
  for (const auto& [name, value] : variables_) job["variables"].push_back({name, value});
  for (size_t i = 0; i < followers_.size(); ++i) {
    job["index"] = i;
    tell(followers_[i], job.dump() + "\n");
  }
}

void Leader::turn() {
  std::vector<pollfd> fds = {{signals_.fd(), POLLIN, 0}};
  for (const Follower& f : followers_) {
    for (int fd : {f.out.fd, f.error.fd})
      if (fd >= 0) fds.push_back({fd, POLLIN, 0});
    if (f.in >= 0 && !f.unsent.empty()) fds.push_back({f.in, POLLOUT, 0});
  }
  ::poll(fds.data(), fds.size(), 100);
  for (Follower& f : followers_) send(f);
  for (int signal : signals_.take()) {
    const auto now = Clock::now();
    if (asked_to_end_ != 0 && now - asked_at_ < kRepeat) continue;
    if (asked_to_end_ != 0) {  // a second one: at once
      tell("signal 9\n");
      for (Follower& f : followers_) close_in(f);
    } else {
      asked_at_ = now;
    }
    asked_to_end_ = signal;
    tell(fmt::format("signal {}\n", signal));
  }
  look();
  if (const auto now = Clock::now(); now - beat_ > kBeat) beat_ = now, tell("\n");
  for (Follower& f : followers_) {
    read(f);
    int status = 0;
    if (f.status || ::waitpid(f.pid, &status, WNOHANG) != f.pid) continue;
    read(f);
    f.status = status;
    f.ended_at = Clock::now();
    close_in(f);
    if (f.failed() && !f.saved() && !failed_at_) failed_at_ = Clock::now();
  }
}

// Until ranks run, who look for themselves.
void Leader::look() {
  const auto now = Clock::now();
  if (gone_ || asked_to_end_ != 0 || now - looked_at_ < kLook) return;
  looked_at_ = now;
  const bool one_was_asked = std::any_of(followers_.begin(), followers_.end(), [](const Follower& f) { return f.saved(); });  // the others wait for it
  const std::string why = one_was_asked ? "" : job_.why_to_stop();
  if (why.empty() && !one_was_asked) return;
  if (!why.empty()) say("{}: stopping before the first step", why), asked_by_itself_ = true;
  asked_at_ = now;
  asked_to_end_ = SIGTERM;
  tell(fmt::format("signal {}\n", SIGTERM));
}

void Leader::read(Follower& f) {
  f.out.read([&](const std::string& line) { take(f, line, false); });
  f.error.read([&](const std::string& line) { take(f, line, true); });
}

void Leader::take(Follower& f, const std::string& line, bool error) {
  const bool control = !line.empty() && line[0] == kControl;
  if (error) {
    if (!f.facts) f.spoken += line.substr(control ? 1 : 0) + "\n";
    else if (control) f.held += line.substr(1) + "\n";
    else if (gone_ || said_.insert(line).second) write_all(STDERR_FILENO, prefix(f) + line + "\n");
    return;
  }
  if (!control) {  // before the first line of control a login shell may speak
    if (f.facts) write_all(STDOUT_FILENO, line + "\n");
    return;
  }
  const Json said = Json::parse(line.substr(1), nullptr, false);
  if (said.contains("facts")) f.facts = said["facts"];
  else if (said.contains("ready")) f.ready = true;
  else if (said.contains("ended")) f.ended = said["ended"];
}

void Leader::act() {
  const auto now = Clock::now();
  if (!failed_at_ || now - *failed_at_ < kSettle) return;
  if (!stopped_at_) {
    for (const Follower& f : followers_)
      if (f.failed() && !f.saved() && (!cause_ || std::pair(f.weight(), f.ended_at) < std::pair(cause_->weight(), cause_->ended_at))) cause_ = &f;
    stopped_at_ = now;
    tell(fmt::format("signal {}\n", SIGTERM));
  } else if (now - *stopped_at_ > 2 * kGrace) {
    for (Follower& f : followers_) {
      close_in(f);
      if (!f.status && now - *stopped_at_ > 3 * kGrace) ::kill(-f.pid, SIGKILL);  // ssh; the machine beyond sees the end of its stdin, or nothing any more
    }
  } else if (now - *stopped_at_ > kGrace && !std::exchange(killed_rest_, true)) {
    tell(fmt::format("signal {}\n", SIGTERM));  // a second one
  }
}

int Leader::conclude() {
  for (const Follower& f : followers_)
    if (f.failed() && !f.saved() && (!cause_ || f.weight() < cause_->weight())) cause_ = &f;
  if (!cause_)
    for (const Follower& f : followers_)
      if (f.saved() && !cause_) cause_ = &f;
  for (const Follower& f : followers_) {
    const bool echo = cause_ && &f != cause_ && f.failed() && (f.code() == cause_->code() || f.code() == static_cast<int>(Exit::kDevice) || f.code() > 128);
    if (f.held.empty() || echo) continue;
    std::string text;
    for_lines(f.held, [&](const std::string& line) { text += prefix(f) + line + "\n"; });
    write_all(STDERR_FILENO, text);
  }
  if (!cause_) return 0;
  if (asked_to_end_ != 0 && (cause_->killed() || cause_->code() > 128)) return stopped();
  const char* others = followers_.size() > 1 ? "; the other machines' ranks were stopped" : "";
  if (cause_->code() > 128) {
    say("{}: heard nothing of this ulysses for too long and ended{}", cause_->host.name, others);
    return static_cast<int>(Exit::kDevice);
  }
  if (!cause_->ended && cause_->killed()) say("{}: {}{}", cause_->host.name, cause_->here ? "ulysses was killed there" : "the connection was lost", others);
  else if (!cause_->saved() && followers_.size() > 1) say("{}: ended with exit code {}{}", cause_->host.name, cause_->code(), others);
  return cause_->code();
}

}  // namespace

int64_t Node::first_rank() const {
  int64_t rank = 0;
  for (int64_t i = 0; i < index; ++i) rank += static_cast<int64_t>(hosts[static_cast<size_t>(i)].slots.size());
  return rank;
}

int64_t Node::world() const {
  int64_t ranks = 0;
  for (const Host& h : hosts) ranks += static_cast<int64_t>(h.slots.size());
  return ranks;
}

Ended lead(const Lead& job) {
  Leader leader(job);
  const int code = leader.run();
  return {.code = code, .asked = leader.asked(), .lost = leader.lost()};
}

}  // namespace uly::launch
