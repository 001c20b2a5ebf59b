// What a rank holds for the length of a run: its place among the ranks, the plan, the engine and the states in it.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "checkpoint/run_lock.h"
#include "checkpoint/state.h"
#include "comm/world.h"
#include "data/batch.h"
#include "engine/make.h"
#include "plan/plan.h"
#include "recipe/recipe.h"
#include "step/decoder.h"
#include "train/machines.h"
#include "train/train.h"

namespace uly::train {

class Session {
 public:
  // Collective over the world: compares what every rank is about to do, and loads the weights; in a rehearsal all states are zero.
  Session(const Job& job, comm::World& world);

  // Before the first micro-batch of a step.
  void begin() {
    step::begin(*engine_, states_);
    first_micro_ = true;
  }
  // Forward and backward of one micro-batch. `scale` of the loss and its gradient.
  void micro_step(data::Batch batch, double scale, bool last);
  // Sums over all ranks; afterwards loss() and squared_norm() are those of the step.
  void finish_gradients();
  // Updates the weights, or lets the next step do so under its forward.
  void update(double learning_rate, int64_t step);
  // Gives up the update: its gradient is not finite, so that it would change nothing.
  void drop_update() { update_pending_ = false; }
  // Makes the update that is still to be made: before weights are read.
  void flush();

  // Forward of one micro-batch alone, of those that follow begin_evaluation(). `scale` of the loss.
  void begin_evaluation();
  void evaluate(data::Batch batch, double scale);
  // The sum of their losses over all ranks.
  double finish_evaluation();

  double loss() { return engine_->scalar(states_.loss_total); }
  double squared_norm() { return engine_->scalar(states_.norm_total); }
  // Where forward of one micro-batch alone is not finite first: the unit that puts it out (after the last: the loss of a token), and the token
  // within this rank's shard. Collective, but each rank sees its own tokens only.
  struct NotFinite {
    size_t unit = 0;
    int64_t token = 0;
  };
  std::optional<NotFinite> look_at_forward(data::Batch batch, double scale);
  // The unit whose gradient is not finite and that backward reached first, over all ranks; empty if there is none.
  std::string where_not_finite();

  bool first() const { return world_.rank() == 0; }
  comm::World& world() { return world_; }
  Machines& machines() { return machines_; }
  const recipe::Recipe& recipe() const { return recipe_; }
  const models::Spec& spec() const { return model_->spec; }
  const std::vector<models::Unit>& units() const { return model_->units; }
  const plan::Plan& plan() const { return plan_; }
  const step::Mesh& mesh() const { return mesh_; }
  const std::string& tokenizer_folder() const { return tokenizer_folder_; }
  engine::Engine& engine() { return *engine_; }
  const step::Model& model() const { return *model_; }
  const step::States& states() const { return states_; }
  const plan::Machine& machine() const { return machine_; }

  // Elements [at, at + count) of this rank's shard of a unit: its master weights in fp32, or a moment. When no update is pending.
  void read_state(size_t unit, checkpoint::Moment moment, int64_t at, int64_t count, float* out);
  void write_state(size_t unit, checkpoint::Moment moment, int64_t at, std::vector<float>& values);

  // The whole of a unit's weights (compute dtype) or gradients (fp32), as bytes. Collective.
  std::vector<uint8_t> gather_weights(size_t unit) { return gather(states_.units[unit].weight); }
  std::vector<uint8_t> gather_gradient(size_t unit) { return gather(states_.units[unit].gradient); }

 private:
  struct Program {
    step::Options options;
    ops::Places places;
  };
  enum class Phase { kStep, kStepAfterUpdate, kEvaluation };
  const Program& program_for(int64_t S, Phase phase);
  void load(const Program& program, data::Batch batch, double scale);
  const Program& update_program();
  void compare_ranks();
  void lock_folders();
  void agree();
  void load_weights();
  void empty_states();
  void make_engine(const Job& job, int64_t local_rank);
  void load_range(const step::UnitState& state, int64_t at, std::vector<float>& values);
  std::vector<uint8_t> gather(const ops::Buffer& shard);

  comm::World& world_;
  Machines machines_;
  recipe::Recipe recipe_;
  std::vector<checkpoint::RunLock> locks_;  // of the folders for states; of the first rank
  std::string tokenizer_folder_;
  std::unique_ptr<step::Model> model_;
  plan::Plan plan_;
  step::Mesh mesh_;
  std::unique_ptr<comm::Group> sequence_, node_;  // node_: where ranks share a second copy of the weights
  std::unique_ptr<engine::Engine> engine_;
  step::States states_;
  plan::Machine machine_;
  bool first_micro_ = true;     // the next micro-batch is its step's first
  bool update_pending_ = false;
  std::map<std::pair<int64_t, Phase>, Program> programs_;  // by padded length
  std::optional<Program> update_program_;
};

}  // namespace uly::train
