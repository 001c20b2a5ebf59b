// What train, plan and prepare share: from a recipe to a model, ranks and prepared data.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cli/verbs.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "models/spec.h"
#include "plan/plan.h"
#include "recipe/recipe.h"

namespace uly::cli {

// Why GPUs are not used, in the parts of a sentence: `option` begins it where the user asked for them, `advice` ends it.
struct Obstacle {
  std::string option;  // "--device cuda: "
  std::string fact;    // "GPU 0 (Tesla V100-SXM2-16GB) is sm_70"
  std::string advice;  // ": expected sm_80 or newer; use --device cpu or another GPU"
  std::string sentence() const { return option + fact + advice; }
};

// Where a job runs.
struct Ranks {
  bool cuda = false;
  bool chosen = false;               // by the user
  std::optional<Obstacle> obstacle;  // to cuda on this machine; not looked for where the user chose the CPU
  launch::Gpus gpus;
  int64_t world = 1;
  std::optional<launch::Place> place;  // this process is one rank of a job that somebody else started
  std::optional<launch::Node> node;    // this machine is one of several

  int64_t here() const { return place ? place->local_world_size : node ? node->local() : world; }  // ranks on this machine
  bool speaks() const { return place ? place->rank == 0 : !node || node->index == 0; }             // for the whole job
};

// Decides device and number of ranks: --num_gpus, else the job's that this process belongs to (`join`), else
// sequence_parallel_size. The device is --device, else cuda unless there is an obstacle. Throws UserError for a device
// that is not known and for a world that no whole number of sequences fits.
Ranks choose_ranks(const Options& options, const recipe::Recipe& recipe, bool join);

// What keeps the first `needed` ranks of this machine from its GPUs, first what is there, then what it can do. Where NVML
// is missing that is not known, which keeps from them only those who did not choose (`chosen`).
std::optional<Obstacle> find_obstacle(const launch::Gpus& gpus, int64_t needed, bool chosen);

// A recipe that no GPU can train.
std::optional<Obstacle> find_obstacle(const recipe::Recipe& recipe);

// "cuda (1 x NVIDIA H200, 139.8 GiB)", "cpu (no GPU is visible: this machine has none)".
std::string device_words(const Ranks& ranks);

// What the plan has to know of this machine.
plan::Machine machine_of(const Ranks& ranks);

// A recipe and the machine that it is planned for: this one, or one that the command line describes; then this one's GPUs are not
// asked for. `speaks`: tells why there are GPUs that are not used.
struct Planned {
  recipe::Recipe recipe;
  plan::Machine machine;
  int64_t world = 1;
};
Planned planned_for(const Options& options, bool speaks);

// What `plan --compare` prints: a plan for each combination of values.
int compare(const Options& options);

// What may be downloaded if it is not here.
enum class Fetch { kNothing, kConfiguration, kWeights };

// Finds the model: a folder, the hub's cache, the table of known shapes, and the hub as far as `fetch` says. Weights are
// not downloaded for a model that begins with random ones.
models::Spec find_model(const recipe::Recipe& recipe, Fetch fetch);

// What the engine is told to load: the model's folder, or its name where only the shape is known.
std::string model_place(const models::Spec& spec);

// Until ranks run, and between their runs, nothing is to be saved: from now on a signal that asks to stop ends this process with the code of
// a run that has saved. For recipes that save states. Where this process `is_rank` of a job that others have started, whose place is in the
// environment, it tells the other ranks first.
void take_signals(bool is_rank);

// Why kill_switch_path or exit_after ask to stop; "" to go on.
std::string why_to_stop(const recipe::Recipe& recipe, const Options& options);

// As long as it lives, kill_switch_path and exit_after end this process as a signal does; with 0 where the recipe saves no states, as its run ends then.
class EarlyStop {
 public:
  EarlyStop(const recipe::Recipe& recipe, const Options& options, const Ranks& ranks);
  ~EarlyStop();
  EarlyStop(const EarlyStop&) = delete;
  EarlyStop& operator=(const EarlyStop&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::thread thread_;
};

// What is wrong with the address at which ranks are to meet is said before anything is prepared. Throws UserError.
void check_meeting_place(const Ranks& ranks);

// Where machines are led over ssh, returns when all are ready.
void wait_for_machines(const Ranks& ranks);

// Where the tokenizer's files lie; empty: where the model's do, or not here.
std::string tokenizer_folder(const recipe::Recipe& recipe);

// The engine's program. Throws UserError where it is not there.
std::string engine_program();

// Where the options name other machines, runs the job there and returns its exit code; else fills in what they mean for this one: ranks,
// GPUs, its part of a job.
std::optional<int> launch_elsewhere(const std::string& verb, Options& options);

// Throws UserError where --max_restarts would have nothing to go on from.
void check_restarts(const Options& options, const recipe::Recipe& recipe);

// What a leading ulysses asks of this one.
launch::Followed follow();

// Runs `command` as every rank on this machine, or, in a job that somebody else has started, becomes the one rank that this process
// is. Starts them again after a failure, as often as --max_restarts says. Returns the exit code.
int run_ranks(const Options& options, const Ranks& ranks, const plan::Machine& machine, const std::vector<std::string>& command);

// Has the token files made, or found in the cache: of data.sources and, where there are any, of data.eval_sources.
plan::DataFacts prepare_data(const recipe::Recipe& recipe, const models::Spec& spec);

}  // namespace uly::cli
