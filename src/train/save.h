// Saving what was trained: a Hugging Face checkpoint, streamed a unit at a time.
#pragma once

#include <functional>
#include <string>

#include "train/session.h"

namespace uly::train {

// OUTPUT_DIR/global_step_N.
std::string save_folder(const recipe::Checkpoint& checkpoint, int64_t step);

// Writes a checkpoint into `folder`. Collective; rank 0 writes, all ranks learn of a failure.
void save_hub(Session& session, const std::string& folder);

// Writes FOLDER/step_N.safetensors: every gradient by its Hugging Face name (before clipping), the loss as metadata.
// Collective.
void dump_gradients(Session& session, const std::string& folder, int64_t step, double loss);

// Throws UserError on every rank if rank 0's `action` throws one, with its message; `action` runs on rank 0 only.
void on_first(comm::World& world, const std::function<void()>& action);

}  // namespace uly::train
