#include "train/session.h"

#include <cmath>

#include "base/check.h"
#include "base/log.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "checkpoint/init.h"
#include "kernels/bf16.h"

namespace uly::train {

Session::Session(const Job& job, comm::World& world) 
    : world_(world), recipe_(recipe::load(job.recipe_path, job.overrides)), tokenizer_folder_(job.tokenizer_folder.empty() ? job.model_folder : job.tokenizer_folder) {
  models::Spec spec = models::find(job.model_folder, "", recipe_.model.hf_config_kwargs);
  spec.name = recipe_.model.name_or_path;
  plan::Machine machine = plan::this_machine(job.cuda, 0);
  machine.memory_bytes = -world_.all().max(-machine.memory_bytes);  // every rank plans with the least that any has
  plan_ = plan::make(recipe_, spec, machine, world_.size(), plan::DataFacts{.tokens_path = job.tokens_path});
  if (!plan_.fits) throw WillNotFit(plan_.why_not);
  agree();

  mesh_ = plan_.mesh;
  mesh_.rank = world_.rank();
  model_ = std::make_unique<step::Model>(std::move(spec));
  tokens_.emplace(job.tokens_path);
  std::vector<int64_t> peers;
  for (int64_t p = 0; p < mesh_.P; ++p) peers.push_back(mesh_.replica() * mesh_.P + p);
  sequence_ = world_.subgroup(peers, fmt::format("sequence {}", mesh_.replica()));

  engine_ = std::make_unique<engine::Engine>(world_.all(), *sequence_);
  const step::Options options = plan::options_for(plan_, mesh_.rank, plan_.planned_length);
  const plan::Price price = plan::price_step(*model_, options);
  engine_->begin_run(price.run_places);
  engine_->reserve_step(price.step_places.arena_bytes);
  states_ = step::make_states(*engine_, model_->units, options);
  load_weights();
}

// Throws UserError naming the first rank whose plan differs: a difference would be a wait without end later.
void Session::agree() {
  const std::vector<std::string> hashes = world_.all().exchange(plan_.hash);
  for (size_t r = 0; r < hashes.size(); ++r)
    ULY_USER_CHECK(hashes[r] == hashes[0], "rank {}: its plan ({}) is not that of rank 0 ({}): all ranks need the same recipe, model, data and version", r, hashes[r], hashes[0]);
}

void Session::load_weights() {
  const bool random = recipe_.model.random_init || spec().randomly_initialized;
  std::optional<checkpoint::HubReader> reader;
  if (!random) reader.emplace(spec().folder, spec());
  constexpr int64_t kAtOnce = int64_t{1} << 24;  // elements
  for (size_t u = 0; u < units().size(); ++u) {
    const step::UnitState& state = states_.units[u];
    const int64_t n = state.master.columns, begin = mesh_.rank * n, end = std::min(begin + n, units()[u].elements);
    float* master = engine_->tensor(state.master).data_ptr<float>();
    for (int64_t at = begin; at < end; at += kAtOnce) {
      const int64_t count = std::min(kAtOnce, end - at);
      if (random)
        checkpoint::fill_initial(spec(), units()[u], static_cast<uint64_t>(recipe_.seed), static_cast<int64_t>(u), at, count, master + (at - begin));
      else
        reader->read(units()[u], at, count, master + (at - begin));
    }
    if (state.weight.dtype == Dtype::kBf16) engine_->copy(state.weight, state.master);
  }
}

const Session::Program& Session::program_for(int64_t S) {
  const auto found = programs_.find(S);
  if (found != programs_.end()) return found->second;
  Program program;
  program.options = plan::options_for(plan_, mesh_.rank, S);
  program.places = plan::price_step(*model_, program.options).step_places;
  return programs_.emplace(S, std::move(program)).first->second;
}

void Session::micro_step(const data::Batch& batch, double scale) {
  const Program& program = program_for(batch.S);
  const models::RopeTable rope = models::rope_table(spec(), batch.longest_document);
  engine::BatchData data{.ids = batch.ids, .labels = batch.labels, .positions = batch.positions, .scale = scale, .inverse_frequencies = rope.inverse_frequencies, .rope_factor = rope.attention_factor, .padding_token = spec().padding_token};
  data.document_starts = program.options.exchange ? batch.document_starts : data::starts_within_shard(batch.document_starts, batch.S, mesh_.P, mesh_.p());
  engine_->begin_step(program.places, data);
  step::micro_step(*engine_, *model_, program.options, states_);
}

void Session::finish_gradients() { step::finish_gradients(*engine_, plan_.options, states_); }

void Session::update(double learning_rate, int64_t step) {
  const recipe::Optimizer& o = recipe_.optimizer;
  engine_->set_update({.learning_rate = learning_rate, .beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .weight_decay = o.weight_decay, .clip = recipe_.deepspeed.gradient_clipping, .step = step});
  step::Options options = plan_.options;
  options.mesh = mesh_;
  step::update(*engine_, *model_, options, states_);
}

std::string Session::where_not_finite() {
  int64_t unit = -1;
  for (size_t u = 0; u < units().size(); ++u) {
    const float* g = engine_->tensor(states_.units[u].gradient).data_ptr<float>();
    for (int64_t i = 0; i < states_.units[u].gradient.columns && unit != static_cast<int64_t>(u); ++i)
      if (!std::isfinite(g[i])) unit = static_cast<int64_t>(u);
  }
  unit = world_.all().max(unit);
  return unit < 0 ? "" : units()[static_cast<size_t>(unit)].name;
}

std::vector<uint8_t> Session::gather(const ops::Buffer& shard) {
  std::vector<uint8_t> whole(static_cast<size_t>(shard.bytes() * mesh_.W));
  world_.all().all_gather(whole.data(), engine_->tensor(shard).data_ptr(), shard.bytes()).wait();
  return whole;
}

}  // namespace uly::train
