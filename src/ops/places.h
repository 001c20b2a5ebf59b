// Where the n-th buffer that a program makes lies in the arena of its life and tier: found by pricing the program, used to
// run it.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ops/buffer.h"

namespace uly::ops {

constexpr int64_t place_alignment(Tier tier) { return tier == Tier::kDevice ? 256 : 4096; }

// What a GPU engine has besides its arenas: GEMMs' workspace, and scratch for kernels that sum over rows of up to so many
// columns (kernels/matrix.h: column_sum_scratch_bytes).
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kernel_scratch_bytes(int64_t columns) { return 4 * (columns <= 4096 ? 1056 * 1024 : 264 * columns) + 65536; }

struct Places {
  std::vector<int64_t> offset_bytes, bytes;
  std::array<int64_t, kNumTiers> arena_bytes{};

  int64_t of(Tier tier) const { return arena_bytes[static_cast<size_t>(tier)]; }
};

}  // namespace uly::ops
