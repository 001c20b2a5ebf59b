#include "train/session.h"

#include <unistd.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <span>

#include "base/check.h"
#include "base/host_memory.h"
#include "base/log.h"
#include "base/shapes.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "checkpoint/init.h"
#include "kernels/bf16.h"
#include "kernels/optimizer.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "launch/nccl.h"
#include "launch/nodes.h"
#include "plan/exchanges.h"
#include "train/save.h"
#include "train/states.h"

namespace uly::train {
namespace {

// The GPU of a rank as the driver sees it before this program uses it.
void look_at_gpu(plan::Machine& machine, int64_t local_rank, int64_t local_ranks) {
  const launch::Gpus gpus = launch::ask_gpus();
  machine.gpus = gpus.visible;
  if (gpus.list.empty()) return;
  const launch::Gpu& gpu = gpus.list[static_cast<size_t>(local_rank) % gpus.list.size()];
  machine.gpus = static_cast<int64_t>(gpus.list.size());
  plan::use_gpus(machine, std::span(&gpu, 1));
  machine.gpu_ranks = ceil_div(local_ranks, machine.gpus);
  machine.gpu_words = fmt::format("{}, {}", gpu.name, format_bytes(gpu.total_bytes));
}

// Who else has memory of a GPU: "5.8 GiB belong to process 4411".
std::string others_on_gpu(int64_t local_rank) {
  const launch::Gpus gpus = launch::ask_gpus();
  if (gpus.list.empty()) return "";
  std::string words;
  for (const launch::Gpu::Process& p : gpus.list[static_cast<size_t>(local_rank) % gpus.list.size()].processes)
    if (p.pid != getpid()) words += fmt::format("; {} belong to process {}", p.bytes > 0 ? format_bytes(p.bytes) : "some", p.pid);
  return words;
}

// The first element that is NaN or infinite; -1 if there is none.
int64_t first_not_finite(const std::vector<std::byte>& bytes, Dtype dtype) {
  const auto find = [&]<typename T>(T exponent) -> int64_t {
    const T* x = reinterpret_cast<const T*>(bytes.data());
    const T* end = x + bytes.size() / sizeof(T);
    const T* at = std::find_if(x, end, [&](T bits) { return (bits & exponent) == exponent; });
    return at == end ? -1 : at - x;
  };
  return dtype == Dtype::kBf16 ? find(uint16_t{0x7f80}) : find(uint32_t{0x7f800000});
}

}  // namespace

Session::Session(const Job& job, comm::World& world) 
    : world_(world), machines_(world), recipe_(recipe::load(job.recipe_path, job.overrides)), tokenizer_folder_(job.tokenizer_folder.empty() ? job.model_folder : job.tokenizer_folder) {
  compare_ranks();
  if (!job.rehearse) lock_folders();
  models::Spec spec = models::find(job.model_folder, "", recipe_.model.hf_config_kwargs);
  spec.name = recipe_.model.name_or_path;
  const auto place = launch::place_in_job();
  const int64_t local_rank = place ? place->local_rank : 0;
  // What ranks hold before they plan was free when the launcher planned.
  machine_ = plan::this_machine(job.cuda, 0, world_.all().max(own_bytes()) * (place ? place->local_world_size : 1));
  if (job.cuda) look_at_gpu(machine_, local_rank, place ? place->local_world_size : 1);
  machine_.disk_bytes = plan::scratch_bytes(recipe_);
  machine_.local_ranks = place ? place->local_world_size : 1;
  // Every rank plans with the least that any has; nobody's GPU is in use before all have looked.
  const auto agree_on = [&](int64_t sign, auto&... mine) {
    const std::vector<int64_t> all = world_.all().max({sign * int64_t{mine}...});
    size_t i = 0;
    ((mine = static_cast<std::remove_reference_t<decltype(mine)>>(sign * all[i++])), ...);
  };
  plan::Machine& m = machine_;
  agree_on(-1, m.memory_bytes, m.gpu_free_bytes, m.gpu_major, m.gpu_minor, m.cores, m.gpus, m.disk_bytes, m.nccl_version);
  agree_on(1, m.gpu_ranks, m.local_ranks);
  if (machine_.nccl_version == 0 && machine_.nccl_why.empty()) machine_.nccl_why = "another rank cannot load libnccl.so.2";
  // What rank 0 has measured holds for all: the plan depends on it.
  if (!job.rates_path.empty()) plan::use_rates(machine_, plan::read_rates_file(job.rates_path), job.rates_path);
  if (const std::string rates = world_.all().exchange(machine_.measured ? plan::to_json(*machine_.measured).dump() : "")[0]; rates.empty()) machine_.measured.reset();
  else machine_.measured = plan::measured_from(Json::parse(rates));
  std::optional<plan::DataFacts> data;
  if (!job.rehearse) data = plan::DataFacts{.tokens_path = job.tokens_path, .eval_tokens_path = job.eval_tokens_path};
  plan_ = plan::make(recipe_, spec, machine_, world_.size(), data);
  if (!plan_.fits) throw WillNotFit(plan_.why_not);
  compare_data(machines_, plan_);
  agree();

  mesh_ = plan_.mesh;
  mesh_.rank = world_.rank();
  model_ = std::make_unique<step::Model>(std::move(spec));
  std::vector<int64_t> peers;
  for (int64_t p = 0; p < mesh_.P; ++p) peers.push_back(mesh_.replica() * mesh_.P + p);
  sequence_ = world_.subgroup(peers, fmt::format("sequence {}", mesh_.replica()));

  if (mesh_.node > 1) {
    std::vector<int64_t> near;
    for (int64_t i = 0; i < mesh_.node; ++i) near.push_back(mesh_.rank / mesh_.node * mesh_.node + i);
    node_ = world_.subgroup(near, fmt::format("node {}", mesh_.rank / mesh_.node));
  }
  make_engine(job, local_rank);
  const step::Options options = plan::options_for(plan_, mesh_.rank, plan_.planned_length);
  const plan::Price price = plan::price_step(*model_, options);
  engine_->begin_run(price.run_places);
  ops::Places largest;
  const auto enlarge = [&](const ops::Places& places) {
    for (size_t t = 0; t < largest.arena_bytes.size(); ++t) largest.arena_bytes[t] = std::max(largest.arena_bytes[t], places.arena_bytes[t]);
  };
  enlarge(price.step_places);
  enlarge(program_for(plan_.planned_length, Phase::kStep).places);
  if (options.defers_updates()) enlarge(program_for(plan_.planned_length, Phase::kStepAfterUpdate).places), enlarge(update_program().places);
  if (plan_.eval) enlarge(program_for(plan_.planned_length, Phase::kEvaluation).places);
  engine_->reserve_step(largest);
  states_ = step::make_states(*engine_, model_->units, options);
  if (job.rehearse) empty_states();
  else load_weights();
}

// Before anything else is done together: one program, one recipe. Throws UserError naming the first rank that has another.
void Session::compare_ranks() {
  const Json mine = {{"build", launch::build_of("", "/proc/self/exe")}, {"recipe", recipe_.normalized}};
  const std::vector<std::string> all = world_.all().exchange(mine.dump());
  const Json first = Json::parse(all[0]);
  for (size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    const Json other = Json::parse(all[r]);
    ULY_USER_CHECK(other.at("build") == first.at("build"), "rank {}: another build of ulysses ({}) than rank 0's ({}): install the same on all machines", r, other.at("build").get<std::string>(), first.at("build").get<std::string>());
    const std::vector<std::string> changes = changes_between(first.at("recipe"), other.at("recipe"));
    user_error("rank {}: its recipe is not rank 0's: {} there: all ranks need the same", r, changes.empty() ? "?" : changes[0]);
  }
}

// Keeps the folders for states for this run, before any is read. Throws UserError where another run has one, or a machine does not see it.
void Session::lock_folders() {
  const std::string job = launch::variable("SLURM_JOB_ID").value_or("");
  on_first(world_, [&] {
    for (const recipe::Checkpoint& c : recipe_.checkpoint)
      if (c.enabled && c.type != "huggingface") locks_.emplace_back(c.output_dir, fmt::format("pid {} on {}{}", ::getpid(), comm::machine_name(), job.empty() ? "" : ", SLURM job " + job));
  });
  Json written = Json::object();
  for (const checkpoint::RunLock& lock : locks_)
    if (!lock.content().empty()) written[lock.path()] = lock.content();
  written = Json::parse(world_.all().exchange(written.dump())[0]);
  const std::vector<std::string> unseen = machines_.ask([&]() -> std::string {
    for (const auto& [path, content] : written.items()) {
      std::ifstream file(path, std::ios::binary);
      if (std::string(std::istreambuf_iterator<char>(file), {}) != content.get<std::string>()) return path;
    }
    return "";
  });
  for (size_t r = 0; r < unseen.size(); ++r) ULY_USER_CHECK(unseen[r].empty(), "output_dir has to be on a file system that all machines share: {} does not see {} of {}", machines_.name(r), unseen[r], machines_.name(0));
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
  if (!random) {
    reader.emplace(spec().folder, spec());
    const int64_t other = Machines::first_other(machines_.ask([&] { return reader->fingerprint(units()); }));
    ULY_USER_CHECK(other < 0, "{}: the weights in {} there are not those of {}: expected the same model on all machines", machines_.words(static_cast<size_t>(other)), spec().folder, machines_.words(0));
  }
  for (size_t u = 0; u < units().size(); ++u) {
    const step::UnitState& state = states_.units[u];
    const int64_t n = state.master.columns, begin = mesh_.rank * n, end = std::min(begin + n, units()[u].elements);
    std::vector<float> values;
    for (int64_t at = begin; at < end; at += checkpoint::kAtOnce) {
      const int64_t count = std::min(checkpoint::kAtOnce, end - at);
      values.resize(static_cast<size_t>(count));
      if (random)
        checkpoint::fill_initial(spec(), units()[u], static_cast<uint64_t>(recipe_.seed), static_cast<int64_t>(u), at, count, values.data());
      else
        reader->read(units()[u], at, count, values.data());
      load_range(state, at - begin, values);
    }
  }
}

// Written, so that every tier has what it is going to have.
void Session::empty_states() {
  std::vector<float> zeros;
  for (const step::UnitState& u : states_.units)
    for (const ops::Buffer& b : {u.weight, u.master, u.m, u.v, u.gradient, u.near, u.copy}) {
      if (!b.exists()) continue;
      if (b.tier == ops::Tier::kDevice) {
        engine_->zero(b);
        continue;
      }
      if (machine_.cuda && b.tier == ops::Tier::kHost) continue;  // its arena comes so
      zeros.resize(static_cast<size_t>(checkpoint::kAtOnce));
      for (int64_t at = 0; at < b.columns; at += checkpoint::kAtOnce) engine_->write(b.column_range(at, std::min(checkpoint::kAtOnce, b.columns - at)), zeros.data());
    }
}

// Puts fp32 values into master and weights from element `at` on.
void Session::load_range(const step::UnitState& state, int64_t at, std::vector<float>& values) {
  const int64_t count = static_cast<int64_t>(values.size());
  if (state.master.dtype == Dtype::kI16) {
    std::vector<uint16_t> weight(values.size());
    std::vector<int16_t> low(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      const kernels::SplitFloat split = kernels::split(values[i]);
      weight[i] = split.weight, low[i] = split.low;
    }
    engine_->write(state.weight.column_range(at, count), weight.data());
    if (state.copy.exists()) engine_->write(state.copy.column_range(at, count), weight.data());
    engine_->write(state.master.column_range(at, count), low.data());
    return;
  }
  engine_->write(state.master.column_range(at, count), values.data());
  if (state.weight.dtype == Dtype::kBf16) {
    std::vector<kernels::Bf16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), [](float x) { return kernels::to_bf16(x); });
    engine_->write(state.weight.column_range(at, count), rounded.data());
  } else if (state.weight.id != state.master.id) {
    engine_->write(state.weight.column_range(at, count), values.data());
  }
}

