// The machines of a job, and that they are about to train the same: each may have its own copy of data and weights.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

#include "comm/world.h"
#include "plan/plan.h"

namespace uly::train {

// On each machine one rank speaks for what lies in its file systems: the first.
class Machines {
 public:
  // Collective.
  explicit Machines(comm::World& world);

  bool several() const { return several_; }
  bool speaks() const { return speaks_; }
  std::string words(size_t rank) const { return fmt::format("rank {} on {}", rank, names_[rank]); }
  const std::string& name(size_t rank) const { return names_[rank]; }

  // What `mine` gives on each rank that speaks; "" of the others. It is called where there are several machines only: else nothing is
  // returned. Collective.
  template <typename F>
  std::vector<std::string> ask(F&& mine) {
    if (!several_) return {};
    return world_.all().exchange(speaks_ ? mine() : "");
  }
  // The first rank whose answer is not that of rank 0; -1 where there is none.
  static int64_t first_other(const std::vector<std::string>& answers);

 private:
  comm::World& world_;
  std::vector<std::string> names_;  // by rank
  bool several_ = false, speaks_ = false;
};

// Throws UserError on all ranks where a machine's tokens are not those of rank 0's. Samples of them are compared, and all where the files are
// made of other sources and look the same. Collective.
void compare_data(Machines& machines, const plan::Plan& plan);

}  // namespace uly::train
