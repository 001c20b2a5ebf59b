#include "plan/plan.h"

#include <xxhash.h>

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>

#include "base/check.h"
#include "base/shapes.h"
#include "base/units.h"
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

// What ranks on the CPU take of memory beside the program's buffers (bench/planner.py): the files of program and libraries, once for
// a machine; what a rank allocates by running; a thread's part of MKL's buffers for packed factors, and the one that all share: 3/8
// of the largest factor, up to so much.
constexpr int64_t kMappedBytes = 66 * kMiB, kProcessBytes = 60 * kMiB, kThreadBytes = 8 * kMiB, kPackedBytes = 44 * kMiB;
constexpr int64_t kRingBytes = 64 * kMiB;  // through which the disk is reached: engine/disk_tier.h

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

// Tokens of the longest micro-batch: the longest packs that could come together, each as often as an epoch has it.
int64_t longest_micro_batch(const recipe::Recipe& r, int64_t R, const data::Packs& packs, int64_t min_steps) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < packs.size(); ++i) lengths.push_back(packs.tokens(i));
  const int64_t n = std::min(packs.size(), r.micro_batch_size), in_epoch = min_steps * r.micro_batch_size * r.gradient_accumulation_steps * R;
  const int64_t times = std::max<int64_t>(1, ceil_div(in_epoch, packs.size()));
  std::partial_sort(lengths.begin(), lengths.begin() + n, lengths.end(), std::greater<>());
  int64_t tokens = 0;
  for (int64_t i = 0, left = r.micro_batch_size; i < n && left > 0; ++i, left -= times) tokens += lengths[static_cast<size_t>(i)] * std::min(left, times);
  return tokens;
}

// Of attention's arithmetic over S tokens in one document, what the micro-batch takes that takes most.
double document_share(const recipe::Recipe& r, const data::Packs& packs, int64_t S) {
  double most = 0;
  for (int64_t i = 0; i < packs.size(); ++i) most = std::max(most, packs.squared_lengths(i));
  return std::min(1.0, most * static_cast<double>(r.micro_batch_size) / (static_cast<double>(S) * static_cast<double>(S)));
}

// Throws UserError where nothing is left to train or to evaluate on.
void check_left(const recipe::Recipe& r, const data::TokenFile& file, const data::Packs& packs, int64_t max_length, const std::string& key) {
  if (packs.size() > 0) return;
  if (packs.left_out.samples > 0)
    user_error("{} ({}): expected texts for a pack of max_length {} at least, found {} tokens: lower data.max_length, or give more data", r.type == "causal" ? key : "data.drop_last", r.where(r.type == "causal" ? key : "data.drop_last"),
               format_count(max_length), format_count(packs.left_out.tokens));
  ULY_USER_CHECK(packs.weighed_out.samples == 0 || packs.dropped.samples > 0, "{} ({}): of {} samples their sources' weight takes none: a greater weight, or more data", key, r.where(key), format_count(packs.weighed_out.samples));
  ULY_USER_CHECK(packs.dropped.samples > 0, "{} ({}): expected samples with tokens, found none", key, r.where(key));
  int64_t shortest = file.length(0);
  for (int64_t i = 0; i < file.num_samples(); ++i) shortest = std::min(shortest, file.length(i));
  user_error("{}: max_length {} is below every sample: the shortest of {} has {} tokens; raise data.max_length", r.where("data.max_length"), format_count(max_length), format_count(file.num_samples()), format_count(shortest));
}

std::shared_ptr<const data::TokenFile> open_tokens(const std::string& path, const models::Spec& spec) {
  auto file = std::make_shared<const data::TokenFile>(path);
  ULY_USER_CHECK(file->vocabulary() <= spec.V, "{}: its token ids reach {}, the model's vocabulary has {}: use the model's own tokenizer", path, file->vocabulary(), spec.V);
  return file;
}

// Opens the token files and packs them.
void load_data(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const DataFacts& facts) {
  const auto fill = [&](Packed& packed, const std::vector<int64_t>* samples, const data::PackRules& rules, const std::string& key) {
    packed.packs = std::make_shared<const data::Packs>(data::make_packs(*packed.file, samples, rules));
    check_left(r, *packed.file, *packed.packs, plan.max_length, key);
    for (int64_t i = 0; i < packed.packs->size(); ++i) packed.padded_tokens += padded_length(r, plan.max_length, plan.mesh.P, packed.packs->tokens(i));
  };
  plan.train.file = open_tokens(facts.tokens_path, spec);
  const data::PackRules to_train = data::rules_to_train(r, plan.max_length), to_evaluate = data::rules_to_evaluate(r, plan.max_length);
  if (r.data.eval_share > 0) {
    const int64_t n = plan.train.file->num_samples();
    const data::Split split = data::split_samples(n, r.data.eval_share, static_cast<uint64_t>(r.data.seed));
    const std::string key = "data.train_eval_split";
    ULY_USER_CHECK(!split.train.empty() && !split.eval.empty(), "{} ({}): expected samples on both sides, found {} to train on and {} to evaluate on", key, r.where(key), split.train.size(), split.eval.size());
    plan.eval.file = plan.train.file;
    fill(plan.train, &split.train, to_train, "data.sources");
    fill(plan.eval, &split.eval, to_evaluate, key);
  } else {
    fill(plan.train, nullptr, to_train, "data.sources");
    if (!facts.eval_tokens_path.empty()) {
      plan.eval.file = open_tokens(facts.eval_tokens_path, spec);
      fill(plan.eval, nullptr, to_evaluate, "data.eval_sources");
    }
  }
}

