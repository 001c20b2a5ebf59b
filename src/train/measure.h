// How fast this machine is at what a step does, each kind by itself, with the engine's own instructions: `ulysses doctor --measure`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"

namespace uly::train {

struct Measure {
  bool cuda = false;                 // the first GPU that is visible, else the CPU with all its cores
  std::vector<std::string> folders;  // whose disks are to be measured
  std::string attention;             // on a GPU: cudnn | flash
};

// Returns {"fp32": {...}, "bf16": {...}, "disks": {folder: bytes a second}} with the names of plan::Rates; says on stderr what it is
// doing. Takes under a minute. Throws UserError for a folder that cannot be used.
Json measure(const Measure& what);

}  // namespace uly::train
