// The search for the program that takes least time among those that fit: what is kept of each layer and in which tier, where
// optimizer, gradients and weights lie between their uses, and where updates are computed. Every candidate is priced by reading
// its program; nothing is estimated beside it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "plan/price.h"
#include "plan/rates.h"
#include "step/decoder.h"

namespace uly::plan {

// What one rank may use; of a tier that there is not, 0.
struct Room {
  int64_t device_bytes = 0;  // 0: not known, everything fits
  int64_t host_bytes = 0, disk_bytes = 0;

  int64_t of(ops::Tier tier) const { return tier == ops::Tier::kDevice ? device_bytes : tier == ops::Tier::kHost ? host_bytes : disk_bytes; }
};

struct Question {
  Room room;
  Rates rates;
  int64_t besides_bytes = 0;       // on the device, beside the program's
  bool cuda = false;
  int64_t micro_batches = 1;       // of a step
};

// One answer to where things lie, and what it costs on the rank to which it costs most.
struct Candidate {
  std::string words;                               // "optimizer and gradients on the host, updated there; ..."
  step::Options options;
  std::array<int64_t, ops::kNumTiers> bytes{};     // alive at most
  double seconds = 0;                              // of a step
  bool fits = false;
};

struct Choice {
  Candidate best;                                  // the fastest that fits; else the one that lacks least of the device
  std::vector<Candidate> considered;               // the best of each way to place the states, in the order of the search
};

// Fills in keep and tiers of `options`, in which all else is set.
Choice choose_places(const step::Model& model, const step::Options& options, const Question& question);

// Whether anything fits at all: with the least kept.
bool can_fit(const step::Model& model, const step::Options& options, const Question& question);

// The ranks of a sequence to which a step may cost different amounts: others have as many heads, in groups that begin alike.
std::vector<step::Options> unlike_ranks(const models::Spec& spec, const step::Options& options);

// Reads the programs of a step of one micro-batch, and its update, where that waits for the next step.
Priced read_step(const step::Model& model, const step::Options& options, const Rates& rates = {});

// The largest n <= most for which fits(n) holds, as it does for all below; 0 if for none.
template <typename Fits>
int64_t largest(int64_t most, Fits&& fits) {
  int64_t low = 0, high = most;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (fits(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

}  // namespace uly::plan
