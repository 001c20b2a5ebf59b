// What train, plan and prepare share: from a recipe to a model, ranks and prepared data.
#pragma once

#include <optional>
#include <string>

#include "cli/verbs.h"
#include "launch/environment.h"
#include "models/spec.h"
#include "plan/plan.h"
#include "recipe/recipe.h"

namespace uly::cli {

// Where a job runs.
struct Ranks {
  bool cuda = false;
  std::string why;  // "no GPU visible": why this device, where the user did not choose
  launch::Gpus gpus;
  int64_t world = 1;
  std::optional<launch::Place> place;  // this process is one rank of a job that somebody else started
};

// Decides device and number of ranks: --num_gpus, else the job's that this process belongs to (`join`), else
// sequence_parallel_size. Throws UserError for a device that is not known and for a world that no whole number of
// sequences fits.
Ranks choose_ranks(const Options& options, const recipe::Recipe& recipe, bool join);

// What may be downloaded if it is not here.
enum class Fetch { kNothing, kConfiguration, kWeights };

// Finds the model: a folder, the hub's cache, the table of known shapes, and the hub as far as `fetch` says. Weights are
// not downloaded for a model that begins with random ones.
models::Spec find_model(const recipe::Recipe& recipe, Fetch fetch);

// What the engine is told to load: the model's folder, or its name where only the shape is known.
std::string model_place(const models::Spec& spec);

// Where the tokenizer's files lie; empty: where the model's do, or not here.
std::string tokenizer_folder(const recipe::Recipe& recipe);

// Has the token file made, or found in the cache.
plan::DataFacts prepare_data(const recipe::Recipe& recipe, const models::Spec& spec);

}  // namespace uly::cli
