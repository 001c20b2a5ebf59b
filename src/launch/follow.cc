#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <poll.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/check.h"
#include "launch/environment.h"
#include "launch/lines.h"
#include "launch/local.h"
#include "launch/nccl.h"
#include "launch/nodes.h"

namespace uly::launch {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kSilence{20};  // after which a follower takes its leader for gone

void say_control(const Json& what) {
  std::fflush(stdout);
  write_all(STDOUT_FILENO, kControl + what.dump() + "\n");
}

// A line of stdin; nothing at its end, or where none came in time.
class Lines {
 public:
  std::optional<std::string> next(milliseconds patience) {
    for (;;) {
      if (const size_t end = text_.find('\n'); end != std::string::npos) {
        std::string line = text_.substr(0, end);
        text_.erase(0, end + 1);
        return line;
      }
      pollfd fd{STDIN_FILENO, POLLIN, 0};
      const int came = ::poll(&fd, 1, static_cast<int>(patience.count()));
      if (came < 0 && errno == EINTR) continue;
      char buffer[16384];
      const ssize_t n = came > 0 ? ::read(STDIN_FILENO, buffer, sizeof buffer) : 0;
      if (n <= 0) return std::nullopt;
      text_.append(buffer, static_cast<size_t>(n));
    }
  }

 private:
  std::string text_;
};

std::vector<std::string> own_addresses() {
  std::vector<std::string> all;
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return all;
  for (const ifaddrs* i = list; i; i = i->ifa_next) {
    if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || (i->ifa_flags & IFF_LOOPBACK) != 0 || (i->ifa_flags & IFF_UP) == 0) continue;
    char text[INET_ADDRSTRLEN] = "";
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr, text, sizeof text);
    all.push_back(text);
  }
  ::freeifaddrs(list);
  return all;
}

}  // namespace

struct Leash::State {
  Lines lines;
  std::mutex mutex;
  std::condition_variable told;
  bool go = false;

  void obey();
};

// Does what the leader says, and ends this process when it says nothing any more.
void Leash::State::obey() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);  // they are for the main thread
  while (const std::optional<std::string> line = lines.next(kSilence)) {
    if (*line == "go") {
      const std::lock_guard lock(mutex);
      go = true;
      told.notify_all();
    } else if (line->starts_with("signal ")) {
      ::kill(::getpid(), std::atoi(line->c_str() + 7));
    }
  }
  ::kill(::getpid(), SIGTERM);
  std::this_thread::sleep_for(seconds(8));
  ::kill(::getpid(), SIGKILL);  // children die with it
}

std::string build_of(const std::string& version, const std::string& engine) {
  std::ifstream file(engine, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  return fmt::format("{}-{:08x}", version, XXH3_64bits(bytes.data(), bytes.size()) & 0xffffffff);
}

Json facts_of_machine(const std::string& version, const Json& more) {
  const std::string engine = engine_path();
  Json facts = {{"build", build_of(version, engine)}, {"engine", ""}, {"addresses", own_addresses()}, {"port", free_port()}, {"shared_memory", little_shared_memory("/dev/shm")}};
  if (::access(engine.c_str(), X_OK) != 0) facts["engine"] = fmt::format("no {} there: use a path that all machines share, or install it there", engine);
  facts.update(more);
  return facts;
}

Leash::Leash(const Json& facts) : state_(std::make_shared<State>()) {
  std::signal(SIGPIPE, SIG_IGN);
  say_control({{"facts", facts}});
}

Json Leash::job() {
  std::optional<std::string> line;
  do line = state_->lines.next(kSilence);  // signs of life come before the job too
  while (line && line->empty());
  if (!line || line->starts_with("signal")) throw DeviceError("the leading ulysses is gone");
  Json job = Json::parse(*line, nullptr, false);
  ULY_CHECK(job.is_object(), "a follower is told its job in a line of JSON");
  std::thread([state = state_] { state->obey(); }).detach();
  return job;
}

void Leash::wait_for_go() {
  say_control({{"ready", true}});
  std::unique_lock lock(state_->mutex);
  state_->told.wait(lock, [&] { return state_->go; });
}

void Leash::ended(int code, bool killed) { say_control({{"ended", {{"code", code}, {"killed", killed}}}}); }

Followed follow(const Json& facts) {
  auto leash = std::make_shared<Leash>(facts);
  const Json job = leash->job();
  Followed f;
  f.node = {.index = job.at("index"), .hosts = {}, .master_address = job.at("master_address"), .master_port = job.at("master_port"), .leash = std::move(leash)};
  for (const Json& h : job.at("hosts")) f.node.hosts.push_back({.name = h.at("name"), .slots = h.at("slots").get<std::vector<int64_t>>()});
  f.arguments = job.at("arguments").get<std::vector<std::string>>();
  const std::string folder = job.at("folder");
  ULY_USER_CHECK(::chdir(folder.c_str()) == 0, "no folder {} here: {}: the recipe and its files are expected under the same path on all machines", folder, std::strerror(errno));
  for (const Json& v : job.at("variables")) ::setenv(v.at(0).get<std::string>().c_str(), v.at(1).get<std::string>().c_str(), 1);
  return f;
}

void tell_of_end(const std::string& lines, bool led) {
  if (!led) return write_all(STDERR_FILENO, lines);
  std::string text;
  for_lines(lines, [&](const std::string& line) { text += kControl + line + "\n"; });
  write_all(STDERR_FILENO, text);
}

}  // namespace uly::launch