// What the process itself has of the host's memory beside its arenas: torch, CUDA's and cuDNN's own, the data's pages.
constexpr int64_t kHostProcessBytes = int64_t{4} << 30;

// What one rank may use: what the recipe says as far as it is free, else what is. Of the device 0 where that is not known. On the CPU all
// is host memory: a tier of its own only where the recipe says so, of what the device leaves.
Room room(const recipe::Recipe& r, const Machine& machine, int64_t world) {
  const auto capped = [](int64_t asked, int64_t free) { return free > 0 ? std::min(asked, free) : asked; };
  const int64_t ranks = ranks_on_machine(machine, world), memory = machine.memory_bytes / ranks, host = r.memory_host_bytes / ranks;
  Room room;
  if (machine.cuda) {
    const int64_t free = machine.gpu_free_bytes / machine.gpu_ranks;
    room.device_bytes = r.memory_device_bytes > 0 ? capped(r.memory_device_bytes, free) : free;
    if (r.memory_host_bytes > 0) room.host_bytes = capped(host, memory);
    else if (memory > 0) room.host_bytes = std::max<int64_t>(0, machine.memory_bytes / 100 * 96 / ranks - kHostProcessBytes);
  } else if (r.memory_device_bytes > 0) {
    room.device_bytes = capped(r.memory_device_bytes, memory);
    room.host_bytes = memory > 0 ? std::min(host, memory - room.device_bytes) : host;
  } else {
    room.host_bytes = memory > 0 ? std::min(host, memory / 2) : host;
    room.device_bytes = memory > 0 ? memory - room.host_bytes : 0;
  }
  const int64_t disk = machine.disk_bytes > 0 ? capped(machine.disk_bytes, r.memory_disk_bytes) : machine.imagined && r.memory_disk_bytes > 0 ? r.memory_disk_bytes : scratch_bytes(r);
  room.disk_bytes = disk / ranks;
  return room;
}

// Of fp32 copies and results in which the CPU computes products in bf16, the most that are there at once.
int64_t product_copies_bytes(const models::Spec& spec, const step::Options& o) {
  static constexpr int64_t kRowsAtOnce = 2048;  // see engine/cpu/linear.cc
  const auto bytes = [](int64_t rows, int64_t out, int64_t in, bool adds) { return (out * in + std::min(rows, kRowsAtOnce) * (in + (adds ? 2 : 1) * out)) * bytes_of(Dtype::kF32); };
  return std::max({bytes(o.loss_tile, spec.V, spec.D, false), bytes(o.mlp_tile, 2 * spec.F, spec.D, false), bytes(o.mlp_tile, spec.D, spec.F, true), bytes(o.s, spec.qkv_columns(), spec.D, false), bytes(o.s, spec.D, spec.query_columns(), true)});
}

// Beside the program's buffers, on the CPU.
int64_t cpu_besides_bytes(const Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, const ops::Heads& heads) {
  const step::Options& o = plan.options;
  const int64_t ranks = ranks_on_machine(machine, world), threads = std::max<int64_t>(1, machine.cores / ranks);
  int64_t longest = plan.max_length;  // document; samples may be kept whole
  for (const Packed* data : {&plan.train, &plan.eval})
    if (*data) longest = std::max(longest, data->packs->longest_document);
  const int64_t attention = ops::attention_besides_bytes(o.attention, heads, std::min(longest, o.S()), o.dtype);
  const int64_t products = o.dtype == Dtype::kBf16 ? product_copies_bytes(spec, o) : 0;
  const int64_t packed = threads * kThreadBytes + std::min(spec.V * spec.D * bytes_of(Dtype::kF32) / 8 * 3, kPackedBytes);
  const int64_t ring = machine.disk_bytes > 0 || !r.memory_disk_folders.empty() ? kRingBytes : 0;
  return kMappedBytes / ranks + kProcessBytes + packed + std::max(attention, products) + ring;
}

