#include "plan/plan.h"

#include <xxhash.h>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/shapes.h"
#include "base/units.h"
#include "data/sampler.h"
#include "data/token_file.h"
#include "plan/exchanges.h"
#include "plan/explain.h"
#include "plan/longest.h"

namespace uly::plan {
namespace {

constexpr int64_t kMiB = 1 << 20;

// Bytes one tile of the MLP (gate, up, their product and its gradient) or of the logits may take.
int64_t tile_budget_bytes(const recipe::Recipe& r, bool cuda) { return r.memory_tile_bytes > 0 ? r.memory_tile_bytes : cuda ? 2048 * kMiB : 64 * kMiB; }

// Tokens of a tile: a multiple of 64, unless the budget is smaller than 64 tokens or the shard is.
int64_t tile_tokens(int64_t budget_bytes, int64_t bytes_per_token, int64_t s) {
  const int64_t tokens = budget_bytes / bytes_per_token;
  return std::clamp<int64_t>(tokens >= 64 ? tokens / 64 * 64 : tokens, 1, s);
}

step::Mesh make_mesh(const recipe::Recipe& r, const models::Spec& spec, int64_t world) {
  const int64_t P = r.sequence_parallel_size;
  const std::string where = fmt::format("sequence_parallel_size ({})", r.where("sequence_parallel_size"));
  ULY_USER_CHECK(P <= world && world % P == 0, "{}: expected a divisor of {} rank{}, found {}", where, world, world == 1 ? "" : "s", P);
  ULY_USER_CHECK(P <= spec.N, "{}: {} ranks cannot share {} query heads: expected at most {}", where, P, spec.N, spec.N);
  const int64_t node = r.deepspeed.hpz_partition_size;
  ULY_USER_CHECK(world % node == 0, "deepspeed.zero_optimization.zero_hpz_partition_size ({}): expected a divisor of {} rank{}, found {}", r.where("deepspeed.zero_optimization.zero_hpz_partition_size"), world, world == 1 ? "" : "s", node);
  return {.W = world, .P = P, .rank = 0, .node = node < world ? node : 1};
}

// What CUDA, cuBLAS, cuDNN and this program's own kernels take of a GPU by being loaded (bench/results/planner.jsonl).
constexpr int64_t kLibraryBytes = 640 * kMiB;

// Bytes one rank may use: memory.device of the recipe, or an equal part of what the machine has free.
int64_t budget(const recipe::Recipe& r, const Machine& machine, int64_t world) {
  if (r.memory_device_bytes > 0) return r.memory_device_bytes;
  if (machine.cuda) return machine.gpu_free_bytes / machine.gpu_ranks;  // 0 where it is not known
  return machine.memory_bytes / world;
}

// cuDNN has fast kernels on sm_90 and newer; a GPU that is not known is taken to be one.
bool is_fast_with_cudnn(const Machine& machine) { return machine.gpu_major == 0 || machine.gpu_major >= 9; }

// cuDNN takes heads of 8, 16, ... columns; flash attention pads others.
ops::AttentionBackend gpu_attention(const recipe::Recipe& r, const Machine& machine, int64_t H) {
  return r.attention == "flash" || (r.attention == "auto" && !is_fast_with_cudnn(machine)) || H % 8 != 0 ? ops::AttentionBackend::kFlash : ops::AttentionBackend::kCudnn;
}

// How a GPU computes attention over S tokens with the heads of the rank that has most.
ops::AttentionSchedule attention_schedule(const recipe::Recipe& r, const Machine& machine, const ops::Heads& heads, int64_t S) {
  ops::AttentionSchedule s;
  if (!machine.cuda) return s;
  s.backend = gpu_attention(r, machine, heads.H);
  s.deterministic = r.deterministic;
  s.forward_block = 32768;
  if (s.backend == ops::AttentionBackend::kFlash) return s;
  constexpr int64_t kOften = int64_t{1} << 30, kMost = int64_t{6} << 30;  // of workspace
  constexpr int64_t kOrderedBlock = 8192, kOrderedHeads = 8, kBlock = 131072;
  const auto workspace = [&] { return ops::attention_grad_workspace_bytes(s, heads, S); };
  // Blocks, halved where many query heads share a key-value head.
  const auto in_blocks = [&](int64_t block) {
    do s.backward_queries = s.backward_keys = block, block /= 2;
    while (workspace() > kMost && block >= 2048);
  };
  if (s.deterministic) {
    s.kv_heads_at_once = std::max<int64_t>(1, kOrderedHeads / heads.G);
    in_blocks(kOrderedBlock);
    return s;
  }
  for (s.kv_heads_at_once = std::max<int64_t>(1, heads.k); s.kv_heads_at_once > 1; s.kv_heads_at_once = (s.kv_heads_at_once + 1) / 2)
    if (workspace() <= kOften + kOften / 16) break;
  if (workspace() > kMost) in_blocks(kBlock);
  return s;
}

// Tokens of the longest micro-batch: the longest samples that could come together, each as often as an epoch has it.
int64_t longest_micro_batch(const recipe::Recipe& r, int64_t R, int64_t max_length, const data::TokenFile* file, const data::Selection& selection) {
  if (file == nullptr) return r.micro_batch_size * max_length;
  std::vector<int64_t> lengths;
  for (const int64_t i : selection.samples) lengths.push_back(file->length(i));
  if (lengths.empty()) return 0;
  const int64_t n = std::min(static_cast<int64_t>(lengths.size()), r.micro_batch_size), in_epoch = r.min_iterations * r.micro_batch_size * r.gradient_accumulation_steps * R;
  const int64_t times = std::max<int64_t>(1, ceil_div(in_epoch, static_cast<int64_t>(lengths.size())));
  std::partial_sort(lengths.begin(), lengths.begin() + n, lengths.end(), std::greater<>());
  int64_t tokens = 0;
  for (int64_t i = 0, left = r.micro_batch_size; i < n && left > 0; ++i, left -= times) tokens += lengths[static_cast<size_t>(i)] * std::min(left, times);
  return tokens;
}

// What the process itself has of the host's memory beside its arenas: torch, CUDA's and cuDNN's own, the data's pages.
constexpr int64_t kHostProcessBytes = int64_t{4} << 30;

// What one rank may use. On the CPU all is host memory: a tier of its own only where the recipe says so.
Room room(const recipe::Recipe& r, const Machine& machine, int64_t world, int64_t device_bytes) {
  Room room{.device_bytes = device_bytes};
  const int64_t ranks = ranks_on_machine(machine, world);
  if (r.memory_host_bytes > 0) room.host_bytes = r.memory_host_bytes / ranks;
  else if (machine.cuda && machine.memory_bytes > 0) room.host_bytes = std::max<int64_t>(0, machine.memory_bytes / 100 * 96 / ranks - kHostProcessBytes);
  room.disk_bytes = (machine.disk_bytes > 0 ? machine.disk_bytes : scratch_bytes(r)) / ranks;
  return room;
}

// All but what is kept.
void choose_options(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world) {
  step::Options& o = plan.options;
  o.mesh = plan.mesh;
  o.dtype = r.model.dtype;
  o.wire = r.deepspeed.wire_dtype;
  o.exchange = r.attention_scope == "sequence";
  o.s = plan.planned_length / plan.mesh.P;
  const int64_t element = bytes_of(o.dtype);
  o.mlp_tile = tile_tokens(tile_budget_bytes(r, machine.cuda), 4 * spec.F * element, o.s);
  o.loss_tile = tile_tokens(tile_budget_bytes(r, machine.cuda), spec.V * element, o.s);

  o.split_master = r.master_weights == "split" && o.dtype == Dtype::kBf16;
  ops::Heads most;
  for (int64_t p = 0; p < o.exchange_ranks(); ++p)
    if (const ops::Heads h = step::heads_of_rank(spec, o.exchange_ranks(), p); h.n > most.n) most = h;
  o.attention = attention_schedule(r, machine, most, o.S());

  plan.room = room(r, machine, world, budget(r, machine, world));
  if (machine.cuda) plan.besides_bytes = kLibraryBytes + (choose_exchanges(machine, world).nccl ? nccl_bytes(o.mesh) : 0) + ops::kGemmWorkspaceBytes + ops::kernel_scratch_bytes(widest_summed_columns(spec)) + ops::attention_besides_bytes(o.attention, most, o.S());
}

void check_disk(const recipe::Recipe& r, const Machine& machine) {
  if (machine.imagined) return;
  for (const std::string& folder : r.memory_disk_folders) {
    std::error_code error;
    const std::string where = fmt::format("memory.disk ({})", r.where("memory.disk"));
    ULY_USER_CHECK(std::filesystem::exists(folder, error), "{}: expected folders that are there, found no {}", where, folder);
    ULY_USER_CHECK(std::filesystem::is_directory(folder, error), "{}: expected a folder, found the file {}", where, folder);
    ULY_USER_CHECK(::access(folder.c_str(), W_OK) == 0, "{}: {} cannot be written: {}", where, folder, std::strerror(errno));
  }
}

// data.max_length: auto. Depends on what all ranks have alike, not on the data.
int64_t auto_length(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world) {
  const int64_t unit = plan.mesh.P * r.data.div_length;
  ULY_USER_CHECK(budget(r, machine, world) > 0, "data.max_length ({}): auto needs to know how much memory there is: give it with memory.device, or a length", r.where("data.max_length"));
  plan.longest = find_longest(r, spec, machine, world, kLongestAsked, unit, std::max<int64_t>(spec.max_positions, unit));
  return std::max(plan.longest->max_length, unit);
}

std::string hash_of(const recipe::Recipe& r, const models::Spec& spec, const Plan& plan) {
  std::string text = r.normalized.dump() + spec.config.dump() + fmt::format("|{}|{}|{}|{}|{}|{}", plan.mesh.W, plan.max_length, plan.planned_length, plan.options.mlp_tile, plan.options.loss_tile, plan.num_samples);
  const ops::AttentionSchedule& a = plan.options.attention;
  text += fmt::format("|{}|{}|{}|{}", static_cast<int>(a.backend), a.kv_heads_at_once, a.backward_queries, a.backward_keys);
  for (const step::LayerKeep& k : plan.options.keep) text += fmt::format("{}{}{}{}{}{}{},", static_cast<int>(k.level), k.input, k.output, static_cast<int>(k.input_tier), static_cast<int>(k.output_tier), static_cast<int>(k.projections_tier), static_cast<int>(k.gate_up_tier));
  for (const step::UnitTiers& t : plan.options.tiers) text += fmt::format("{}{}{}{},", static_cast<int>(t.weight), static_cast<int>(t.optimizer), static_cast<int>(t.gradient), t.update_on_host);
  text += fmt::format("|{}|{}", plan.options.exchange_parts, plan.mesh.node);
  text += fmt::format("|{}|{}|{}", plan.options.rebuilt_inputs, plan.options.lean, static_cast<int>(plan.options.rebuilt_tier));
  const XXH128_hash_t h = XXH3_128bits(text.data(), text.size());
  return fmt::format("{:016x}{:016x}", h.high64, h.low64);
}

}  // namespace

Price price_step(const step::Model& model, const step::Options& options) { return read_step(model, options).price(); }

Price price_micro_step(const step::Model& model, const step::Options& options, const step::Phase& phase) {
  Priced priced({options.mesh.P, options.mesh.W}, options.s, ops::document_table_bytes(options.attention, options.S()));
  step::micro_step(priced, model, options, step::make_states(priced, model.units, options), phase);
  return priced.price();
}

Price price_update(const step::Model& model, const step::Options& options) {
  Priced priced({options.mesh.P, options.mesh.W}, 0, 0);
  step::update(priced, model, options, step::make_states(priced, model.units, options));
  return priced.price();
}

int64_t padded_length(const recipe::Recipe& r, int64_t max_length, int64_t P, int64_t tokens) {
  const int64_t target = r.data.pad_to == recipe::PadTo::kMaxLength ? std::max(tokens, r.micro_batch_size * max_length) : round_up(std::max<int64_t>(tokens, 1), r.data.div_length);
  return round_up(target, P);
}

step::Options options_for(const Plan& plan, int64_t rank, int64_t S) {
  step::Options o = plan.options;
  o.mesh.rank = rank;
  o.s = S / plan.mesh.P;
  return o;
}

Steps count_steps(const recipe::Recipe& r, int64_t R, int64_t num_samples) {
  Steps s;
  const int64_t micro_batches = ceil_div(num_samples, r.micro_batch_size * R);
  s.per_epoch = ceil_div(micro_batches, r.gradient_accumulation_steps);
  if (r.min_iterations > s.per_epoch) s.per_epoch = r.min_iterations;
  s.horizon = r.train_iters > 0 ? r.train_iters : r.epochs * s.per_epoch;
  s.run = s.horizon;
  for (const int64_t exit : {r.exit_iteration, r.exit_iteration_this_run})
    if (exit > 0) s.run = std::min(s.run, exit);
  s.epochs = s.per_epoch > 0 ? ceil_div(s.horizon, s.per_epoch) : 0;
  return s;
}

int64_t free_scratch_bytes(const recipe::Recipe& r) {
  int64_t least = INT64_MAX;
  for (const std::string& folder : r.memory_disk_folders) {
    std::error_code error;
    const auto space = std::filesystem::space(folder, error);
    ULY_USER_CHECK(!error, "memory.disk ({}): {}: {}", r.where("memory.disk"), folder, error.message());
    least = std::min(least, static_cast<int64_t>(space.available));
  }
  return least / 10 * 9 * static_cast<int64_t>(r.memory_disk_folders.size());
}

int64_t scratch_bytes(const recipe::Recipe& r) { return r.memory_disk_folders.empty() ? 0 : r.memory_disk_bytes > 0 ? r.memory_disk_bytes : free_scratch_bytes(r); }

int64_t ranks_on_machine(const Machine& machine, int64_t world) { return machine.cuda ? std::max<int64_t>(1, std::min(world, machine.gpus * machine.gpu_ranks)) : world; }

Question question(const Plan& plan, const recipe::Recipe& r, const Machine& machine) {
  const int64_t W = plan.mesh.W;
  const Links links{.W = W, .P = plan.options.exchange_ranks(), .near = plan.mesh.node, .node_ranks = ranks_on_machine(machine, W), .gpu_ranks = machine.gpu_ranks, .nccl = choose_exchanges(machine, W).nccl};
  return {.room = plan.room, .rates = machine.cuda ? preset_rates(machine.gpu_name, machine.cores / std::max<int64_t>(1, W), links) : Rates{}, .besides_bytes = plan.besides_bytes, .cuda = machine.cuda, .micro_batches = r.gradient_accumulation_steps};
}

Plan sized(const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, int64_t max_length) {
  Plan plan;
  plan.mesh = make_mesh(r, spec, world);
  plan.max_length = max_length;
  plan.planned_length = padded_length(r, max_length, plan.mesh.P, r.micro_batch_size * max_length);
  choose_options(plan, r, spec, machine, world);
  return plan;
}

namespace {

// Heads in parts, whose exchange goes on under the attention of others, where that is faster: all else as it has been chosen.
void split_exchanges(const step::Model& model, Plan& plan, const Question& question) {
  constexpr double kFaster = 0.9995;
  const int64_t P = plan.options.exchange_ranks();
  if (P == 1 || !plan.fits || question.rates.gemm_flops == 0) return;
  step::Options best = plan.options;
  for (int64_t parts = 2; parts <= 8 && step::heads_of_rank(model.spec, P, 0).k >= parts; parts *= 2) {
    if (!step::parts_are_alike(model.spec, P, parts)) continue;
    step::Options options = plan.options;
    options.exchange_parts = parts;
    const Candidate c = price_candidate(model, options, question);
    ++plan.pricings;
    if (!c.fits || c.seconds > plan.seconds * kFaster) continue;
    Price price = price_with_places(model, options, question.rates);
    const Bytes over = excess(price, question);
    if (std::any_of(over.begin(), over.end(), [](int64_t bytes) { return bytes > 0; })) continue;
    best = std::move(options);
    plan.seconds = c.seconds, plan.price = std::move(price);
  }
  plan.options = std::move(best);
}

}  // namespace

void choose_kept(const step::Model& model, Plan& plan, const Question& question) {
  Choice choice = choose_places(model, plan.options, question);
  plan.options = choice.best.options;
  plan.seconds = choice.best.seconds;
  plan.states_words = choice.best.words;
  plan.fits = choice.best.fits || question.room.device_bytes == 0;
  plan.price = std::move(choice.price);
  plan.considered = std::move(choice.considered);
  plan.pricings += choice.pricings;
  split_exchanges(model, plan, question);
}

void choose(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world) {
  choose_options(plan, r, spec, machine, world);
  choose_kept(step::Model(spec), plan, question(plan, r, machine));
}

Plan make(const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, const std::optional<DataFacts>& facts, const Asked& asked) {
  Plan plan;
  plan.mesh = make_mesh(r, spec, world);
  check_disk(r, machine);
  plan.max_length = r.data.max_length == recipe::kAutoLength ? auto_length(plan, r, spec, machine, world) : r.data.max_length > 0 ? r.data.max_length : spec.max_positions;
  ULY_USER_CHECK(plan.max_length > 0, "data.max_length ({}): not given, and the model's configuration has no max_position_embeddings to take its place", r.where("data.max_length"));
  ULY_USER_CHECK(spec.sliding_window == 0 || plan.max_length <= spec.sliding_window,
                 "data.max_length ({}): {} is longer than the model's sliding window of {}, which is not supported: lower it, or set model.hf_config_kwargs.sliding_window to null for full attention",
                 r.where("data.max_length"), format_count(plan.max_length), format_count(spec.sliding_window));
  ULY_USER_CHECK(!machine.cuda || r.model.dtype == Dtype::kBf16, "model.dtype ({}): attention on a GPU computes in bf16: expected bf16, or --device cpu", r.where("model.dtype"));
  ULY_USER_CHECK(!machine.cuda || spec.H <= 256, "{}: its heads have {} columns: attention on a GPU takes at most 256; use --device cpu", spec.name, spec.H);
  ULY_USER_CHECK(!machine.cuda || !r.deterministic || (gpu_attention(r, machine, spec.H) == ops::AttentionBackend::kCudnn && is_fast_with_cudnn(machine)),
                 "deterministic ({}): only cuDNN's attention on sm_90 and newer, with heads of a multiple of 8 columns, adds in a fixed order; remove the key, or use --device cpu", r.where("deterministic"));
  recipe::learning_rate(r.scheduler, r.optimizer.learning_rate, 0, 1);

  std::optional<data::TokenFile> file;
  data::Selection selection;
  // Where not even the shortest length fits, which samples are as short is no matter.
  if (facts && !(plan.longest && plan.longest->max_length == 0)) {
    file.emplace(facts->tokens_path);
    ULY_USER_CHECK(file->vocabulary() <= spec.V, "{}: its token ids reach {}, the model's vocabulary has {}: use the model's own tokenizer", facts->tokens_path, file->vocabulary(), spec.V);
    selection = data::select(*file, plan.max_length, r.data.filter_samples, r.where("data.max_length"));
    plan.num_samples = static_cast<int64_t>(selection.samples.size());
    ULY_USER_CHECK(plan.num_samples >= plan.mesh.R() || r.min_iterations > 0, "data.sources ({}): {} sample{} for {} replicas (world {} / sequence_parallel_size {}): give more data or fewer ranks",
                   r.where("data.sources"), plan.num_samples, plan.num_samples == 1 ? "" : "s", plan.mesh.R(), plan.mesh.W, plan.mesh.P);
    const Steps steps = count_steps(r, plan.mesh.R(), plan.num_samples);
    plan.steps_per_epoch = steps.per_epoch, plan.horizon = steps.horizon, plan.num_steps = steps.run;
  }

  plan.planned_length = padded_length(r, plan.max_length, plan.mesh.P, longest_micro_batch(r, plan.mesh.R(), plan.max_length, file ? &*file : nullptr, selection));
  choose_options(plan, r, spec, machine, world);
  Question q = question(plan, r, machine);
  plan.rates = q.rates;
  q.thorough = asked.explain;
  choose_kept(step::Model(spec), plan, q);
  if (!plan.fits) plan.why_not = why_not(plan, r, spec, machine, world);
  plan.hash = hash_of(r, spec, plan);
  if (asked.longest && !plan.longest && plan.room.device_bytes > 0) plan.longest = find_longest(r, spec, machine, world, kLongestAsked, 256, plan.max_length);
  explain(plan, r, spec, machine, file ? facts : std::nullopt, selection, asked);
  return plan;
}

}  // namespace uly::plan
