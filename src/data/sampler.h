// Which samples (packs, where samples are packed) each replica trains on in which optimizer step: a function of seed and epoch alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/shapes.h"

namespace uly::data {

// A permutation of 0 .. n-1 that depends on nothing but its arguments.
std::vector<int64_t> permutation(int64_t n, uint64_t seed, uint64_t epoch);

// Where a run stands is the number of samples that all ranks together have consumed. What comes next is a function of it and of the
// rules; the order of samples has no part in how many ranks there are, so a run that goes on with others repeats none and skips none.
class Sampler {
 public:
  struct Rules {
    int64_t num_samples = 0;
    int64_t replicas = 1, micro_batch_size = 1, accumulation_steps = 1;
    int64_t min_steps = 0;          // samples come several times an epoch, until they are enough for so many steps
    uint64_t seed = 42;
    bool first_batch_only = false;  // overfit_first_batch: every step is the first

    int64_t samples_a_step() const { return replicas * micro_batch_size * accumulation_steps; }
  };
  explicit Sampler(const Rules& rules) : rules_(rules) {}

  int64_t epoch_size() const { return std::max(rules_.num_samples, rules_.min_steps * rules_.samples_a_step()); }
  struct Position {
    int64_t epoch = 0, first = 0;  // the epoch, and how many of its samples have been consumed
  };
  Position position(int64_t consumed) const { return {consumed / epoch_size(), consumed % epoch_size()}; }

  int64_t samples_a_step() const { return rules_.samples_a_step(); }
  // Steps of that many samples that have been made when no more are left to make of this epoch than its other samples take.
  int64_t steps(int64_t consumed, int64_t samples_a_step) const;

  // Samples of every micro-batch of the step that begins there: [micro-batch][replica][sample]. All replicas have the same number of
  // micro-batches; where samples have run out, a replica's is empty. An epoch's last step ends with it and may be smaller.
  using Window = std::vector<std::vector<std::vector<int64_t>>>;
  Window window(int64_t consumed);
  // Samples of that step, over all replicas: what `consumed` grows by.
  int64_t count(int64_t consumed) const;

 private:
  Rules rules_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;
};

}  // namespace uly::data
