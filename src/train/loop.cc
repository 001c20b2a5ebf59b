// The loop: data -> micro-batches -> update -> metrics -> checkpoint.
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>

#include "base/check.h"
#include "base/log.h"
#include "base/shapes.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "engine/profile.h"
#include "data/sampler.h"
#include "memory/gauges.h"
#include "train/metrics.h"
#include "train/save.h"
#include "train/session.h"

namespace uly::train {
namespace {

constexpr int64_t kProfiledStep = 3;  // the first two allocate and build plans

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

class Loop {
 public:
  Loop(Session& session, const Job& job)
      : s_(session), job_(job), r_(session.recipe()), sampler_(make_sampler()), metrics_(r_, session.spec(), session.plan().num_steps, session.mesh().W, session.first()) {}

  void run();

 private:
  data::Sampler make_sampler() const;
  using Window = data::Sampler::Window;
  // Trained tokens of every micro-batch of a window: [micro-batch][replica], the same on all ranks.
  struct Trained {
    int64_t replicas = 1;
    std::vector<int64_t> counts;
    int64_t total() const { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }
    // Of a micro-batch's loss.
    double scale(int64_t micro, int64_t replica, recipe::LossReduction reduction) const;
  };
  // Each rank counts in its own shards. Collective.
  Trained count_trained(const plan::Packed& data, const Window& window) const;
  int64_t padded_length(const plan::Packed& data, const std::vector<int64_t>& packs) const;
  double epochs() const { return static_cast<double>(consumed_) / static_cast<double>(sampler_.epoch_size()); }

  void step();
  void maybe_evaluate();
  void check_finite(double loss, double norm);
  void maybe_save(int64_t finished_epochs, bool epoch_ended, bool ended);
  bool stop_asked();
  void check_targets();