void Session::read_state(size_t unit, checkpoint::Moment moment, int64_t at, int64_t count, float* out) {
  const step::UnitState& state = states_.units[unit];
  if (moment != checkpoint::Moment::kMaster || state.master.dtype != Dtype::kI16) return engine_->read(out, (moment == checkpoint::Moment::kMaster ? state.master : moment == checkpoint::Moment::kM ? state.m : state.v).column_range(at, count));
  std::vector<uint16_t> weight(static_cast<size_t>(count));
  std::vector<int16_t> low(static_cast<size_t>(count));
  engine_->read(weight.data(), state.weight.column_range(at, count));
  engine_->read(low.data(), state.master.column_range(at, count));
  for (size_t i = 0; i < weight.size(); ++i) out[i] = kernels::join(weight[i], low[i]);
}

void Session::write_state(size_t unit, checkpoint::Moment moment, int64_t at, std::vector<float>& values) {
  const step::UnitState& state = states_.units[unit];
  if (moment == checkpoint::Moment::kMaster) return load_range(state, at, values);
  engine_->write((moment == checkpoint::Moment::kM ? state.m : state.v).column_range(at, static_cast<int64_t>(values.size())), values.data());
}

void Session::make_engine(const Job& job, int64_t local_rank) {
  if (!job.cuda) {
    engine_ = engine::make_cpu_engine(world_.all(), *sequence_, {.node = node_.get(), .disk_folders = recipe_.memory_disk_folders, .disk_faults = memory::faults_from(job.disk_faults), .delays = job.delays, .rehearsal = job.rehearse});
    return;
  }
  engine::CudaOptions options{.node = node_.get(), .device = static_cast<int>(local_rank % std::max<int64_t>(1, machine_.gpus)), .scratch_bytes = ops::kernel_scratch_bytes(plan::widest_summed_columns(spec())), .deterministic = recipe_.deterministic, .rehearsal = job.rehearse, .nccl = plan::choose_exchanges(machine_, world_.size()).nccl, .disk_folders = recipe_.memory_disk_folders, .disk_faults = memory::faults_from(job.disk_faults), .host_threads = static_cast<int>(std::max<int64_t>(1, machine_.cores / plan::ranks_on_machine(machine_, world_.size()))), .advice = {}};
  options.advice = [this, local_rank](int64_t bytes) {
    const int64_t longest = plan::longest_that_fits(recipe_, spec(), machine_, world_.size(), bytes + plan_.besides_bytes);
    return others_on_gpu(local_rank) + (longest > 0 ? fmt::format("; the longest that fits is data.max_length={}", longest) : "");
  };
  if (options.nccl) {
    const auto place = launch::place_in_job();
    if (place && local_rank == 0) {
      const bool several = place->local_world_size < place->world_size;
      if (const std::string words = several ? launch::missing_plugin("/sys/class/infiniband") : ""; !words.empty()) say("{}", words);
      if (const std::string words = place->local_world_size > 1 ? launch::little_shared_memory("/dev/shm") : ""; !words.empty()) say("{}", words);
    }
    launch::prepare_nccl(machine_.gpu_ranks > 1, !place || place->local_world_size == place->world_size);
  }
  engine_ = engine::make_cuda_engine(launch::program_folder(), world_.all(), *sequence_, options);
}