// All but what is kept.
void choose_options(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world) {
  plan.micro_batches = r.gradient_accumulation_steps;
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
  if (o.exchange) o.attention.document_share = plan.document_share;

  plan.room = room(r, machine, world);
  if (!machine.cuda) plan.besides_bytes = cpu_besides_bytes(plan, r, spec, machine, world, most);
  else plan.besides_bytes = kLibraryBytes + (choose_exchanges(machine, world).nccl ? nccl_bytes(o.mesh) : 0) + ops::kGemmWorkspaceBytes + ops::kernel_scratch_bytes(widest_summed_columns(spec)) + ops::attention_besides_bytes(o.attention, most, o.S(), o.dtype);
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
  ULY_USER_CHECK(room(r, machine, world).device_bytes > 0, "data.max_length ({}): auto needs to know how much memory there is: give it with memory.device, or a length", r.where("data.max_length"));
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
  for (const Packed* data : {&plan.train, &plan.eval})
    if (*data) text += fmt::format("|{}|{}|{}|{}", data->file->num_samples(), data->packs->size(), data->packs->num_tokens, data->padded_tokens);
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

Price price_evaluation(const step::Model& model, const step::Options& options, const Rates& rates) {
  Priced priced({options.mesh.P, options.mesh.W}, options.s, ops::document_table_bytes(options.attention, options.S()), rates);
  step::evaluate(priced, model, options, step::make_states(priced, model.units, options));
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

int64_t last_step(const recipe::Recipe& r, int64_t horizon, int64_t start) {
  int64_t last = horizon;
  if (r.exit_iteration > 0) last = std::min(last, r.exit_iteration);
  if (r.exit_iteration_this_run > 0) last = std::min(last, start + r.exit_iteration_this_run);
  return last;
}

Steps count_steps(const recipe::Recipe& r, int64_t R, int64_t num_samples) {
  Steps s;
  const int64_t micro_batches = ceil_div(num_samples, r.micro_batch_size * R);
  s.per_epoch = ceil_div(micro_batches, r.gradient_accumulation_steps);
  if (r.min_iterations > s.per_epoch) s.per_epoch = r.min_iterations;
  s.horizon = r.train_iters > 0 ? r.train_iters : r.epochs * s.per_epoch;
  s.run = last_step(r, s.horizon, 0);
  s.epochs = s.per_epoch > 0 ? ceil_div(s.horizon, s.per_epoch) : 0;
  return s;
}

int64_t free_scratch_bytes(const recipe::Recipe& r) {
  std::map<dev_t, int64_t> folders_on;  // they take turns, also where they share a disk
  std::vector<std::pair<dev_t, int64_t>> found;
  for (const std::string& folder : r.memory_disk_folders) {
    std::error_code error;
    const auto space = std::filesystem::space(folder, error);
    struct stat about{};
    ULY_USER_CHECK(!error && ::stat(folder.c_str(), &about) == 0, "memory.disk ({}): {}: {}", r.where("memory.disk"), folder, error ? error.message() : std::strerror(errno));
    ++folders_on[about.st_dev];
    found.emplace_back(about.st_dev, static_cast<int64_t>(space.available));
  }
  int64_t least = INT64_MAX;
  for (const auto& [disk, bytes] : found) least = std::min(least, bytes / folders_on[disk]);
  return least / 10 * 9 * static_cast<int64_t>(found.size());
}

bool is_in_memory(const std::string& folder) {
  struct statfs about{};
  return ::statfs(folder.c_str(), &about) == 0 && (about.f_type == TMPFS_MAGIC || about.f_type == RAMFS_MAGIC);
}

int64_t scratch_bytes(const recipe::Recipe& r) {
  if (r.memory_disk_folders.empty()) return 0;
  const int64_t free = free_scratch_bytes(r);
  return r.memory_disk_bytes > 0 ? std::min(r.memory_disk_bytes, free) : free;
}

int64_t ranks_on_machine(const Machine& machine, int64_t world) {
  if (machine.local_ranks > 0) return machine.local_ranks;
  return machine.cuda ? std::max<int64_t>(1, std::min(world, machine.gpus * machine.gpu_ranks)) : world;
}

namespace {

// Of one rank. Ranks of a machine share its cores, its memory and its disks; on the CPU nothing is known that was not measured.
Rates rates_for(const Plan& plan, const recipe::Recipe& r, const Machine& machine) {
  const int64_t W = plan.mesh.W, ranks = ranks_on_machine(machine, W);
  const Links links{.W = W, .P = plan.options.exchange_ranks(), .near = plan.mesh.node, .node_ranks = ranks, .gpu_ranks = machine.gpu_ranks, .nccl = choose_exchanges(machine, W).nccl};
  const Rates preset = preset_rates(machine.gpu_name, machine.cores / std::max<int64_t>(1, ranks), links);
  if (!machine.measured) return machine.cuda ? preset : Rates{};
  Rates rates = r.model.dtype == Dtype::kBf16 ? machine.measured->bf16 : machine.measured->fp32;
  // Folders are used in turn: the slowest sets the pace. What was not measured is taken to be as fast as a preset's.
  double slowest = 0;
  for (const std::string& folder : r.memory_disk_folders) {
    std::error_code error;
    const auto found = machine.measured->disks.find(std::filesystem::weakly_canonical(folder, error).string());
    const double one = found != machine.measured->disks.end() ? found->second : preset_rates("", 1).disk_bytes;
    slowest = slowest > 0 ? std::min(slowest, one) : one;
  }
  rates.disk_bytes = slowest * static_cast<double>(std::max<size_t>(1, r.memory_disk_folders.size()));
  const double share = 1.0 / static_cast<double>(ranks);
  rates.disk_bytes *= share, rates.host_update_bytes *= share;
  if (machine.cuda) {  // between GPUs nothing was measured
    rates.sequence_bytes = preset.sequence_bytes, rates.node_bytes = preset.node_bytes, rates.gather_bytes = preset.gather_bytes, rates.scatter_bytes = preset.scatter_bytes;
    return rates;
  }
  rates.shares_cores = true;
  for (double Rates::*rate : {&Rates::gemm_flops, &Rates::attention_forward_flops, &Rates::attention_backward_flops, &Rates::device_bytes, &Rates::to_host_bytes, &Rates::to_device_bytes}) rates.*rate *= share;
  return rates;
}

}  // namespace

Question question(const Plan& plan, const recipe::Recipe& r, const Machine& machine) {
  return {.room = plan.room, .rates = rates_for(plan, r, machine), .besides_bytes = plan.besides_bytes, .cuda = machine.cuda, .micro_batches = r.gradient_accumulation_steps};
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

  ULY_USER_CHECK(r.micro_batch_size <= recipe::kMostTokens / plan.max_length, "micro_batch_size ({}): {} samples of up to {} tokens are more than the {} that a micro-batch may have", r.where("micro_batch_size"),
                 format_count(r.micro_batch_size), format_count(plan.max_length), format_count(recipe::kMostTokens));
  // Where not even the shortest length fits, which samples are as short is no matter.
  int64_t longest = r.micro_batch_size * plan.max_length;
  if (facts && !(plan.longest && plan.longest->max_length == 0)) {
    load_data(plan, r, spec, *facts);
    const data::Packs& packs = *plan.train.packs;
    plan.num_samples = packs.size();
    ULY_USER_CHECK(plan.num_samples >= plan.mesh.R() || r.min_iterations > 0, "data.sources ({}): {} {}{} for {} replicas (world {} / sequence_parallel_size {}): give more data or fewer ranks",
                   r.where("data.sources"), plan.num_samples, r.data.pack_samples ? "pack" : "sample", plan.num_samples == 1 ? "" : "s", plan.mesh.R(), plan.mesh.W, plan.mesh.P);
    const Steps steps = count_steps(r, plan.mesh.R(), plan.num_samples);
    plan.steps_per_epoch = steps.per_epoch, plan.horizon = steps.horizon, plan.num_steps = steps.run;
    longest = longest_micro_batch(r, plan.mesh.R(), packs, r.min_iterations);
    if (plan.eval) longest = std::max(longest, longest_micro_batch(r, plan.mesh.R(), *plan.eval.packs, 0));
  }
  plan.planned_length = padded_length(r, plan.max_length, plan.mesh.P, longest);
  if (plan.train) plan.document_share = document_share(r, *plan.train.packs, plan.planned_length);
  choose_options(plan, r, spec, machine, world);
  Question q = question(plan, r, machine);
  plan.rates = q.rates;
  q.thorough = asked.explain;
  choose_kept(step::Model(spec), plan, q);
  if (asked.longest && !plan.longest && plan.room.device_bytes > 0) {
    plan.longest = find_longest(r, spec, machine, world, kLongestAsked, 256, plan.max_length);
    // It is found to half a percent, within which this one may lie.
    if (plan.fits && plan.longest->max_length < plan.max_length) plan.longest->max_length = plan.max_length;
  }
  if (!plan.fits) plan.why_not = why_not(plan, r, spec, machine, world);
  if (r.eval_interval > 0) {
    const Price price = price_evaluation(step::Model(spec), plan.options, plan.rates);
    plan.eval_seconds = price.seconds, plan.eval_bytes = price.step_places.of(ops::Tier::kDevice);
  }
  plan.hash = hash_of(r, spec, plan);
  explain(plan, r, spec, machine, asked);
  return plan;
}

}  // namespace uly::plan
