// The programs of a training step: one micro-batch forward and backward, the gradient's norm, the update.
#pragma once

#include <functional>

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

// Empties loss and norm: before the first micro-batch of a step.
void begin(ops::Ops& ops, const States& states);

// Forward and backward of one micro-batch: adds to every gradient shard and to loss_total.
void micro_step(ops::Ops& ops, const Model& model, const Options& options, const States& states, const Phase& phase);

// Forward of one micro-batch alone: adds to loss_total and keeps nothing. Updates that wait have been made before. Begin with begin(), end
// with finish_evaluation(). `look` sees what has a row for each of this rank's tokens as it comes to be: what each unit puts out, counted as
// in model.units, the last the loss of each token.
using Look = std::function<void(size_t unit, const ops::Buffer& output)>;
void evaluate(ops::Ops& ops, const Model& model, const Options& options, const States& states, const Look& look = nullptr);

// Sums the loss over all ranks.
void finish_evaluation(ops::Ops& ops, const Options& options, const States& states);

// Sums loss and squared norm of the gradient over all ranks; puts them where updates read them.
void finish_gradients(ops::Ops& ops, const Options& options, const States& states);

// Clips, updates weights and moments of all units, at once: where updates are not deferred, or before somebody reads them.
void update(ops::Ops& ops, const Model& model, const Options& options, const States& states);

}  // namespace uly::step
