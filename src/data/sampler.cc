#include "data/sampler.h"

#include <algorithm>
#include <numeric>

#include "base/shapes.h"

namespace uly::data {
namespace {

// splitmix64 (Steele, Lea, Flood 2014): one step of a counter-based generator.
uint64_t mix(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

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

int64_t Sampler::steps_per_epoch() const {
  const int64_t micro_batches = ceil_div(static_cast<int64_t>(samples_.size()), rules_.micro_batch_size * rules_.replicas);
  return ceil_div(micro_batches, rules_.accumulation_steps);
}

Sampler::Window Sampler::window(int64_t epoch, int64_t step_in_epoch) {
  if (epoch != epoch_) {
    order_ = permutation(static_cast<int64_t>(samples_.size()), rules_.seed, static_cast<uint64_t>(epoch));
    epoch_ = epoch;
  }
  const int64_t n = static_cast<int64_t>(order_.size()), per_row = rules_.micro_batch_size * rules_.replicas;
  const int64_t rows = ceil_div(n, per_row), first = step_in_epoch * rules_.accumulation_steps;
  Window window;
  for (int64_t row = first; row < std::min(first + rules_.accumulation_steps, rows); ++row) {
    const int64_t source = rules_.first_batch_only ? row - first : row;
    auto& replicas = window.emplace_back(static_cast<size_t>(rules_.replicas));
    for (int64_t r = 0; r < rules_.replicas; ++r) {
      const int64_t at = source * per_row + r * rules_.micro_batch_size;
      for (int64_t i = at; i < std::min(at + rules_.micro_batch_size, n); ++i) replicas[static_cast<size_t>(r)].push_back(samples_[static_cast<size_t>(order_[static_cast<size_t>(i)])]);
    }
  }
  return window;
}

}  // namespace uly::data
