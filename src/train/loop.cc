// The loop: data -> micro-batches -> update -> metrics -> checkpoint.
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <set>
#include <utility>

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
  // Runs one optimizer step; false if the epoch gave no micro-batch.
  void step(int64_t epoch, int64_t step_in_epoch);
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
  std::set<std::string> saved_;  // folders
  Clock::time_point last_end_ = Clock::now();
};

data::Sampler Loop::make_sampler() const {
  data::Selection selection = data::select(s_.tokens(), s_.plan().max_length, r_.data.filter_samples, r_.where("data.max_length"));
  std::vector<int64_t> samples = selection.samples;
  const int64_t wanted = r_.min_iterations * r_.micro_batch_size * r_.gradient_accumulation_steps * s_.mesh().R();
  while (static_cast<int64_t>(samples.size()) < wanted) samples.push_back(selection.samples[samples.size() % selection.samples.size()]);
  return data::Sampler(std::move(samples), {.replicas = s_.mesh().R(),
                                            .micro_batch_size = r_.micro_batch_size,
                                            .accumulation_steps = r_.gradient_accumulation_steps,
                                            .seed = static_cast<uint64_t>(r_.data.seed),
                                            .first_batch_only = r_.overfit_first_batch});
}

// The scale of each micro-batch's loss, by the trained tokens of all: [micro-batch][replica].
std::vector<std::vector<double>> scales(const data::TokenFile& tokens, const data::Sampler::Window& window, recipe::LossReduction reduction) {
  std::vector<std::vector<int64_t>> trained;
  int64_t total = 0, with_any = 0;
  for (const auto& replicas : window) {
    auto& row = trained.emplace_back();
    for (const auto& samples : replicas) {
      int64_t n = 0;
      for (const int64_t i : samples) n += tokens.count_trained(i);
      row.push_back(n);
      total += n;
      with_any += n > 0;
    }
  }
  std::vector<std::vector<double>> out;
  for (const auto& row : trained) {
    auto& scale = out.emplace_back();
    for (const int64_t n : row) {
      if (reduction == recipe::LossReduction::kToken)
        scale.push_back(total > 0 ? 1.0 / static_cast<double>(total) : 0.0);
      else
        scale.push_back(n > 0 ? 1.0 / (static_cast<double>(with_any) * static_cast<double>(n)) : 0.0);
    }
  }
  return out;
}

void Loop::check_finite(double loss, double norm) {
  if (std::isfinite(loss) && std::isfinite(norm)) return;
  const std::string unit = s_.where_not_finite();
  throw NumericsError(fmt::format("step {}: loss is {}, gradient norm is {}{}; the step was not applied", steps_ + 1, loss, norm, unit.empty() ? "" : ", first in " + unit));
}

void Loop::step(int64_t epoch, int64_t step_in_epoch) {
  const Clock::time_point begin = Clock::now();
  const step::Mesh& mesh = s_.mesh();
  const data::Sampler::Window window = sampler_.window(epoch, step_in_epoch);
  const auto scale = scales(s_.tokens(), window, r_.loss_reduction);
  StepFigures f;
  s_.begin();
  for (size_t micro = 0; micro < window.size(); ++micro) {
    const size_t mine = static_cast<size_t>(mesh.replica());
    for (const auto& samples : window[micro])
      for (const int64_t i : samples) {
        const double n = static_cast<double>(s_.tokens().length(i));
        f.tokens += s_.tokens().length(i);
        f.trained_tokens += s_.tokens().count_trained(i);
        f.sum_squared_lengths += n * n;
      }
    int64_t tokens = 0;
    for (const int64_t i : window[micro][mine]) tokens += s_.tokens().length(i);
    const int64_t S = plan::padded_length(r_, s_.plan().max_length, mesh.P, tokens);
    s_.micro_step(data::make_batch(s_.tokens(), window[micro][mine], S, mesh.P, mesh.p()), scale[micro][mine], micro + 1 == window.size());
  }
  s_.finish_gradients();
  if (!job_.dump_folder.empty()) dump_gradients(s_, job_.dump_folder, steps_ + 1, s_.loss());
  f.learning_rate = recipe::learning_rate(r_.scheduler, r_.optimizer.learning_rate, steps_, s_.plan().horizon);
  s_.update(f.learning_rate, steps_ + 1);
  // Only now are figures read: until here nothing has waited for a GPU. Where they are not finite the update did nothing.
  const double loss = s_.loss(), norm = std::sqrt(s_.squared_norm());
  check_finite(loss, norm);
  ++steps_;

  f.iter = steps_;
  f.epoch = static_cast<double>(epoch) + static_cast<double>(step_in_epoch + 1) / static_cast<double>(s_.plan().steps_per_epoch);
  f.loss = loss;
  f.grad_norm = norm;
  f.seqlen = static_cast<double>(f.tokens) / static_cast<double>(window.size() * static_cast<size_t>(mesh.R()));
  f.step_seconds = seconds_since(begin);
  f.iter_seconds = seconds_since(last_end_);
  last_end_ = Clock::now();
  metrics_.step(f);
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
  bool stopped = false;
  int64_t epoch = 0;
  for (; steps_ < plan.num_steps && !stopped; ++epoch) {
    for (int64_t i = 0; i < plan.steps_per_epoch && steps_ < plan.num_steps; ++i) {
      if (stop_asked()) {
        if (s_.first()) say("{} exists: stopping after step {}", r_.kill_switch_path, steps_);
        stopped = true;
        break;
      }
      const bool profiled = s_.first() && !job_.profile.empty() && steps_ == std::min(plan.num_steps, kProfiledStep) - 1;
      if (profiled) engine::start_profile(job_.cuda);
      {
        RECORD_USER_SCOPE(fmt::format("step {}", steps_ + 1));
        step(epoch, i);
      }
      if (profiled) {
        engine::stop_profile(job_.profile);
        say("trace of step {}: {}", steps_, job_.profile);
      }
      const bool epoch_ended = i + 1 == plan.steps_per_epoch;
      maybe_save(epoch + 1, epoch_ended, false);
    }
  }
  maybe_save(epoch, false, true);
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
  const int64_t away = s.engine().held_bytes()[static_cast<size_t>(ops::Tier::kHost)];
  say("memory: {} at most = {} program and libraries + {} between steps + {} within one ({} priced){} + {} that libraries allocated", format_bytes(peak), format_bytes(before), format_bytes(priced), format_bytes(used),
      format_bytes(s.plan().price.step_places.of(ops::Tier::kDevice)), away > 0 ? fmt::format(" + {} of memory.host", format_bytes(away)) : "", format_bytes(std::max<int64_t>(0, peak - before - priced - used - away)));
}

// How the plan's tiers turned out on this machine.
void say_tiers(Session& s) {
  if (!s.first()) return;
  const char* subject = "tiers";
  for (const std::string& words : s.engine().tier_words()) say("{:<10} {}", std::exchange(subject, ""), words);
}

}  // namespace

int run(const Job& job, comm::World& world) {
  const c10::InferenceMode no_autograd;
  const int64_t before = memory::resident_bytes();
  Session session(job, world);
  if (session.first())
    for (const plan::Line& line : session.plan().lines) say("{:<10} {}", line.subject, line.text);
  say_tiers(session);
  Loop loop(session, job);
  loop.run();
  session.engine().finish();
  say_memory(session, before, job.cuda);
  world.all().barrier();
  return static_cast<int>(Exit::kDone);
}

int run(const Job& job) {
  comm::World world = comm::World::join(comm::rendezvous_from_environment());
  return run(job, world);
}

}  // namespace uly::train
