// The legend of shape letters, used in names all over the engine. Capital = whole, small = my share, letters follow
// memory order: `q_sNH` is [my tokens, all heads, head size], row-major.
//
//   S s t  tokens: sequence | my shard | this tile      D  model width   F  MLP hidden   V  vocabulary
//   N n    query heads: all | mine                      K k  key-value heads             H  head size
//   P      ranks that share one sequence                R  replicas (groups of P)        W  world = P * R
//   L      layers
//
// A *shard* is where (one rank's share); a *tile* is when (the piece worked on now); a *tier* is a place for bytes.
#pragma once

#include <cstdint>

namespace uly {

// Returns a / b rounded up; b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns a rounded up to a multiple of b; b > 0.
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace uly
