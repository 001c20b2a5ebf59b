#include "data/sampler.h"

#include <algorithm>
#include <numeric>

#include "base/shapes.h"
#include "data/random.h"

namespace uly::data {
namespace {

// Returns a number in [0, n) without bias (Lemire 2019).
uint64_t below(uint64_t& state, uint64_t n) {
  for (;;) {
    const unsigned __int128 product = static_cast<unsigned __int128>(mix(state)) * n;
    if (static_cast<uint64_t>(product) >= (0 - n) % n) return static_cast<uint64_t>(product >> 64);
  }
}

}  // namespace

std::vector<int64_t> permutation(int64_t n, uint64_t seed, uint64_t epoch) {
  uint64_t state = seed;
  state = mix(state) ^ epoch;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[static_cast<size_t>(i)], order[below(state, static_cast<uint64_t>(i) + 1)]);
  return order;
}

int64_t Sampler::count(int64_t consumed) const {
  const Position at = position(rules_.first_batch_only ? 0 : consumed);
  return std::min(rules_.samples_a_step(), epoch_size() - at.first);
}

int64_t Sampler::steps(int64_t consumed, int64_t samples_a_step) const {
  if (rules_.first_batch_only) return ceil_div(consumed, std::min(samples_a_step, epoch_size()));
  const Position at = position(consumed);
  return (at.epoch + 1) * ceil_div(epoch_size(), samples_a_step) - ceil_div(epoch_size() - at.first, samples_a_step);
}

Sampler::Window Sampler::window(int64_t consumed) {
  const Position at = position(rules_.first_batch_only ? 0 : consumed);
  if (at.epoch != epoch_) {
    order_ = permutation(epoch_size(), rules_.seed, static_cast<uint64_t>(at.epoch));
    epoch_ = at.epoch;
  }
  const int64_t end = at.first + count(consumed), per_row = rules_.micro_batch_size * rules_.replicas;
  Window window;
  for (int64_t row = at.first; row < end; row += per_row) {
    auto& replicas = window.emplace_back(static_cast<size_t>(rules_.replicas));
    for (int64_t i = row; i < std::min(row + per_row, end); ++i) replicas[static_cast<size_t>((i - row) / rules_.micro_batch_size)].push_back(order_[static_cast<size_t>(i)] % rules_.num_samples);
  }
  return window;
}

}  // namespace uly::data