  Session& s_;
  const Job& job_;
  const recipe::Recipe& r_;
  data::Sampler sampler_;
  Metrics metrics_;
  int64_t steps_ = 0;       // made so far
  int64_t consumed_ = 0;    // samples, over all ranks: what comes next follows from it
  std::set<std::string> saved_;  // folders
  Clock::time_point last_end_ = Clock::now();
};

data::Sampler Loop::make_sampler() const {
  return data::Sampler({.num_samples = s_.plan().train.packs->size(),
                        .replicas = s_.mesh().R(),
                        .micro_batch_size = r_.micro_batch_size,
                        .accumulation_steps = r_.gradient_accumulation_steps,
                        .min_steps = r_.min_iterations,
                        .seed = static_cast<uint64_t>(r_.data.seed),
                        .first_batch_only = r_.overfit_first_batch});
}

int64_t Loop::padded_length(const plan::Packed& data, const std::vector<int64_t>& packs) const {
  int64_t tokens = 0;
  for (const int64_t i : packs) tokens += data.packs->tokens(i);
  return plan::padded_length(r_, s_.plan().max_length, s_.mesh().P, tokens);
}

Loop::Trained Loop::count_trained(const plan::Packed& data, const Window& window) const {
  const step::Mesh& mesh = s_.mesh();
  const size_t R = static_cast<size_t>(mesh.R()), mine = static_cast<size_t>(mesh.replica());
  std::vector<int64_t> counts(window.size() * R);
  for (size_t micro = 0; micro < window.size(); ++micro) {
    const std::vector<int64_t>& packs = window[micro][mine];
    counts[micro * R + mine] = data::count_labels(*data.file, *data.packs, packs, padded_length(data, packs), mesh.P, mesh.p());
  }
  return {static_cast<int64_t>(R), mesh.W > 1 ? s_.world().all().sum(counts) : counts};
}

double Loop::Trained::scale(int64_t micro, int64_t replica, recipe::LossReduction reduction) const {
  const int64_t n = counts[static_cast<size_t>(micro * replicas + replica)];
  if (reduction == recipe::LossReduction::kToken) return total() > 0 ? 1.0 / static_cast<double>(total()) : 0.0;
  const int64_t with_any = std::count_if(counts.begin(), counts.end(), [](int64_t x) { return x > 0; });
  return n > 0 ? 1.0 / (static_cast<double>(with_any) * static_cast<double>(n)) : 0.0;
}

void Loop::check_finite(double loss, double norm) {
  if (std::isfinite(loss) && std::isfinite(norm)) return;
  const std::string unit = s_.where_not_finite();
  throw NumericsError(fmt::format("step {}: loss is {}, gradient norm is {}{}; the step was not applied", steps_ + 1, loss, norm, unit.empty() ? "" : ", first in " + unit));
}

void Loop::step() {
  const Clock::time_point begin = Clock::now();
  const step::Mesh& mesh = s_.mesh();
  const plan::Packed& data = s_.plan().train;
  const Window window = sampler_.window(consumed_);
  const Trained trained = count_trained(data, window);
  StepFigures f;
  f.trained_tokens = trained.total();
  for (const auto& replicas : window)
    for (const auto& packs : replicas)
      for (const int64_t i : packs) f.tokens += data.packs->tokens(i), f.sum_squared_lengths += data.packs->squared_lengths(i);
  s_.begin();
  for (size_t micro = 0; micro < window.size(); ++micro) {
    const std::vector<int64_t>& packs = window[micro][static_cast<size_t>(mesh.replica())];
    const double scale = trained.scale(static_cast<int64_t>(micro), mesh.replica(), r_.loss_reduction);
    s_.micro_step(data::make_batch(*data.file, *data.packs, packs, padded_length(data, packs), mesh.P, mesh.p()), scale, micro + 1 == window.size());
  }
  s_.finish_gradients();
  if (!job_.dump_folder.empty()) dump_gradients(s_, job_.dump_folder, steps_ + 1, s_.loss());
  f.learning_rate = recipe::learning_rate(r_.scheduler, r_.optimizer.learning_rate, steps_, s_.plan().horizon);
  s_.update(f.learning_rate, steps_ + 1);
  // Only now are figures read: until here nothing has waited for a GPU. Where they are not finite the update did nothing.
  const double loss = s_.loss(), norm = std::sqrt(s_.squared_norm());
  check_finite(loss, norm);
  ++steps_;
  consumed_ += sampler_.count(consumed_);

  f.iter = steps_;
  f.epoch = epochs();
  f.loss = loss;
  f.grad_norm = norm;
  f.seqlen = static_cast<double>(f.tokens) / static_cast<double>(window.size() * static_cast<size_t>(mesh.R()));
  f.step_seconds = seconds_since(begin);
  f.iter_seconds = seconds_since(last_end_);
  last_end_ = Clock::now();
  metrics_.step(f);
}

// Each trained token of the data to evaluate on counts once, whatever the ranks.
void Loop::maybe_evaluate() {
  const plan::Packed& data = s_.plan().eval;
  if (!data || steps_ % r_.eval_interval != 0) return;
  const Clock::time_point begin = Clock::now();
  const step::Mesh& mesh = s_.mesh();
  const data::Packs& all = *data.packs;
  const int64_t per_row = r_.micro_batch_size * mesh.R();
  // As one window of all its micro-batches.
  Window window;
  for (int64_t row = 0; row < all.size(); row += per_row) {
    auto& replicas = window.emplace_back(static_cast<size_t>(mesh.R()));
    for (int64_t i = row; i < std::min(row + per_row, all.size()); ++i) replicas[static_cast<size_t>((i - row) / r_.micro_batch_size)].push_back(i);
  }
  const Trained trained = count_trained(data, window);
  ULY_USER_CHECK(trained.total() > 0, "{}: no token to evaluate on is trained", r_.where(r_.data.eval_share > 0 ? "data.train_eval_split" : "data.eval_sources"));
  s_.begin_evaluation();
  for (const auto& replicas : window) {
    const std::vector<int64_t>& packs = replicas[static_cast<size_t>(mesh.replica())];
    s_.evaluate(data::make_batch(*data.file, all, packs, padded_length(data, packs), mesh.P, mesh.p()), 1.0 / static_cast<double>(trained.total()));
  }
  const double loss = s_.finish_evaluation();
  metrics_.evaluation({.iter = steps_, .epoch = epochs(), .loss = loss, .tokens = all.num_tokens, .trained_tokens = trained.total(), .seconds = seconds_since(begin)}, steps_ / r_.eval_interval % r_.eval_log_iter_interval == 0);
  last_end_ = Clock::now();
}

void Loop::maybe_save(int64_t finished_epochs, bool epoch_ended, bool ended) {
  for (const recipe::Checkpoint& c : r_.checkpoint) {
    if (!c.enabled || c.type != "huggingface" || steps_ == 0) continue;
    const bool by_step = c.save_every_n_steps > 0 && steps_ % c.save_every_n_steps == 0;
    const bool by_epoch = epoch_ended && c.save_every_n_epochs > 0 && finished_epochs % c.save_every_n_epochs == 0;
    if (!(ended ? c.save_end_of_training : by_step || by_epoch)) continue;
    const std::string folder = hub_folder(c, steps_);
    if (!saved_.insert(folder).second) continue;
    s_.flush();
    save_hub(s_, folder);
    if (s_.first()) say("saved {}", folder);
  }
}

// Asks whether the kill switch exists; rank 0 looks, all ranks agree.
bool Loop::stop_asked() {
  if (r_.kill_switch_path.empty()) return false;
  std::error_code error;
  const bool here = s_.first() && std::filesystem::exists(r_.kill_switch_path, error);
  return s_.world().all().max(here ? 1 : 0) > 0;
}

// Looks before the first step at where models will be saved, so that no finished run meets a folder that it must not touch
// or cannot write, or a full disk.
void Loop::check_targets() {
  on_first(s_.world(), [&] {
    for (const recipe::Checkpoint& c : r_.checkpoint) {
      const int64_t last = s_.plan().num_steps, every = c.save_every_n_steps > 0 ? c.save_every_n_steps : last;
      if (!c.enabled || c.type != "huggingface" || last < 1) continue;
      if (!c.save_end_of_training && c.save_every_n_steps == 0 && c.save_every_n_epochs == 0) continue;
      for (int64_t step = every; step < last; step += every) checkpoint::check_hub_target(s_.spec(), hub_folder(c, step));
      checkpoint::check_hub_target(s_.spec(), hub_folder(c, last));
      checkpoint::check_hub_room(s_.spec(), r_.model.dtype, c.output_dir);
    }
  });
}

void Loop::run() {
  const plan::Plan& plan = s_.plan();
  check_targets();
  while (steps_ < plan.num_steps) {
    if (stop_asked()) {
      if (s_.first()) say("{} exists: stopping after step {}", r_.kill_switch_path, steps_);
      break;
    }
    const bool profiled = s_.first() && !job_.profile.empty() && steps_ == std::min(plan.num_steps, kProfiledStep) - 1;
    if (profiled) engine::start_profile(job_.cuda);
    {
      RECORD_USER_SCOPE(fmt::format("step {}", steps_ + 1));
      step();
    }
    if (profiled) {
      engine::stop_profile(job_.profile);
      say("trace of step {}: {}", steps_, job_.profile);
    }
    maybe_evaluate();
    const data::Sampler::Position at = sampler_.position(consumed_);
    maybe_save(at.epoch, at.first == 0, false);
  }
  maybe_save(sampler_.position(consumed_).epoch, false, true);
}

// `before`: resident bytes before the arenas were made. What is left over is what ATen and Gloo have allocated.
void say_memory(Session& s, int64_t before, bool cuda) {
  if (!s.first()) return;
  if (cuda) {  // its memory is no part of what is resident here
    const plan::Plan& p = s.plan();
    say("memory: {} of the GPU, as priced = {} between steps + {} within one + {} for libraries", format_bytes(plan::total_bytes(p)), format_bytes(p.price.of(ops::Tier::kDevice).run_bytes), format_bytes(p.price.step_places.of(ops::Tier::kDevice)), format_bytes(p.besides_bytes));
    return;
  }
  const int64_t priced = s.plan().price.of(ops::Tier::kDevice).run_bytes, used = s.engine().peak_placed_bytes(), peak = memory::peak_resident_bytes();
  say("memory: {} at most = {} program and libraries + {} between steps + {} within one ({} priced) + {} that libraries allocated", format_bytes(peak), format_bytes(before), format_bytes(priced),
      format_bytes(used), format_bytes(s.plan().price.step_places.of(ops::Tier::kDevice)), format_bytes(std::max<int64_t>(0, peak - before - priced - used)));
}

}  // namespace

int run(const Job& job, comm::World& world) {
  const c10::InferenceMode no_autograd;
  const int64_t before = memory::resident_bytes();
  Session session(job, world);
  if (session.first())
    for (const plan::Line& line : session.plan().lines) say("{:<10} {}", line.subject, line.text);
  Loop loop(session, job);
  loop.run();
  say_memory(session, before, job.cuda);
  world.all().barrier();
  return static_cast<int>(Exit::kDone);
}

int run(const Job& job) {
  comm::World world = comm::World::join(comm::rendezvous_from_environment());
  return run(job, world);
}

}  // namespace uly::train
