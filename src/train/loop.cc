// The loop: data -> micro-batches -> update -> metrics -> checkpoint.
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <random>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/shapes.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "checkpoint/hub_files.h"
#include "engine/profile.h"
#include "data/sampler.h"
#include "memory/gauges.h"
#include "train/metrics.h"
#include "train/preempt.h"
#include "train/save.h"
#include "train/session.h"
#include "train/states.h"

namespace uly::train {
namespace {

constexpr int64_t kProfiledStep = 3;  // the first two allocate and build plans

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

using recipe::saves_on_the_way;
using recipe::saves_states;

class Loop {
 public:
  Loop(Session& session, const Job& job, Clock::time_point began)
      : s_(session), job_(job), r_(session.recipe()), began_(began), sampler_(make_sampler()), start_(resume_if_asked()), steps_(start_.steps), consumed_(start_.consumed), skipped_(start_.skipped), last_step_(plan::last_step(r_, s_.plan().horizon + more_steps_, start_.steps)), metrics_(r_, session.spec(), last_step_, session.mesh().W, session.first()), saver_(session) {}

  Exit run();

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
  Progress resume_if_asked();
  const std::string& fingerprint();
  void say_what_may_be_lost() const;
  std::string where_not_finite(const Window& window, const Trained& trained);
  std::string sample_words(const std::vector<int64_t>& packs, int64_t token) const;
  [[noreturn]] void stop_at_not_finite(const std::string& why);
  void maybe_save(int64_t finished_epochs, bool epoch_ended, bool ended);
  bool lacks_model(const recipe::Checkpoint& c);
  void save(const recipe::Checkpoint& c);
  std::string why_to_stop();
  void check_targets();
  void check_states_are_ours(const recipe::Checkpoint& c) const;
  void check_something_is_trained();
  void take_back_metrics();

