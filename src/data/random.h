// Numbers that depend on nothing but their arguments: the same on every rank, machine and version of a library.
#pragma once

#include <cstdint>

namespace uly::data {

// splitmix64 (Steele, Lea, Flood 2014): one step of a counter-based generator.
inline uint64_t mix(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// A hash of two numbers.
inline uint64_t hash(uint64_t seed, uint64_t i) {
  uint64_t state = seed;
  state = mix(state) ^ i;
  mix(state);
  return mix(state);
}

}  // namespace uly::data
