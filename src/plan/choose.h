// The search for the program that takes least time among those that fit: what is kept of each layer and in which tier, where
// optimizer, gradients and weights lie between their uses, and where updates are computed. Every candidate is priced by reading
// its program; nothing is estimated beside it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
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

using Bytes = std::array<int64_t, ops::kNumTiers>;

struct Question {
  Room room;
  Rates rates;
  int64_t besides_bytes = 0;       // on the device, beside the program's
  bool cuda = false;
  int64_t micro_batches = 1;       // of a step
  bool thorough = false;           // every way to place the states is searched to its end, for Choice::considered
};

// One answer to where things lie, and what it costs on the rank to which it costs most.
struct Candidate {
  std::string words;                               // "optimizer and gradients on the host, updated there"
  step::Options options;
  Bytes bytes{};                                   // alive at most
  double seconds = 0;                              // of a step
  double compute_seconds = 0, busiest_seconds = 0; // in which compute works; in which the busiest of the other streams does
  bool fits = false;
};

struct Choice {
  Candidate best;                                  // the fastest that fits; else one that does not
  Price price;                                     // of the best, with its places and times
  std::vector<Candidate> considered;               // with `thorough`: the best of each way to place the states, in the order of the search
  int64_t pricings = 0;                            // programs that were read for it
};

// Fills in keep and tiers of `options`, in which all else is set.
Choice choose_places(const step::Model& model, const step::Options& options, const Question& question);

// Something that fits, with the least kept. What fits at one length or room is tried first at the next.
struct FitTrial {
  size_t fitted = 0;
  bool least = false;  // and nothing has less on the device
  int64_t pricings = 0;
};
std::optional<Candidate> anything_that_fits(const step::Model& model, const step::Options& options, const Question& question, FitTrial& trial);

// The same with its places; where these have gaps that make it too much, what has least on the device, and by how much it is over.
struct PlacedCandidate {
  Candidate candidate;
  Price price;
  Bytes over{};
};
std::optional<PlacedCandidate> least_with_places(const step::Model& model, const step::Options& options, const Question& question, FitTrial& trial);

// What has least in a tier, whatever room there is, and fits into the others; nothing where these alone are too small.
std::optional<Candidate> with_least(const step::Model& model, const step::Options& options, const Question& question, ops::Tier tier, FitTrial& trial);

// On the rank to which it costs most, with places and times; and by how much that is more than there is room for.
Price price_with_places(const step::Model& model, const step::Options& options, const Rates& rates);
Bytes excess(const Price& price, const Question& question);

// What `options` cost as they are; whether they fit, gaps between buffers aside.
Candidate price_candidate(const step::Model& model, step::Options options, const Question& question);

// What of each tier the program may have alive at once.
Bytes limits(const Question& question);

// The ranks of a sequence to which a step may cost different amounts: others have as many heads, in groups alike.
std::vector<step::Options> unlike_ranks(const models::Spec& spec, const step::Options& options);

// Reads the programs of a step of one micro-batch, and its update, where that waits for the next step. `record`: see Priced.
Priced read_step(const step::Model& model, const step::Options& options, const Rates& rates = {}, bool record = false);
// A micro-batch of a step after its first: nothing is updated under it.
Priced read_another(const step::Model& model, const step::Options& options, const Rates& rates);

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