const Session::Program& Session::program_for(int64_t S, Phase phase) {
  const auto found = programs_.find({S, phase});
  if (found != programs_.end()) return found->second;
  Program program;
  program.options = plan::options_for(plan_, mesh_.rank, S);
  program.places = (phase == Phase::kEvaluation ? plan::price_evaluation(*model_, program.options) : plan::price_micro_step(*model_, program.options, {.update = phase == Phase::kStepAfterUpdate})).step_places;
  return programs_.emplace(std::pair(S, phase), std::move(program)).first->second;
}

void Session::load(const Program& program, data::Batch batch, double scale) {
  const models::RopeTable rope = models::rope_table(spec(), batch.longest_document);
  engine::BatchData data{.ids = std::move(batch.ids), .labels = std::move(batch.labels), .positions = std::move(batch.positions), .scale = scale, .inverse_frequencies = rope.inverse_frequencies, .rope_factor = rope.attention_factor, .padding_token = spec().padding_token};
  data.document_starts = program.options.exchange ? std::move(batch.document_starts) : data::starts_within_shard(batch.document_starts, batch.S, mesh_.P, mesh_.p());
  engine_->begin_step(program.places, std::move(data), ops::document_table_bytes(program.options.attention, program.options.S()));
}

void Session::micro_step(data::Batch batch, double scale, bool last) {
  const Program& program = program_for(batch.S, update_pending_ ? Phase::kStepAfterUpdate : Phase::kStep);
  load(program, std::move(batch), scale);
  step::micro_step(*engine_, *model_, program.options, states_, {.first = first_micro_, .last = last, .update = update_pending_});
  first_micro_ = update_pending_ = false;
}

