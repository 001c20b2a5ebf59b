// What a program of one rank depends on: the place of the rank, the shapes, and what the plan chose.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "models/spec.h"
#include "ops/ops.h"

namespace uly::step {

// W = R * P ranks; P consecutive ranks share one sequence, R replicas take different ones. `node` consecutive ranks share a second
// copy of the weights, from which they gather but for the first time after an update; 1: there is none.
struct Mesh {
  int64_t W = 1, P = 1, rank = 0, node = 1;
  int64_t R() const { return W / P; }
  int64_t p() const { return rank % P; }
  int64_t replica() const { return rank / P; }
};

// What is kept of a layer for its backward besides its input, attention output and log-sum-exp; the rest is rebuilt by GEMMs.
enum class Keep : uint8_t {
  kInput,        // nothing
  kProjections,  // and q, k, v as attention saw them, and the input of the MLP
  kGateUp,       // and gate and up: no GEMM is repeated
  kEverything,   // and the normed inputs and the MLP's activation: nothing is computed twice
};

// What is kept of one layer, and in which tier it waits for backward.
struct LayerKeep {
  Keep level = Keep::kInput;
  bool input = true;   // false: rebuilt from the nearest layer before whose input is kept; level is kInput then
  bool output = true;  // attention's output and log-sum-exp; false: attention is computed again; level is kInput then
  ops::Tier input_tier = ops::Tier::kDevice, output_tier = ops::Tier::kDevice, projections_tier = ops::Tier::kDevice, gate_up_tier = ops::Tier::kDevice;

  bool operator==(const LayerKeep&) const = default;
};

// In which tier a unit's parts lie between their uses. An update on the host wants optimizer and gradient there; one on the
// device streams them through it.
struct UnitTiers {
  ops::Tier weight = ops::Tier::kDevice, optimizer = ops::Tier::kDevice, gradient = ops::Tier::kDevice;
  bool update_on_host = false;

  bool operator==(const UnitTiers&) const = default;
};

struct Options {
  Mesh mesh;
  Dtype dtype = Dtype::kBf16;      // weights and activations
  Dtype wire = Dtype::kF32;        // gradients between ranks
  bool optimizer = true;           // false: states without master and moments, for measuring forward and backward
  bool split_master = false;       // master weights as the bf16 weight and the 16 bits it lacks
  bool exchange = true;            // false: attention stays inside each rank's shard
  int64_t exchange_parts = 1;      // in so many a rank's heads are exchanged, one under the attention of another; fewer where it has fewer key-value heads
  int64_t s = 0;                   // tokens of each rank's shard
  int64_t mlp_tile = 0, loss_tile = 0;
  ops::AttentionSchedule attention;
  std::vector<LayerKeep> keep;     // one a layer
  bool lean = false;               // through attention's backward, what it does not read waits on the host or is rebuilt
  ops::Tier rebuilt_tier = ops::Tier::kDevice;  // where inputs and outputs that have been rebuilt wait for their layer's backward
  int64_t rebuilt_inputs = 1;      // layers' inputs that are rebuilt at once; more wanted are rebuilt by halves
  std::vector<UnitTiers> tiers;    // one a unit; none: all on the device
  int64_t update_piece = int64_t{1} << 27;  // elements of a unit that are streamed through the device at once

  // Ranks over which attention's heads are spread.
  int64_t exchange_ranks() const { return exchange ? mesh.P : 1; }
  int64_t S() const { return s * exchange_ranks(); }
  UnitTiers tiers_of(size_t unit) const { return tiers.empty() ? UnitTiers{} : tiers[unit]; }
  // Whether updates wait for the next step's forward, to run under it.
  bool defers_updates() const {
    return std::any_of(tiers.begin(), tiers.end(), [](const UnitTiers& t) { return t.optimizer != ops::Tier::kDevice; });
  }
};

}  // namespace uly::step
