// What a program of one rank depends on: the place of the rank, the shapes, and what the plan chose.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"
#include "models/spec.h"
#include "ops/ops.h"

namespace uly::step {

// W = R * P ranks; P consecutive ranks share one sequence, R replicas take different ones.
struct Mesh {
  int64_t W = 1, P = 1, rank = 0;
  int64_t R() const { return W / P; }
  int64_t p() const { return rank % P; }
  int64_t replica() const { return rank / P; }
};

// What is kept of a layer for its backward; the rest is rebuilt by GEMMs, attention is never repeated.
enum class Keep : uint8_t {
  kInput,        // the layer's input, attention output and log-sum-exp
  kProjections,  // and q, k, v as attention saw them, and the input of the MLP
  kGateUp,       // and gate and up: no GEMM is repeated
  kEverything,   // and the normed inputs and the MLP's activation: nothing is computed twice
};

struct Options {
  Mesh mesh;
  Dtype dtype = Dtype::kBf16;      // weights and activations
  Dtype wire = Dtype::kF32;        // gradients between ranks
  bool optimizer = true;           // false: states without master and moments, for measuring forward and backward
  bool split_master = false;       // master weights as the bf16 weight and the 16 bits it lacks
  bool exchange = true;            // false: attention stays inside each rank's shard
  int64_t s = 0;                   // tokens of each rank's shard
  int64_t mlp_tile = 0, loss_tile = 0;
  ops::AttentionSchedule attention;
  std::vector<Keep> keep;          // one a layer

  // Ranks over which attention's heads are spread.
  int64_t exchange_ranks() const { return exchange ? mesh.P : 1; }
  int64_t S() const { return s * exchange_ranks(); }
};

}  // namespace uly::step
