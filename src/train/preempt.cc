#include "train/preempt.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace uly::train {
namespace {

std::atomic<int> noticed = 0;
static_assert(std::atomic<int>::is_always_lock_free);

void notice(int signal) {
  if (noticed.exchange(signal) != 0) ::_exit(128 + signal);
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
