#include "launch/restart.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/check.h"
#include "base/log.h"

namespace uly::launch {
namespace {

using std::chrono::seconds;

constexpr seconds kLongestWait{60}, kAfterLoss{30};

// A first start that fails to come about is thrown; a later one counts as a failure.
Ended attempt(const std::function<Ended(double)>& run, double elapsed, bool first) {
  if (first) return run(elapsed);
  try {
    return run(elapsed);
  } catch (const DeviceError& e) {
    say("{}", e.what());
    return {.code = static_cast<int>(e.exit())};
  }
}

}  // namespace

int with_restarts(int64_t most, const std::function<Ended(double)>& run) {
  const auto began = std::chrono::steady_clock::now();
  seconds wait{1};
  for (int64_t restarts = 0;; ++restarts) {
    const Ended ended = attempt(run, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(), restarts == 0);
    if (ended.code != static_cast<int>(Exit::kDevice) || ended.asked || restarts == most) return ended.code;
    const seconds pause = ended.lost ? std::max(wait, kAfterLoss) : wait;
    say("restart {} of {}, in {} s, from the newest state that is whole", restarts + 1, most, pause.count());
    std::this_thread::sleep_for(pause);  // a signal ends this process: nothing else runs
    wait = std::min(2 * wait, kLongestWait);
  }
}

}  // namespace uly::launch
