// Being asked to stop while there are no ranks.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>

#include "base/check.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/job.h"

namespace uly::cli {
namespace {

constexpr std::chrono::seconds kLook{1};  // between looks at the kill switch

char engine_of_rank[4096];  // for a signal's handler: where this process is a rank, the program that tells the others

// Ends this process, and with it what prepares. Async-signal-safe.
[[noreturn]] void stop_now(const char* said, size_t bytes) {
  if (engine_of_rank[0] != '\0') {
    sigset_t held;
    ::sigemptyset(&held);
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaddset(&held, signal);
    ::pthread_sigmask(SIG_BLOCK, &held, nullptr);
    char leave[] = "leave";
    char* const arguments[] = {engine_of_rank, leave, nullptr};
    ::execv(engine_of_rank, arguments);
  }
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, said, bytes);
  ::_exit(static_cast<int>(Exit::kPreempted));
}

void on_signal(int) {
  static constexpr char kSaid[] = "stopped before the first step; start again\n";
  stop_now(kSaid, sizeof kSaid - 1);
}

}  // namespace

void take_signals(bool is_rank) {
  if (is_rank) engine_program().copy(engine_of_rank, sizeof engine_of_rank - 1);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) std::signal(signal, on_signal);
}

std::string why_to_stop(const recipe::Recipe& recipe, const Options& options) {
  std::error_code error;
  if (!recipe.kill_switch_path.empty() && std::filesystem::exists(recipe.kill_switch_path, error)) return recipe.kill_switch_path + " exists";
  const double elapsed = options.elapsed_seconds + std::chrono::duration<double>(std::chrono::steady_clock::now() - options.started).count();
  return recipe.exit_after_seconds > 0 && elapsed >= recipe.exit_after_seconds ? fmt::format("exit_after: {} have passed", format_duration(recipe.exit_after_seconds)) : "";
}

EarlyStop::EarlyStop(const recipe::Recipe& recipe, const Options& options, const Ranks& ranks) {
  thread_ = std::thread([this, &recipe, &options, saves = recipe::saves_states(recipe), speaks = ranks.speaks()] {
    std::unique_lock lock(mutex_);
    do {
      const std::string why = why_to_stop(recipe, options);
      if (why.empty()) continue;
      if (speaks) say("{}: stopping before the first step", why);
      if (!saves) ::_exit(static_cast<int>(Exit::kDone));
      stop_now("", 0);
    } while (!changed_.wait_for(lock, kLook, [&] { return stopped_; }));
  });
}

EarlyStop::~EarlyStop() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

}  // namespace uly::cli
