// Where the n-th buffer that a program makes lies in the arena of its life: found by pricing the program, used to run it.
#pragma once

#include <cstdint>
#include <vector>

namespace uly::ops {

inline constexpr int64_t kPlaceAlignment = 256;

struct Places {
  std::vector<int64_t> offset_bytes, bytes;
  int64_t arena_bytes = 0;
};

}  // namespace uly::ops
