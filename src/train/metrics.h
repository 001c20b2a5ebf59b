// What a run tells of each step: one JSON object a line in a file, one line on the terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "base/json.h"
#include "models/spec.h"
#include "recipe/recipe.h"

namespace uly::train {

struct StepFigures {
  int64_t iter = 0;             // optimizer steps made, this one included
  double epoch = 0;
  double loss = 0, learning_rate = 0, grad_norm = 0;
  double seqlen = 0;            // mean tokens of a micro-batch
  int64_t tokens = 0, trained_tokens = 0;  // of the whole step, over all replicas, without padding
  double sum_squared_lengths = 0;          // of its documents
  double step_seconds = 0;      // forward, backward, update
  double iter_seconds = 0;      // since the last step ended: loading, saving included
  std::string not_applied;      // why, where loss or norm are not finite
};

struct EvalFigures {
  int64_t iter = 0;             // optimizer steps made
  double epoch = 0;
  double loss = 0;              // mean over all trained tokens
  int64_t tokens = 0, trained_tokens = 0;
  double seconds = 0;
};

class Metrics {
 public:
  // Creates the file's folder, appends to the file, which is this run's alone as long as it lives: throws UserError where another has it. `total_steps` and `ranks` are for progress and per-rank figures.
  Metrics(const recipe::Recipe& recipe, const models::Spec& spec, int64_t total_steps, int64_t ranks, bool on);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // Takes back what a run has told of later steps, before it goes on from this one. Lines of runs before it stay.
  void forget_after(int64_t iter);
  // A run that begins: takes back what was told by an earlier start of the same run that left no state. `folder`, where its states will
  // be, remembers until `ended` where in the file it began.
  void begin_in(const std::string& folder);
  void ended(const std::string& folder);

  void step(const StepFigures& f);
  // `speaks`: on the terminal too, also where steps have no metrics.
  void evaluation(const EvalFigures& f, bool speaks);

  // To the disk: before a state is saved that counts these steps as told.
  void sync();
  // Writes what could not be written; throws UserError where that is so still.
  void finish();

 private:
  double teraflops(const StepFigures& f) const;
  void write(const Json& line);
  bool write_pending();  // whether all is written
  bool is_file() const;  // not a pipe or a device
  void follow_name();
  void keep(int64_t bytes);

  const models::Spec& spec_;
  int64_t total_steps_, ranks_;
  bool first_, on_;
  std::string path_;
  int fd_ = -1;
  std::string pending_;  // lines for which there was no room
  bool failing_ = false;
  std::chrono::steady_clock::time_point begin_;
  int64_t seen_ = 0;
};

}  // namespace uly::train