  Session& s_;
  const Job& job_;
  const recipe::Recipe& r_;
  Clock::time_point began_;
  data::Sampler sampler_;
  std::string fingerprint_;  // of the data; read once, and where states are only
  std::string run_;          // what its states are known by, whatever starts it takes; "" where it goes on from one that has no such name
  int64_t more_steps_ = 0;  // made so far beyond what the samples consumed would take in steps of today's size
  Progress start_;          // of this run: 0, or what the state says that it goes on from
  int64_t steps_;           // made so far
  int64_t consumed_;        // samples, over all ranks: what comes next follows from it
  int64_t before_ = 0;      // the same at the last step's start
  int64_t skipped_;         // of the steps, not applied
  int64_t last_step_;       // after which this run ends
  Metrics metrics_;
  Saver saver_;
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

// The sample that has this token of a micro-batch: "sample 17 of chats.jsonl (token 3 of 40)".
std::string Loop::sample_words(const std::vector<int64_t>& packs, int64_t token) const {
  const plan::Packed& data = s_.plan().train;
  int64_t at = 0;
  for (const int64_t pack : packs)
    for (const data::Piece& piece : data.packs->pieces(pack)) {
      if (token < at + piece.count) return fmt::format("{} (token {} of {})", data.file->words(data.file->sample_at(piece.first)), token - at, piece.count);
      at += piece.count;
    }
  return "padding";
}

// Where it began, the same on all ranks: forward again, micro-batch by micro-batch, with the weights that the step had; where that is
// finite, backward. Collective.
std::string Loop::where_not_finite(const Window& window, const Trained& trained) {
  const step::Mesh& mesh = s_.mesh();
  const plan::Packed& data = s_.plan().train;
  const std::string gradient = s_.where_not_finite();
  const auto batch_of = [&](size_t micro) {
    const std::vector<int64_t>& packs = window[micro][static_cast<size_t>(mesh.replica())];
    return data::make_batch(*data.file, *data.packs, packs, padded_length(data, packs), mesh.P, mesh.p());
  };
  const auto scale_of = [&](size_t micro) { return trained.scale(static_cast<int64_t>(micro), mesh.replica(), r_.loss_reduction); };
  const auto micro_words = [&](size_t micro) { return window.size() > 1 ? fmt::format(", micro-batch {} of {}", micro + 1, window.size()) : ""; };
  const std::vector<models::Unit>& units = s_.units();
  for (size_t micro = 0; micro < window.size(); ++micro) {
    data::Batch batch = batch_of(micro);
    const int64_t shard = batch.S / mesh.P;
    const auto found = s_.look_at_forward(std::move(batch), scale_of(micro));
    Json mine = {{"unit", found ? found->unit : units.size()}};
    if (found) mine["sample"] = sample_words(window[micro][static_cast<size_t>(mesh.replica())], mesh.p() * shard + found->token);
    Json first;
    for (const std::string& one : s_.world().all().exchange(mine.dump()))
      if (const Json rank = Json::parse(one); first.is_null() || rank.at("unit") < first.at("unit")) first = rank;
    const size_t unit = first.at("unit");
    if (unit == units.size()) continue;
    return fmt::format(", first in {}, at {}{}", unit + 1 == units.size() ? "the loss" : "the output of " + units[unit].name, first.at("sample").get<std::string>(), micro_words(micro));
  }
  if (gradient.empty()) return "";
  for (size_t micro = 0; micro < window.size(); ++micro) {
    s_.begin();
    s_.micro_step(batch_of(micro), scale_of(micro), true);
    s_.finish_gradients();
    if (std::isfinite(s_.squared_norm())) continue;
    const std::vector<int64_t>& packs = window[micro][0];
    return fmt::format(", first in the gradient of {}, with {}{}", s_.where_not_finite(), packs.empty() ? "padding" : sample_words(packs, 0), micro_words(micro));
  }
  return fmt::format(", first in the gradient of {}", gradient);
}

// Weights and moments are those of the step before: they are saved as that, so that nothing is lost.
void Loop::stop_at_not_finite(const std::string& why) {
  --steps_, --skipped_;
  consumed_ = before_;
  if (steps_ > start_.steps)
    for (const recipe::Checkpoint& c : r_.checkpoint)
      if (c.enabled && c.type != "huggingface" && saves_states(r_)) save(c);
  saver_.finish();
  throw NumericsError(fmt::format("step {}: {}; the step was not applied{}", steps_ + 1, why, saver_.failures() > 0 ? "; saving failed, see above" : ""));
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
  f.learning_rate = recipe::learning_rate(r_.scheduler, r_.optimizer.learning_rate, steps_ - more_steps_, s_.plan().horizon);
  s_.update(f.learning_rate, steps_ + 1 - skipped_);
  // Only now are figures read: until here nothing has waited for a GPU. Where they are not finite the update did nothing.
  const double loss = s_.loss(), norm = std::sqrt(s_.squared_norm());
  if (!std::isfinite(loss) || !std::isfinite(norm)) {
    s_.drop_update();
    f.not_applied = fmt::format("loss is {}, gradient norm is {}{}", std::isnan(loss) ? "nan" : fmt::format("{}", loss), std::isnan(norm) ? "nan" : fmt::format("{}", norm), where_not_finite(window, trained));
    ++skipped_;
    if (s_.first() && r_.on_nan == "skip") say("step {}: {}; the step was not applied ({} so far)", steps_ + 1, f.not_applied, skipped_);
  }
  ++steps_;
  before_ = consumed_;
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
  if (!f.not_applied.empty() && r_.on_nan == "stop") stop_at_not_finite(f.not_applied);
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
  s_.begin_evaluation();
  for (const auto& replicas : window) {
    const std::vector<int64_t>& packs = replicas[static_cast<size_t>(mesh.replica())];
    s_.evaluate(data::make_batch(*data.file, all, packs, padded_length(data, packs), mesh.P, mesh.p()), 1.0 / static_cast<double>(trained.total()));
  }
  const double loss = s_.finish_evaluation();
  metrics_.evaluation({.iter = steps_, .epoch = epochs(), .loss = loss, .tokens = all.num_tokens, .trained_tokens = trained.total(), .seconds = seconds_since(begin)}, steps_ / r_.eval_interval % r_.eval_log_iter_interval == 0);
  last_end_ = Clock::now();
}

const std::string& Loop::fingerprint() {
  if (fingerprint_.empty()) fingerprint_ = s_.plan().train.file->fingerprint();
  return fingerprint_;
}

void Loop::maybe_save(int64_t finished_epochs, bool epoch_ended, bool ended) {
  for (const recipe::Checkpoint& c : r_.checkpoint) {
    if (!c.enabled || (steps_ == start_.steps && !(ended && lacks_model(c)))) continue;
    const bool by_step = c.save_every_n_steps > 0 && steps_ % c.save_every_n_steps == 0;
    const bool by_epoch = epoch_ended && c.save_every_n_epochs > 0 && finished_epochs % c.save_every_n_epochs == 0;
    if (!(ended ? c.save_end_of_training : by_step || by_epoch)) continue;
    save(c);
  }
}

// Whether a run that had ended before has not left the model that it should: it was removed, or is asked for only now. Collective.
bool Loop::lacks_model(const recipe::Checkpoint& c) {
  if (c.type != "huggingface" || !c.save_end_of_training || steps_ == 0) return false;
  std::error_code error;
  return s_.world().all().max(s_.first() && !std::filesystem::exists(save_folder(c, steps_), error) ? 1 : 0) > 0;
}

void Loop::save(const recipe::Checkpoint& c) {
  const std::string folder = save_folder(c, steps_);
  if (!saved_.insert(folder).second) return;
  metrics_.sync();
  if (c.type != "huggingface") return saver_.save(c, {.steps = steps_, .consumed = consumed_, .skipped = skipped_}, {{"run", run_}, {"samples", s_.plan().train.packs->size()}, {"data", fingerprint()}, {"epoch_size", sampler_.epoch_size()}, {"samples_a_step", sampler_.samples_a_step()}, {"schedule_step", steps_ - more_steps_}});
  s_.flush();
  try {
    save_hub(s_, folder);
  } catch (const UserError& e) {  // the same on all ranks
    return saver_.tell_failure(folder, e.what());
  }
  if (s_.first()) say("saved {}", folder);
}

// The state to go on from, where the recipe asks for one and there is one.
Progress Loop::resume_if_asked() {
  for (const recipe::Checkpoint& c : r_.checkpoint) {
    if (!c.enabled || !c.auto_resume) continue;
    const std::optional<Resumed> found = resume(s_, c, job_.restart_data);
    if (!found) continue;
    run_ = found->facts.value("run", "");
    const int64_t had = found->facts.value("samples", int64_t{0}), has = s_.plan().train.packs->size();
    ULY_USER_CHECK(job_.restart_data || had == has, "{}: the data had {} samples when it was saved, and has {}: which have been seen is not known then; expected the same, or --restart-data to begin the data anew", found->folder, format_count(had), format_count(has));
    const std::string before = found->facts.value("data", ""), now = fingerprint();
    ULY_USER_CHECK(job_.restart_data || before.empty() || before == now, "{}: the data are not those that it was saved with, though as many: which samples have been seen is not known then; expected the same tokens, or --restart-data to begin the data anew", found->folder);
    const int64_t epoch_before = found->facts.value("epoch_size", sampler_.epoch_size());
    ULY_USER_CHECK(job_.restart_data || epoch_before == sampler_.epoch_size(), "{}: an epoch had {} samples when it was saved, and has {} (min_iterations, with a step of another size): which have been seen is not known then; expected the same, or --restart-data to begin the data anew", found->folder, format_count(epoch_before), format_count(sampler_.epoch_size()));
    // Where epochs are counted, a step of another size changes how many are left, and where in the schedule the next one is.
    const int64_t steps = found->progress.steps, scheduled = found->facts.value("schedule_step", steps), size = sampler_.samples_a_step(), size_before = found->facts.value("samples_a_step", size);
    more_steps_ = steps - scheduled;
    if (size != size_before && r_.train_iters == 0 && !job_.restart_data) {
      more_steps_ -= sampler_.steps(found->progress.consumed, size) - sampler_.steps(found->progress.consumed, size_before);
      if (s_.first()) say("a step had {} samples when it was saved, and has {}: {} steps are left of {} epochs, and the learning rate goes on from where as many samples are at this size", format_count(size_before), format_count(size), format_count(s_.plan().horizon + more_steps_ - steps), r_.epochs);
    }
    if (s_.first()) {
      say("going on from {}: step {}, {} samples seen{}", found->folder, format_count(found->progress.steps), format_count(found->facts.at("consumed").get<int64_t>()), job_.restart_data ? "; the data begins anew" : "");
    }
    return found->progress;
  }
  std::random_device random;
  run_ = fmt::format("{:08x}{:08x}", random(), random());
  return {};
}

// Those of two runs would be taken for one run's: by what goes on from the newest, and by what removes the oldest.
void Loop::check_states_are_ours(const recipe::Checkpoint& c) const {
  std::vector<std::string> others;
  for (const std::string& folder : checkpoint::find_states(c.output_dir))
    if (const auto run = checkpoint::run_of(folder); start_.steps > 0 ? run && *run != run_ : run != run_) others.push_back(folder);
  ULY_USER_CHECK(others.empty(), "{}: holds {} states of another run ({}): expected none of others; move them away or choose another output_dir{}", c.output_dir, others.size(), std::filesystem::path(others.empty() ? "" : others[0]).filename().string(),
                 start_.steps > 0 ? "" : ", or go on from them with auto_resume: true");
}

// What an earlier start of this run has told of steps that are made again. Nothing may stop the run from here on but its training.
void Loop::take_back_metrics() {
  on_first(s_.world(), [&] {
    for (const recipe::Checkpoint& c : r_.checkpoint)
      if (c.enabled && c.auto_resume) start_.steps > 0 ? metrics_.forget_after(start_.steps) : metrics_.begin_in(c.output_dir);
  });
}

void Loop::say_what_may_be_lost() const {
  if (!s_.first() || steps_ >= last_step_) return;
  bool state = false, model = false;
  for (const recipe::Checkpoint& c : r_.checkpoint) (c.type == "huggingface" ? model : state) |= saves_on_the_way(c);
  if (state) return;
  say("no state is saved on the way: an interruption loses {}; checkpoint: [{{type: deepspeed, output_dir: ..., save_every_n_steps: ..., auto_resume: true}}] would keep it", model ? "the optimizer's state, and what came after the last saved model" : fmt::format("all {} steps", format_count(last_step_ - steps_)));
}


// Why to stop before the next step, the same on all ranks: a signal to any of them, or what rank 0 sees; "" to go on.
std::string Loop::why_to_stop() {
  const bool looks = !r_.kill_switch_path.empty(), clock = r_.exit_after_seconds > 0, signals = saves_states(r_);
  if (!looks && !clock && !signals) return "";
  constexpr int kSwitch = 1000, kClock = 1001;
  std::error_code error;
  int why = noticed_signal();
  if (why == 0 && s_.first() && looks && std::filesystem::exists(r_.kill_switch_path, error)) why = kSwitch;
  if (why == 0 && s_.first() && clock && seconds_since(began_) >= r_.exit_after_seconds) why = kClock;
  why = static_cast<int>(s_.world().all().max(why));
  return why == 0 ? "" : why == kSwitch ? r_.kill_switch_path + " exists" : why == kClock ? fmt::format("exit_after: {} have passed", format_duration(r_.exit_after_seconds)) : fmt::format("signal {}", why);
}

// Data of which no token is trained would cost a run and change nothing: the loss would be 0. Normally the first pack answers.
void Loop::check_something_is_trained() {
  const auto check = [&](const plan::Packed& data, const char* key) {
    if (!data) return;
    for (int64_t i = 0; i < data.packs->size(); ++i)
      for (const data::Piece& p : data.packs->pieces(i)) {
        const uint8_t* const trained = data.file->trained() + p.first;
        if (std::any_of(trained + 1, trained + p.count, [](uint8_t flag) { return flag != 0; })) return;
      }
    user_error("{} ({}): expected samples with tokens to train on; of {} within max_length={} none has any: a greater data.max_length, or data.overlong: truncate_left, which keeps the end, where answers are", key, r_.where(key), format_count(data.packs->num_pieces()), s_.plan().max_length);
  };
  on_first(s_.world(), [&] {
    check(s_.plan().train, "data.sources");
    check(s_.plan().eval, r_.data.eval_share > 0 ? "data.train_eval_split" : "data.eval_sources");
  });
}

// Looks before the first step at where models will be saved, so that no finished run meets a folder that it must not touch
// or cannot write, or a full disk.
void Loop::check_targets() {
  on_first(s_.world(), [&] {
    for (const recipe::Checkpoint& c : r_.checkpoint) {
      if (!c.enabled || last_step_ <= start_.steps) continue;
      const bool model = c.type == "huggingface";
      if (model && !saves_on_the_way(c) && !c.save_end_of_training) continue;
      if (!model) {
        checkpoint::make_folder(c.output_dir);
        check_states_are_ours(c);
      }
      const auto check = [&](int64_t step) { model ? checkpoint::check_hub_target(s_.spec(), save_folder(c, step)) : checkpoint::check_state_target(save_folder(c, step)); };
      if (const int64_t every = c.save_every_n_steps; every > 0)
        for (int64_t step = (start_.steps / every + 1) * every; step < last_step_; step += every) check(step);
      check(last_step_);
      if (model) checkpoint::check_hub_room(s_.spec(), r_.model.dtype, c.output_dir);
    }
  });
}

Exit Loop::run() {
  check_targets();
  check_something_is_trained();
  take_back_metrics();
  say_what_may_be_lost();
  std::string stop;
  while (steps_ < last_step_) {
    stop = why_to_stop();
    if (!stop.empty()) break;
    const bool profiled = s_.first() && !job_.profile.empty() && steps_ - start_.steps == std::min(last_step_ - start_.steps, kProfiledStep) - 1;
    if (profiled) engine::start_profile(job_.cuda);
    {
      RECORD_USER_SCOPE(fmt::format("step {}", steps_ + 1));
      step();
    }
    if (profiled) {
      engine::stop_profile(job_.profile);
      say("trace of step {}: {}", steps_, job_.profile);
    }
    saver_.poll();
    maybe_evaluate();
    const data::Sampler::Position at = sampler_.position(consumed_);
    maybe_save(at.epoch, at.first == 0, false);
  }
  if (!stop.empty() && s_.first()) say("{}: stopping after step {}", stop, steps_);
  const bool pre_empted = !stop.empty() && saves_states(r_);
  if (pre_empted && steps_ > start_.steps) {
    for (const recipe::Checkpoint& c : r_.checkpoint)
      if (c.enabled && c.type != "huggingface") save(c);
  } else if (!pre_empted) {
    maybe_save(sampler_.position(consumed_).epoch, false, true);
  }
  saver_.finish();
  on_first(s_.world(), [&] {
    ULY_USER_CHECK(saver_.failures() == 0, "{} of the saves failed; see above", saver_.failures());
    metrics_.finish();
    if (!pre_empted && steps_ >= last_step_)
      for (const recipe::Checkpoint& c : r_.checkpoint)
        if (c.enabled && c.auto_resume) metrics_.ended(c.output_dir);
  });
  return pre_empted ? Exit::kPreempted : Exit::kDone;
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
  say("memory: {} at most, {} planned = {} program and libraries + {} between steps + {} within one ({} priced){} + {} that libraries allocated", format_bytes(peak), format_bytes(plan::total_bytes(s.plan()) + s.plan().price.total_bytes(ops::Tier::kHost)), format_bytes(before), format_bytes(priced), format_bytes(used),
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
  const Clock::time_point began = job.began > 0 ? Clock::time_point(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(job.began))) : Clock::now();
  const int64_t before = memory::resident_bytes();
  Session session(job, world);
  if (session.first())
    for (const plan::Line& line : session.plan().lines) say("{:<10} {}", line.subject, line.text);
  say_tiers(session);
  Loop loop(session, job, began);
  const Exit exit = loop.run();
  session.engine().finish();
  say_memory(session, before, job.cuda);
  world.all().barrier();
  return static_cast<int>(exit);
}

int run(const Job& job) {
  if (saves_states(recipe::load(job.recipe_path, job.overrides))) notice_signals();
  admit_signals();
  comm::Rendezvous place = comm::rendezvous_from_environment();
  place.interrupted = [] { return noticed_signal() != 0; };  // only where signals are noticed
  comm::World world = comm::World::join(place);
  return run(job, world);
}

void leave() {
  notice_signals();
  admit_signals();
  comm::Rendezvous place = comm::rendezvous_from_environment();
  place.interrupted = [] { return true; };
  comm::World::join(place);  // does not return where there are others
}

}  // namespace uly::train