void Session::begin_evaluation() {
  flush();
  step::begin(*engine_, states_);
}

void Session::evaluate(data::Batch batch, double scale) {
  const Program& program = program_for(batch.S, Phase::kEvaluation);
  load(program, std::move(batch), scale);
  step::evaluate(*engine_, *model_, program.options, states_);
}

std::optional<Session::NotFinite> Session::look_at_forward(data::Batch batch, double scale) {
  begin_evaluation();
  const Program& program = program_for(batch.S, Phase::kEvaluation);
  load(program, std::move(batch), scale);
  std::optional<NotFinite> found;
  std::vector<std::byte> bytes;
  const auto look = [&](size_t unit, const ops::Buffer& output) {
    if (found) return;
    const int64_t at_once = std::max<int64_t>(1, checkpoint::kAtOnce / output.columns);
    for (int64_t row = 0; row < output.rows && !found; row += at_once) {
      const ops::Buffer part = output.row_range(row, std::min(at_once, output.rows - row));
      bytes.resize(static_cast<size_t>(part.bytes()));
      engine_->read(bytes.data(), part);
      if (const int64_t at = first_not_finite(bytes, part.dtype); at >= 0) found = NotFinite{unit, row + at / part.columns};
    }
  };
  step::evaluate(*engine_, *model_, program.options, states_, look);
  engine_->finish();
  return found;
}

