// The programs of a training step: one micro-batch forward and backward, the gradient's norm, the update.
#pragma once

#include "step/block.h"
#include "step/options.h"
#include "step/zero.h"

namespace uly::step {

// What every program of a rank is made from.
struct Model {
  models::Spec spec;
  std::vector<models::Unit> units;
  explicit Model(models::Spec s) : spec(std::move(s)), units(models::units(spec)) {}
};

// Empties the loss: before the first micro-batch of a step.
void begin(ops::Ops& ops, const States& states);

// Forward and backward of one micro-batch: adds to every gradient shard and to loss_total; the step's `first` writes the
// gradients, whatever they held.
void micro_step(ops::Ops& ops, const Model& model, const Options& options, const States& states, bool first);

// Sums loss and squared norm of the gradient over all ranks.
void finish_gradients(ops::Ops& ops, const Options& options, const States& states);

// Clips, updates weights and moments.
void update(ops::Ops& ops, const Model& model, const Options& options, const States& states);

// Pieces of a rank's shard of a unit by their rule for weight decay.
std::vector<ops::UpdateRange> update_ranges(const models::Unit& unit, const Mesh& mesh);

}  // namespace uly::step
