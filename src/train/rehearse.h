// A rehearsal: the recipe's step at its planned length with real buffers, copies and collectives, but no data, no weights and no
// arithmetic of linear maps and attention beyond their first tile. What it took is held against what the plan had said.
#pragma once

#include "train/train.h"

namespace uly::train {

// Joins the ranks named by the environment and rehearses; rank 0 says on stdout what all have found. Writes no file. Returns the
// process's exit code; throws Error.
int rehearse(const Job& job);

// The same, as one rank of a world that has been joined; returns what rank 0 prints, "" on the others.
std::string rehearse(const Job& job, comm::World& world);

}  // namespace uly::train
