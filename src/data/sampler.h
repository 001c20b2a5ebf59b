// Which samples each replica trains on in which optimizer step: a function of (seed, epoch) alone.
#pragma once

#include <cstdint>
#include <vector>

namespace uly::data {

// A permutation of 0 .. n-1 that depends on nothing but its arguments.
std::vector<int64_t> permutation(int64_t n, uint64_t seed, uint64_t epoch);

class Sampler {
 public:
  struct Rules {
    int64_t replicas = 1, micro_batch_size = 1, accumulation_steps = 1;
    uint64_t seed = 42;
    bool first_batch_only = false;  // overfit_first_batch
  };
  // `samples`: indices into the token file; a sample may occur several times.
  Sampler(std::vector<int64_t> samples, const Rules& rules) : samples_(std::move(samples)), rules_(rules) {}

  // Optimizer steps of one epoch; the last may be partial.
  int64_t steps_per_epoch() const;

  // Samples of every micro-batch of one optimizer step: [micro-batch][replica][sample]. All replicas have the same number
  // of micro-batches; where samples have run out, a replica's is empty.
  using Window = std::vector<std::vector<std::vector<int64_t>>>;
  Window window(int64_t epoch, int64_t step_in_epoch);

 private:
  std::vector<int64_t> samples_;
  Rules rules_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;
};

}  // namespace uly::data
