// A job's ranks as processes on this machine: started, watched, ended together.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "launch/nodes.h"
#include "launch/restart.h"

namespace uly::launch {

struct LocalJob {
  std::vector<std::string> command;  // each rank runs it; its place is in its environment
  int64_t ranks = 1;
  int master_port = 0;                    // 0: a free one
  int64_t cores = 1;                      // shared among the ranks: OMP_NUM_THREADS, unless that is set
  std::chrono::milliseconds grace{5000};  // between SIGTERM and SIGKILL
  std::string log_folder;                 // a file rank_3.log of what each rank says, besides; "": none
  bool again = false;                     // not the first start: log files go on
  const Node* node = nullptr;             // of a job on several machines: `ranks` are those here
};

// Runs the ranks until all have ended and returns the exit code of the one that failed first, or 0; `lost` never.
//
// Rank 0 speaks to this process's stdout and stderr (with a log folder: through pipes, as the others do); lines of the others come to
// stderr after "[rank 3] ". From a line
// of theirs that begins with "error: " on, what they say is held back until it is known who failed first, so that one
// failure is told once.
//
// When a rank fails the others get SIGTERM, and SIGKILL after `grace`. A rank that a signal ended counts as a failed
// device: 75. SIGINT, SIGTERM and SIGHUP are passed on to the ranks, which may end as they see fit; a second one, from a
// second after it on, kills them at once, and the result is 128 + the signal, as it is if they die of it. If this process dies they die.
Ended run_local(const LocalJob& job);

// A TCP port that nobody listens at, at any of this machine's addresses.
int free_port();

// Where ranks are to meet has to have an address, and where this machine `serves` it one of its own. `said_by`: what has said `address`. A name
// may be new: it is looked up for some seconds. Throws UserError.
void check_meeting_place(const std::string& address, bool serves, const std::string& said_by);

}  // namespace uly::launch
