// Starting a job again after a failure that a new start may mend.
#pragma once

#include <cstdint>
#include <functional>

namespace uly::launch {

// How a job's ranks ended.
struct Ended {
  int code = 0;
  bool asked = false;  // to end, by a signal from the user
  bool lost = false;   // the connection to a machine: what ran there ends itself within kSilence and its grace
};

// Runs the job, and again after exit code 75, at most `most` times; says each time that it does. Waits longer each time, from a second to a
// minute; after a lost connection until what it may have left behind has ended. `run` gets the seconds since the first start. Returns the
// last exit code.
int with_restarts(int64_t most, const std::function<Ended(double elapsed_seconds)>& run);

}  // namespace uly::launch
