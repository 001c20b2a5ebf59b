// Being asked to stop: the step is finished, the state saved.
#pragma once

#include <string>

namespace uly::train {

// From now on SIGTERM, SIGINT and SIGUSR1 are noted instead of ending this process; a second one ends it at once. What comes within a
// second of the first is no second one: who ends a job may signal each process of it, and the launcher passes on what it gets.
void notice_signals();

// Lets these signals in: the launcher has blocked them until it is known what they mean.
void admit_signals();

// The signal that came, or 0.
int noticed_signal();

}  // namespace uly::train
