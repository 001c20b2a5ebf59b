// Which machines a job runs on: a hostfile, and what is taken of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace uly::launch {

struct Host {
  std::string name;            // as ssh takes it
  std::vector<int64_t> slots;  // GPUs, by number; on the CPU just as many ranks
  bool operator==(const Host&) const = default;
};

// A line a host: `name slots=8` or `name: slots=8`; blank lines and what follows `#` count for nothing. Throws UserError naming
// file and line for a line of another form, a host named twice, or a file without hosts.
std::vector<Host> read_hostfile(const std::string& path);

// What the command line asks for. `include` and `exclude`: "host", "host:0,2", several joined by "@".
struct HostChoice {
  std::string include, exclude;
  int64_t num_nodes = 0;  // the first so many hosts; 0: all
  int64_t num_gpus = 0;   // the first so many slots of each; 0: all
  bool any() const { return !include.empty() || !exclude.empty() || num_nodes > 0 || num_gpus > 0; }
};

// In the hostfile's order; hosts without a slot left disappear. Throws UserError for hosts and slots that there are not, for choices
// that exclude each other, and where nothing is left.
std::vector<Host> choose_hosts(const std::vector<Host>& hosts, const HostChoice& choice);

// Whether this machine goes by that name or address.
bool is_this_machine(const std::string& host);

}  // namespace uly::launch
