// A job on several machines: one leads, over ssh; on each a `ulysses` follows, which runs that machine's ranks.
//
// The leader starts `ulysses follow` on each machine, with nothing secret on its command line, and speaks to it through stdin: a line of
// JSON with the job, "go" when all are ready, "signal N", and a sign of life every other second. When these end, because the leader, the
// connection or the machine between them has, the follower ends its ranks: none is left behind. What followers say is passed on; what
// one says of its end is held back until it is known who failed first. Their lines of control begin with kControl.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "launch/exports.h"
#include "launch/hostfile.h"
#include "launch/restart.h"

namespace uly::launch {

inline constexpr char kControl = '\x1e';

// A follower's end of its leader.
class Leash {
 public:
  // Says `facts` of this machine.
  explicit Leash(const Json& facts);
  // The leader's JSON. From its coming on a leader that is gone ends this process and its ranks. Throws DeviceError where none comes.
  Json job();
  // Says that all is prepared here, and returns when it is everywhere.
  void wait_for_go();
  // Says how the ranks ended.
  void ended(int code, bool killed);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// This machine's part of the job.
struct Node {
  int64_t index = 0;
  std::vector<Host> hosts;  // of the whole job; ranks are numbered by host, then slot
  std::string master_address;
  int master_port = 0;
  std::shared_ptr<Leash> leash;  // null: nobody leads, the same command is started on each machine

  int64_t local() const { return static_cast<int64_t>(hosts[static_cast<size_t>(index)].slots.size()); }
  int64_t first_rank() const;
  int64_t world() const;
};

struct Lead {
  std::vector<Host> hosts;
  std::vector<std::string> arguments;  // what each machine's ulysses is to run: verb, recipe, options
  std::string master_address;          // "": the first that the first host says of itself
  int master_port = 0;                 // 0: a free one there
  int ssh_port = 0;                    // 0: ssh's own choice
  bool saves = false;                  // asked to stop, ranks save and end with 85; before there are any, the job ends with it too
  std::function<std::string()> why_to_stop;  // looked at until ranks run, besides signals; "" to go on
  // Given what each follower said of its machine, in the order of hosts. Adds to the arguments; throws what cannot be.
  std::function<std::vector<std::string>(const std::vector<Json>&)> agree;
};

// Runs the job to its end and returns the exit code of the machine that failed first, or 0.
Ended lead(const Lead& job);

// What tells two builds apart: the version and a digest of the engine's program.
std::string build_of(const std::string& version, const std::string& engine);

// What a follower says of its machine: {"version", "engine", "addresses", "port", ...} and `more`.
Json facts_of_machine(const std::string& version, const Json& more);

// The follower's side: says `facts`, waits for the job, enters its folder and takes its variables.
struct Followed {
  Node node;
  std::vector<std::string> arguments;
};
Followed follow(const Json& facts);

// Lines of who failed and why, on stderr. Where this process is led the leader holds them back until it knows which machine was first.
void tell_of_end(const std::string& lines, bool led);

}  // namespace uly::launch
