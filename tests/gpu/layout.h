// Buffers of a GPU engine under test, without a program that is priced; and bytes to fill them with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "base/shapes.h"
#include "engine/engine.h"

namespace uly::engine {

using ops::Buffer;
using ops::Life;
using ops::Tier;

using Bytes = std::vector<uint8_t>;

inline Bytes noise(int64_t bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes b(static_cast<size_t>(round_up(bytes, 8)));
  for (size_t i = 0; i < b.size(); i += 8) {
    const uint64_t x = random();
    std::copy_n(reinterpret_cast<const uint8_t*>(&x), 8, b.data() + i);
  }
  b.resize(static_cast<size_t>(bytes));
  return b;
}

// Places for buffers of one life, one after the other in their tiers.
class Layout {
 public:
  // A step's begin with its inputs, of which there are none here.
  explicit Layout(Life life) : life_(life) {
    if (life == Life::kStep)
      for (int i = 0; i < ops::kNumInputs; ++i) add({.tier = Tier::kDevice, .dtype = Dtype::kI64, .columns = 1, .rows = 0});
  }
  struct Item {
    Tier tier = Tier::kDevice;
    Dtype dtype = Dtype::kU8;
    int64_t columns = 0, rows = 1;
  };
  size_t add(const Item& item) {
    const int64_t bytes = item.rows * item.columns * bytes_of(item.dtype);
    int64_t& end = places_.arena_bytes[static_cast<size_t>(item.tier)];
    places_.offset_bytes.push_back(end), places_.bytes.push_back(bytes);
    end += round_up(bytes, ops::place_alignment(item.tier));
    items_.push_back(item);
    return items_.size() - 1;
  }
  const ops::Places& places() const { return places_; }
  // In the order in which they were added.
  std::vector<Buffer> make(Engine& engine) const {
    std::vector<Buffer> buffers;
    if (life_ == Life::kStep)
      for (int i = 0; i < ops::kNumInputs; ++i) buffers.push_back(engine.input(static_cast<ops::Input>(i)));
    for (size_t i = buffers.size(); i < items_.size(); ++i) buffers.push_back(engine.make(items_[i].rows, items_[i].columns, items_[i].dtype, ops::Kind::kSaved, "of a test", life_, items_[i].tier));
    return buffers;
  }

 private:
  Life life_;
  ops::Places places_;
  std::vector<Item> items_;
};

}  // namespace uly::engine
