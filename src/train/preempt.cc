#include "train/preempt.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <ctime>

#include "launch/signals.h"

namespace uly::train {
namespace {

// The launcher passes on what this process may have got itself.
constexpr int64_t kRepeat = std::chrono::nanoseconds(launch::kRepeat).count();

std::atomic<int> noticed = 0;
std::atomic<int64_t> noticed_at = 0;  // 0: there was none
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

void notice(int signal) {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  const int64_t now = 1 + int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
  int64_t first = 0;
  if (noticed_at.compare_exchange_strong(first, now)) noticed = signal;
  else if (now - first >= kRepeat) ::_exit(128 + signal);
}

}  // namespace

void notice_signals() {
  struct sigaction action {};
  action.sa_handler = notice;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaction(signal, &action, nullptr);
}

void admit_signals() {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaddset(&set, signal);
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

int noticed_signal() { return noticed; }

}  // namespace uly::train
