// Random initialisation of weights.
#pragma once

#include <cstdint>

#include "models/spec.h"

namespace uly::checkpoint {

// Fills `out` with the initial values of elements [first_element, first_element + count) of `unit`'s flat buffer: norms
// one, biases zero, matrices N(0, initializer_range), alignment gaps zero, the padding token's embedding zero. A value
// depends on `seed`, `unit_index` and the element's index alone, not on how the buffer is sharded.
//
// Source      Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): Philox 4x32-10
void fill_initial(const models::Spec& spec, const models::Unit& unit, uint64_t seed, int64_t unit_index, int64_t first_element, int64_t count, float* out);

}  // namespace uly::checkpoint