double Session::finish_evaluation() {
  step::finish_evaluation(*engine_, plan_.options, states_);
  return loss();
}

void Session::finish_gradients() { step::finish_gradients(*engine_, plan_.options, states_); }

void Session::update(double learning_rate, int64_t step) {
  const recipe::Optimizer& o = recipe_.optimizer;
  engine_->set_update({.learning_rate = learning_rate, .beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .weight_decay = o.weight_decay, .clip = recipe_.deepspeed.gradient_clipping, .step = step});
  step::Options options = plan_.options;
  options.mesh = mesh_;
  update_pending_ = options.defers_updates();
  if (!update_pending_) step::update(*engine_, *model_, options, states_);
}

void Session::flush() {
  if (!update_pending_) return;
  const Program& program = update_program();
  engine_->begin_step(program.places, {}, 0);
  step::update(*engine_, *model_, program.options, states_);
  update_pending_ = false;
  engine_->finish();
}

const Session::Program& Session::update_program() {
  if (!update_program_) {
    update_program_.emplace();
    update_program_->options = plan_.options;
    update_program_->options.mesh = mesh_;
    update_program_->places = plan::price_update(*model_, update_program_->options).step_places;
  }
  return *update_program_;
}

std::string Session::where_not_finite() {
  int64_t unit = -1;
  std::vector<float> g;
  for (size_t u = 0; u < units().size(); ++u) {
    g.resize(static_cast<size_t>(states_.units[u].gradient.columns));
    engine_->read(g.data(), states_.units[u].gradient);
    if (!std::all_of(g.begin(), g.end(), [](float x) { return std::isfinite(x); })) unit = static_cast<int64_t>(u);
  }
  unit = world_.all().max(unit);
  return unit < 0 ? "" : units()[static_cast<size_t>(unit)].name;
}

std::vector<uint8_t> Session::gather(const ops::Buffer& shard) {
  std::vector<uint8_t> whole(static_cast<size_t>(shard.bytes() * mesh_.W));
  std::vector<uint8_t> mine(static_cast<size_t>(shard.bytes()));
  engine_->read(mine.data(), shard);
  world_.all().all_gather(whole.data(), mine.data(), shard.bytes()).wait();
  return whole;
}

}  // namespace uly::train
