// Where the n-th buffer that a program makes lies in the arena of its life: found by pricing the program, used to run it.
#pragma once

#include <cstdint>
#include <vector>

namespace uly::ops {

inline constexpr int64_t kPlaceAlignment = 256;

// What a GPU engine has besides its arenas: GEMMs' workspace, and scratch for kernels that sum over rows of up to so many
// columns (kernels/matrix.h: column_sum_scratch_bytes).
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kernel_scratch_bytes(int64_t columns) { return 4 * (columns <= 4096 ? 1056 * 1024 : 264 * columns) + 65536; }

struct Places {
  std::vector<int64_t> offset_bytes, bytes;
  int64_t arena_bytes = 0;
};

}  // namespace uly::ops
