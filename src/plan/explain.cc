#include "plan/explain.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>

#include "base/shapes.h"
#include "base/units.h"
#include "plan/exchanges.h"
#include "plan/longest.h"
#include "plan/reasons.h"
#include "plan/timeline.h"

namespace uly::plan {
namespace {

// Collects lines for people and facts for programs side by side.
class Writer {
 public:
  Writer(Plan& plan, const recipe::Recipe& r, const models::Spec& spec) : plan_(plan), r_(r), spec_(spec) {}

  template <typename... Args>
  void line(std::string subject, fmt::format_string<Args...> format, Args&&... args) {
    plan_.lines.push_back({std::move(subject), fmt::format(format, std::forward<Args>(args)...)});
  }

  void model();
  void mesh(const Machine& machine);
  void sequence();
  void data();
  void evaluation();
  void heads();
  void tiles();
  void kept();
  void time(const Machine& machine);
  void longest();
  void memory(const Machine& machine);
  void attention();
  void batch();
  void optimizer();
  void offload(const Machine& machine);
  void notes();

 private:
  std::string where(const std::function<std::optional<ops::Tier>(const step::LayerKeep&)>& tier_of) const;
  Json& facts() { return plan_.facts; }

  Plan& plan_;
  const recipe::Recipe& r_;
  const models::Spec& spec_;
};

void Writer::model() {
  const models::Spec& m = spec_;
  const int64_t parameters = models::num_parameters(m);
  const std::string from = m.folder.empty() ? "shape from the table of well-known models" : m.folder;
  line("model", "{} ({}, {} parameters, {}); {}", m.name, m.architecture, format_count(parameters), r_.model.dtype == Dtype::kBf16 ? "bf16" : "fp32", from);
  if (m.randomly_initialized || r_.model.random_init) line("", "weights are initialised at random from seed {}", r_.seed);
  facts()["model"] = {{"name", m.name}, {"architecture", m.architecture}, {"parameters", parameters}, {"dtype", name_of(r_.model.dtype)}, {"folder", m.folder}};
}

void Writer::mesh(const Machine& machine) {
  const step::Mesh& mesh = plan_.mesh;
  line("mesh", "{} rank{} on {} = {} replica{} x {} that share a sequence; weights, gradients and optimizer in {} shard{} (ZeRO-3)", mesh.W, mesh.W == 1 ? "" : "s", machine.cuda ? "GPUs" : "the CPU",
       mesh.R(), mesh.R() == 1 ? "" : "s", mesh.P, mesh.W, mesh.W == 1 ? "" : "s");
  if (mesh.node > 1) line("", "every {} ranks share a second copy of the weights, from which backward gathers them (zero_hpz_partition_size)", mesh.node);
  else if (r_.deepspeed.hpz_partition_size > 1) line("", "zero_hpz_partition_size: all ranks are one node, whose copy of the weights is the one there is: no effect");
  const Exchanges exchanges = choose_exchanges(machine, mesh.W);
  if (machine.cuda && (mesh.W > 1 || exchanges.nccl)) line("exchanges", "{}", exchanges.words);
  if (plan_.options.exchange_parts > 1) line("", "a rank's heads in {} parts: q, k, v of the next and outputs of the last travel under attention", plan_.options.exchange_parts);
  facts()["exchanges"] = {{"by", exchanges.nccl ? "nccl" : "gloo"}, {"words", exchanges.words}, {"parts", plan_.options.exchange_parts}, {"node", mesh.node}};
  facts()["mesh"] = {{"device", machine.cuda ? "cuda" : "cpu"}, {"world", mesh.W}, {"sequence_parallel", mesh.P}, {"replicas", mesh.R()}};
}

void Writer::sequence() {
  const int64_t S = plan_.planned_length, P = plan_.mesh.P;
  line("sequence", "up to {} tokens a sample; the longest micro-batch has {} with padding, {} on each rank", format_count(plan_.max_length), format_count(S), format_count(S / P));
  if (r_.data.max_length == recipe::kAutoLength) line("", "max_length auto: {}", plan_.longest->max_length > 0 ? fmt::format("{}, the longest that fits", format_count(plan_.max_length)) : "nothing fits");
  if (spec_.max_positions > 0 && plan_.max_length > spec_.max_positions)
    line("", "max_length {} is beyond the model's {} positions: it has not been trained there", format_count(plan_.max_length), format_count(spec_.max_positions));
  if (!plan_.options.exchange && P > 1) line("", "attention_scope: shard keeps attention inside each rank: a control for experiments, no sequence parallelism");
  facts()["sequence"] = {{"max_length", plan_.max_length}, {"planned_length", S}, {"shard_tokens", S / P}, {"auto", r_.data.max_length == recipe::kAutoLength}};
}

std::string amount(const data::Amount& a, const char* what = "sample") { return fmt::format("{} {}{}, {} tokens", format_count(a.samples), what, a.samples == 1 ? "" : "s", format_count(a.tokens)); }

Json json_of(const data::Amount& a) { return {{"samples", a.samples}, {"tokens", a.tokens}}; }

// What an epoch is made of, and what became of the rest.
void Writer::data() {
  if (!plan_.train) {
    if (r_.data.pack_samples) line("", "documents are packed once the data is prepared; until then attention is priced as over one document");
    return;
  }
  const data::Packs& p = *plan_.train.packs;
  const int64_t documents = p.num_pieces();
  // A pack's share of its room: of max_length, or of what it is padded to.
  const double room = static_cast<double>(p.size()) * static_cast<double>(plan_.max_length), fill = static_cast<double>(p.num_tokens) / room;
  const int64_t padding = plan_.train.padded_tokens - p.num_tokens;
  line("data", "{} {}, {} tokens; {} longer than max_length {} dropped; longest {}", format_count(documents), r_.data.pack_samples ? "documents" : "samples", format_count(p.num_tokens), format_count(p.dropped.samples), p.dropped.samples == 1 ? "was" : "were", format_count(p.longest_document));
  if (r_.data.pack_samples)
    line("packs", "{} of up to {} tokens, {:.2f} % of their room used ({}); attention takes at most {:.2g} of what one document as long would", format_count(p.size()), format_count(plan_.max_length), 100 * fill,
         r_.data.always_max_length ? "cut to length" : r_.data.pack_strategy == recipe::PackStrategy::kBestFit ? "best fit" : "in order", plan_.document_share);
  const auto say = [&](const data::Amount& a, const std::string& text) {
    if (a.samples > 0) line("", "{} {}", amount(a), text);
  };
  say(p.dropped, "dropped as longer than max_length (data.overlong)");
  if (p.truncated.samples > 0) line("", "{} sample{} truncated to max_length, {} tokens cut off", format_count(p.truncated.samples), p.truncated.samples == 1 ? "" : "s", format_count(p.truncated.tokens));
  say(p.split, "split to max_length");
  if (p.left_out.samples > 0) line("", "{} left out: they do not fill a pack", amount(p.left_out, "document"));
  say(p.repeated, "repeated to fill a pack");
  say(p.weighed_again, "seen again in an epoch (weight)");
  say(p.weighed_out, "not seen in an epoch (weight)");
  if (p.num_cut > 0) line("", "{} document{} cut where a pack was full", format_count(p.num_cut), p.num_cut == 1 ? "" : "s");
  if (p.num_fused > 0) line("", "{} pack{} merged to one document each (data.fuse_positions_prob)", format_count(p.num_fused), p.num_fused == 1 ? "" : "s");
  if (r_.micro_batch_size == 1) line("", "{} tokens of padding, {:.2f} % of what is computed", format_count(padding), 100.0 * static_cast<double>(padding) / static_cast<double>(plan_.train.padded_tokens));
  if (p.longest_in_file * 2 <= plan_.max_length && !r_.data.pack_samples)
    line("", "longest sample {} tokens: max_length {} is never reached because pack_samples is false ({})", format_count(p.longest_in_file), format_count(plan_.max_length), r_.where("data.pack_samples"));
  facts()["data"] = {{"samples", documents}, {"tokens", p.num_tokens}, {"dropped", p.dropped.samples}, {"longest", p.longest_document}, {"tokens_path", plan_.train.file->path()},
                     {"packs", p.size()}, {"fill", fill}, {"padding_tokens", padding}, {"dropped_tokens", p.dropped.tokens}, {"truncated", json_of(p.truncated)}, {"split", json_of(p.split)},
                     {"left_out", json_of(p.left_out)}, {"repeated", json_of(p.repeated)}, {"weighed_again", json_of(p.weighed_again)}, {"weighed_out", json_of(p.weighed_out)}, {"cut", p.num_cut}, {"fused", p.num_fused}, {"attention_share", plan_.document_share}};
}

void Writer::evaluation() {
  if (r_.eval_interval == 0) return;
  std::string what = "data as the recipe says, once it is prepared";
  if (plan_.eval) {
    const data::Packs& p = *plan_.eval.packs;
    const int64_t micro_batches = ceil_div(p.size(), r_.micro_batch_size * plan_.mesh.R());
    what = fmt::format("{} samples, {} tokens in {} micro-batch{} a replica", format_count(p.num_pieces()), format_count(p.num_tokens), format_count(micro_batches), micro_batches == 1 ? "" : "es");
    if (p.dropped.samples > 0) what += fmt::format("; {} dropped", amount(p.dropped));
    facts()["evaluation"] = {{"samples", p.num_pieces()}, {"tokens", p.num_tokens}, {"packs", p.size()}, {"micro_batches", micro_batches}, {"dropped", json_of(p.dropped)}, {"longest", p.longest}};
  }
  line("evaluation", "every {} step{}: {}; forward only, {} within a micro-batch{}", format_count(r_.eval_interval), r_.eval_interval == 1 ? "" : "s", what, format_bytes(plan_.eval_bytes),
       plan_.eval_seconds > 0 ? fmt::format(", at most {:.2f} s", plan_.eval_seconds) : "");
  facts()["evaluation"].update({{"interval", r_.eval_interval}, {"bytes", plan_.eval_bytes}, {"seconds", plan_.eval_seconds}});
}

void Writer::heads() {
  std::map<std::pair<int64_t, int64_t>, int64_t> ranks;
  Json per_rank = Json::array();
  const int64_t P = plan_.options.exchange_ranks();
  for (int64_t p = 0; p < P; ++p) {
    const ops::Heads h = step::heads_of_rank(spec_, P, p);
    ++ranks[{h.n, h.k}];
    per_rank.push_back({{"query", h.n}, {"key_value", h.k}});
  }
  std::string text;
  for (const auto& [nk, count] : ranks) text += fmt::format("{}{}:{}{}", text.empty() ? "" : ", ", nk.first, nk.second, ranks.size() > 1 ? fmt::format(" on {} rank{}", count, count == 1 ? "" : "s") : "");
  line("heads", "{} query, {} key-value of size {}; a rank attends with {} over the whole sequence", spec_.N, spec_.K, spec_.H, text);
  facts()["heads"] = {{"query", spec_.N}, {"key_value", spec_.K}, {"size", spec_.H}, {"per_rank", per_rank}};
}

void Writer::tiles() {
  const step::Options& o = plan_.options;
  line("tiles", "MLP {} x {} tokens, logits and loss {} x {}; logits are never whole", ceil_div(o.s, o.mlp_tile), format_count(o.mlp_tile), ceil_div(o.s, o.loss_tile), format_count(o.loss_tile));
  facts()["tiles"] = {{"mlp_tokens", o.mlp_tile}, {"loss_tokens", o.loss_tile}};
  kept();
}

// "in 28 layers (12 on the device, 16 on the host)"; without the tiers where all are on the device.
std::string Writer::where(const std::function<std::optional<ops::Tier>(const step::LayerKeep&)>& tier_of) const {
  std::array<int64_t, ops::kNumTiers> count{};
  int64_t total = 0;
  for (const step::LayerKeep& k : plan_.options.keep)
    if (const auto tier = tier_of(k)) ++count[static_cast<size_t>(*tier)], ++total;
  if (count[0] == total) return fmt::format("{} layer{}", total, total == 1 ? "" : "s");
  std::string text;
  for (size_t t = 0; t < count.size(); ++t)
    if (count[t] > 0) text += fmt::format("{}{} on the {}", text.empty() ? "" : ", ", count[t], ops::name_of(static_cast<ops::Tier>(t)));
  return fmt::format("{} layer{} ({})", total, total == 1 ? "" : "s", text);
}

// What waits for backward, and where.
void Writer::kept() {
  const step::Options& o = plan_.options;
  using step::Keep;
  using Tier = std::optional<ops::Tier>;
  const auto level = [](Keep least, ops::Tier step::LayerKeep::*tier) { return [=](const step::LayerKeep& k) { return k.level >= least ? Tier(k.*tier) : Tier(); }; };
  const auto input = [](const step::LayerKeep& k) { return k.input ? Tier(k.input_tier) : Tier(); };
  const auto output = [](const step::LayerKeep& k) { return k.output ? Tier(k.output_tier) : Tier(); };
  const auto count = [&](const std::function<bool(const step::LayerKeep&)>& of) { return std::count_if(o.keep.begin(), o.keep.end(), of); };
  const int64_t inputs = count([](const auto& k) { return k.input; }), outputs = count([](const auto& k) { return k.output; });
  const int64_t projections = count([](const auto& k) { return k.level >= Keep::kProjections; }), gate_up = count([](const auto& k) { return k.level >= Keep::kGateUp; });
  const int64_t everything = count([](const auto& k) { return k.level == Keep::kEverything; });
  if (inputs == spec_.L && outputs == spec_.L) {
    line("kept", "layer input, attention output and log-sum-exp in {}; q, k, v too in {}; gate and up too in {}{}; attention is never computed twice", where(input), projections == 0 ? "0" : where(level(Keep::kProjections, &step::LayerKeep::projections_tier)),
         gate_up == 0 ? "0" : where(level(Keep::kGateUp, &step::LayerKeep::gate_up_tier)), everything > 0 ? fmt::format("; all else too in {}, where nothing is computed twice", everything) : "");
  } else {
    line("kept", "layer input in {}, the others are rebuilt by GEMMs from the nearest before, {} at a time", where(input), o.rebuilt_inputs);
    if (outputs == spec_.L) line("", "attention output and log-sum-exp in {}; attention is never computed twice", where(output));
    else line("", "attention output and log-sum-exp in {}: attention of {} layers is computed twice, nothing else fits", outputs == 0 ? "none" : where(output), spec_.L - outputs);
  }
  if (o.lean) line("", "through attention's backward the layer's input and the residual stream's gradient wait on the host");
  facts()["kept_layers"] = {{"input", spec_.L - projections}, {"projections", projections - gate_up}, {"all", gate_up - everything}, {"everything", everything}, {"inputs_kept", inputs}, {"outputs_kept", outputs}, {"rebuilt_inputs", o.rebuilt_inputs}};
  Json tiers = Json::array();
  for (const step::LayerKeep& k : o.keep)
    tiers.push_back({{"level", static_cast<int>(k.level)}, {"input", k.input ? ops::name_of(k.input_tier) : "rebuilt"}, {"output", k.output ? ops::name_of(k.output_tier) : "rebuilt"}, {"projections", ops::name_of(k.projections_tier)}, {"gate_up", ops::name_of(k.gate_up_tier)}});
  facts()["layers"] = tiers;
  if (!o.tiers.empty()) {
    line("states", "{}; updates run under the next step's forward, and are made before saving and at the end", states_words(plan_.states_words, o));
  }
  facts()["states"] = plan_.states_words;
}

void Writer::attention() {
  const ops::AttentionSchedule& a = plan_.options.attention;
  if (a.backend == ops::AttentionBackend::kCpu) return;
  const int64_t S = plan_.options.S(), P = plan_.options.exchange_ranks();
  int64_t most_kv = 0;  // of a rank, in a part
  for (int64_t p = 0; p < P; ++p) most_kv = std::max(most_kv, step::heads_of_rank(spec_, P, p).k / plan_.options.exchange_parts);
  std::string text = a.backend == ops::AttentionBackend::kCudnn ? "cuDNN" : "ATen's flash attention (slower than cuDNN on Hopper and newer; allocates its results besides)";
  if (a.backend == ops::AttentionBackend::kCudnn) {
    if (S > a.forward_block) text += fmt::format("; forward in blocks of {} tokens", format_count(a.forward_block));
    if (a.backward_in_blocks(S)) text += fmt::format("; backward in blocks of {} x {}", format_count(a.backward_queries), format_count(a.backward_keys));
    if (a.kv_heads_at_once < most_kv) text += fmt::format("; {} key-value head{} at a time", a.kv_heads_at_once, a.kv_heads_at_once == 1 ? "" : "s");
  }
  if (a.deterministic) text += "; deterministic: sums in a fixed order, the backward about a fifth slower";
  line("attention", "{}", text);
  plan_.facts["attention"] = {{"backend", a.backend == ops::AttentionBackend::kCudnn ? "cudnn" : "flash"}, {"kv_heads_at_once", std::min(a.kv_heads_at_once, most_kv)}, {"forward_block", a.forward_block},
                              {"backward_queries", a.backward_queries}, {"backward_keys", a.backward_keys}, {"deterministic", a.deterministic}};
}

void Writer::memory(const Machine& machine) {
  const Price& price = plan_.price;
  const TierPrice& p = price.of(ops::Tier::kDevice);
  const int64_t total = total_bytes(plan_);
  Json kinds = Json::object();
  const std::string besides = plan_.besides_bytes > 0 ? fmt::format(" + {} for {}", format_bytes(plan_.besides_bytes), machine.cuda ? "libraries" : "program and libraries") : "";
  line("memory", "{} for {}: {} between steps + {} within one, most at {}{}", format_bytes(total), plan_.mesh.W == 1 ? "the one rank" : "each rank", format_bytes(p.run_bytes),
       format_bytes(price.step_places.of(ops::Tier::kDevice)), p.peak_where, besides);
  if (!machine.gpu_words.empty()) line("", "of {}: {} free", machine.gpu_words, format_bytes(machine.gpu_free_bytes));
  if (!machine.gpu_foreign_words.empty()) line("", "{}", machine.gpu_foreign_words);
  for (const ops::Tier tier : {ops::Tier::kHost, ops::Tier::kDisk})
    if (price.total_bytes(tier) > 0)
      line("", "{} {}: {} between steps + {} within one, of {}", format_bytes(price.total_bytes(tier)), tier == ops::Tier::kHost ? "of host memory" : "on the disk", format_bytes(price.of(tier).run_bytes), format_bytes(price.step_places.of(tier)),
           format_bytes(plan_.room.of(tier)));
  if (!machine.imagined && machine.disk_bytes == 0 && !r_.memory_disk_folders.empty() && r_.memory_disk_bytes > 0)
    if (const int64_t free = free_scratch_bytes(r_); r_.memory_disk_bytes > free) line("", "memory.disk_size ({}): {}, of which {} are free there", r_.where("memory.disk_size"), format_bytes(r_.memory_disk_bytes), format_bytes(free));
  for (const std::string& folder : r_.memory_disk_folders)
    if (!machine.imagined && is_in_memory(folder)) line("", "memory.disk ({}): {} is a file system in memory and no disk: what lies there takes host memory besides the plan's", r_.where("memory.disk"), folder);
  const int64_t ranks = ranks_on_machine(machine, plan_.mesh.W);
  if (r_.memory_device_bytes > plan_.room.device_bytes)
    line("", "memory.device ({}): {}, of which {} are free here{}", r_.where("memory.device"), format_bytes(r_.memory_device_bytes), format_bytes(plan_.room.device_bytes), machine.cuda ? " on each GPU" : ranks > 1 ? " for each rank" : "");
  if (r_.memory_host_bytes / ranks > plan_.room.host_bytes)
    line("", "memory.host ({}): {}, of which {} are free here{}", r_.where("memory.host"), format_bytes(r_.memory_host_bytes), format_bytes(plan_.room.host_bytes * ranks), machine.cuda ? "" : " beside the device's");
  facts()["host_bytes"] = price.total_bytes(ops::Tier::kHost), facts()["disk_bytes"] = price.total_bytes(ops::Tier::kDisk);
  for (int k = 0; k < ops::kNumKinds; ++k) {
    const size_t i = static_cast<size_t>(k);
    const int64_t bytes = p.run_by_kind[i] + p.peak_by_kind[i];
    const std::string name = ops::name_of(static_cast<ops::Kind>(k));
    kinds[name] = bytes;
    if (bytes > 0) line("", "  {:<20} {:>12}", name, format_bytes(bytes));
  }
  facts()["bytes"] = {{"between_steps", p.run_bytes}, {"within_step", price.step_places.of(ops::Tier::kDevice)}, {"libraries", plan_.besides_bytes}, {"alive_at_peak", p.peak_bytes}, {"peak_where", p.peak_where}, {"by_kind", kinds}, {"total", total}, {"budget", plan_.room.device_bytes}};
  facts()["arithmetic"] = {{"gemm_flops", price.gemm_flops}, {"attention_flops", price.attention_flops}, {"exchanged_bytes", price.exchanged_bytes}, {"gathered_bytes", price.gathered_bytes}, {"scattered_bytes", price.scattered_bytes}};
  facts()["fits"] = plan_.fits;
  if (!plan_.fits) line("", "will not fit: {}", plan_.why_not);
}

// What a step takes, by stream.
void Writer::time(const Machine& machine) {
  const Price& p = plan_.price;
  if (plan_.seconds == 0) {
    if (!machine.rates_words.empty()) line("time", "{}", machine.rates_words);
    return;
  }
  std::string streams;
  for (size_t i = 0; i < kStreamNames.size(); ++i)
    if (p.busy[i] > 0) streams += fmt::format("{}{} {:.2f} s", streams.empty() ? "" : ", ", kStreamNames[i], p.busy[i]) + (p.waited[i] > 5e-3 ? fmt::format(" ({:.2f} waited for)", p.waited[i]) : "");
  const double tokens = static_cast<double>(plan_.planned_length) / static_cast<double>(plan_.mesh.P);
  const double n = static_cast<double>(plan_.micro_batches), step = n > 1 ? plan_.seconds : p.seconds;
  if (n > 1)
    line("time", "{:.2f} s a step of {} micro-batches of {} tokens, {:.0f} tokens/s for each rank; the first, under which updates run, {:.2f} s: {}", step, plan_.micro_batches, format_count(plan_.planned_length), n * tokens / step, p.seconds, streams);
  else
    line("time", "{:.2f} s a micro-batch of {} tokens, {:.0f} tokens/s for each rank: {}", p.seconds, format_count(plan_.planned_length), tokens / p.seconds, streams);
  if (!machine.rates_words.empty()) line("", "{}", machine.rates_words);
  if (!plan_.rates.known) line("", "the rates of an H100 are assumed: {}", machine.gpu_name.empty() ? "which GPU this is is not known" : "nothing is known of " + machine.gpu_name);
  facts()["time"] = timeline_facts(p);
  facts()["time"].update({{"seconds", p.seconds}, {"step_seconds", step}, {"tokens_per_second", n * tokens / step}, {"rates_known", plan_.rates.known}, {"rates", to_json(plan_.rates)}, {"measured", machine.measured.has_value()}});
  if (std::none_of(p.busy.begin() + 1, p.busy.end(), [](double busy) { return busy > 0; })) return;
  const auto bars = timeline(p);
  for (size_t i = 0; i < bars.size(); ++i) line(i == 0 ? "timeline" : "", "{}", bars[i]);
}

// How far it could go, and what ends it.
void Writer::longest() {
  if (!plan_.longest) return facts()["longest"] = nullptr, line("longest", "not known, as the memory of this machine is not");
  const Longest& l = *plan_.longest;
  facts()["longest"] = {{"max_length", l.max_length}, {"limited_by", l.limit ? Json(ops::name_of(*l.limit)) : Json()}};
  if (l.max_length == 0) return line("longest", "nothing fits");
  if (!l.limit) return line("longest", "{} tokens fit, {}", format_count(l.max_length), l.max_length < kLongestAsked / 2 ? "the model's sliding window" : "and nobody asks for more");
  if (l.bytes == 0) return line("longest", "{} tokens fit (data.max_length), {} do not", format_count(l.max_length), format_count(l.next_length));
  facts()["longest"].update({{"next_length", l.next_length}, {"bytes", l.bytes}, {"room", l.room_bytes}, {"largest", ops::name_of(l.kind)}, {"largest_bytes", l.kind_bytes}});
  line("longest", "{} tokens fit (data.max_length), then the {} is too small: {} would take {} of its {}, {} of it {}", format_count(l.max_length), *l.limit == ops::Tier::kHost ? "host's memory" : ops::name_of(*l.limit), format_count(l.next_length),
       format_bytes(l.bytes), format_bytes(l.room_bytes), format_bytes(l.kind_bytes), ops::name_of(l.kind));
}

void Writer::batch() {
  const int64_t samples = r_.micro_batch_size * r_.gradient_accumulation_steps * plan_.mesh.R();
  const int64_t longest = plan_.train ? std::max(plan_.max_length, plan_.train.packs->longest) : plan_.max_length;  // samples may be kept whole
  line("batch", "{} {}{} a step ({} x {} micro-batch{} x {} replica{}), at most {} tokens", samples, r_.data.pack_samples ? "pack" : "sample", samples == 1 ? "" : "s", r_.micro_batch_size, r_.gradient_accumulation_steps,
       r_.gradient_accumulation_steps == 1 ? "" : "es", plan_.mesh.R(), plan_.mesh.R() == 1 ? "" : "s", format_count(samples * longest));
  facts()["batch"] = {{"samples", samples}, {"tokens", samples * longest}};
  if (plan_.num_steps >= 0) {
    line("steps", "{} ({} an epoch; the learning rate's schedule has {})", format_count(plan_.num_steps), format_count(plan_.steps_per_epoch), format_count(plan_.horizon));
    facts()["steps"] = {{"run", plan_.num_steps}, {"per_epoch", plan_.steps_per_epoch}, {"horizon", plan_.horizon}};
  } else if (r_.train_iters > 0 || r_.exit_iteration > 0) {
    const int64_t most = r_.train_iters > 0 && r_.exit_iteration > 0 ? std::min(r_.train_iters, r_.exit_iteration) : std::max(r_.train_iters, r_.exit_iteration);
    line("steps", "{}{}", r_.train_iters > 0 ? "" : "at most ", format_count(most));
    facts()["steps"] = {{"at_most", most}};
  } else {
    line("steps", "known once the data is prepared (`ulysses prepare`)");
    facts()["steps"] = nullptr;
  }
}

void Writer::optimizer() {
  line("optimizer", "AdamW, learning rate {:g} ({}, warm-up {:g} %), weight decay {:g}, clipping {}; {} and fp32 moments, gradients summed in fp32, {} on the wire", r_.optimizer.learning_rate,
       r_.scheduler.name, r_.scheduler.warmup_ratio * 100, r_.optimizer.weight_decay, r_.deepspeed.gradient_clipping > 0 ? fmt::format("{:g}", r_.deepspeed.gradient_clipping) : "off",
       plan_.options.split_master ? "master weights split into bf16 and 16 bits" : "fp32 master weights", r_.deepspeed.wire_dtype == Dtype::kBf16 ? "bf16" : "fp32");
  line("loss", "{}", r_.loss_reduction == recipe::LossReduction::kToken ? "mean over all trained tokens of a step, on every rank, replica and micro-batch" : "mean over micro-batches of the mean over their trained tokens");
}

// What became of the wishes about memory.
void Writer::offload(const Machine& machine) {
  const step::Options& o = plan_.options;
  const auto wish = [&](bool asked, const char* key, const std::string& text) {
    if (!asked) return;
    line("", "{} ({}): {}", key, r_.where(key), text);
    facts()["notes"].push_back({{"key", key}, {"where", r_.where(key)}, {"text", text}});
  };
  const bool whole = std::all_of(o.keep.begin(), o.keep.end(), [](const step::LayerKeep& k) { return k.input && k.output; });
  const bool inputs = std::any_of(o.keep.begin(), o.keep.end(), [](const step::LayerKeep& k) { return k.input_tier != ops::Tier::kDevice || k.output_tier != ops::Tier::kDevice; });
  const bool optimizer = std::any_of(o.tiers.begin(), o.tiers.end(), [](const step::UnitTiers& t) { return t.optimizer != ops::Tier::kDevice; });
  const bool weights = std::any_of(o.tiers.begin(), o.tiers.end(), [](const step::UnitTiers& t) { return t.weight != ops::Tier::kDevice; });
  const auto became = [&](bool gone) -> std::string {
    if (!machine.cuda && !gone) return "on the CPU everything is in host memory already";
    if (gone) return "done as far as it makes room or time (see kept and states)";
    if (!plan_.fits) return "not done: nothing fits (see below)";
    if (plan_.room.host_bytes == 0 && plan_.room.disk_bytes == 0) return "not done: no host memory is free for it, nor a disk";
    return whole ? "not needed: there is room on the device, where it is faster" : "not done: a step takes no less with it (see kept and states)";
  };
  wish(r_.activation_checkpoint_cpu_offload, "activation_checkpoint_cpu_offload", became(inputs));
  wish(r_.deepspeed.offload_optimizer, "deepspeed.zero_optimization.offload_optimizer", became(optimizer));
  wish(r_.deepspeed.offload_param, "deepspeed.zero_optimization.offload_param", became(weights));
  wish(r_.tiled_mlp_compute, "tiled_mlp_compute", fmt::format("the MLP is always tiled where that saves memory: {} x {} tokens", ceil_div(o.s, o.mlp_tile), format_count(o.mlp_tile)));
  const size_t all = static_cast<size_t>(std::count_if(o.keep.begin(), o.keep.end(), [](const step::LayerKeep& k) { return k.input && k.output && k.level == step::Keep::kEverything; }));
  wish(r_.model.disable_activation_checkpoint, "model.disable_activation_checkpoint", all == o.keep.size() ? "done: nothing is rebuilt" : fmt::format("done as far as there is room: {} of {} layers keep everything, what others lack is rebuilt (see kept)", all, o.keep.size()));
}

void Writer::notes() {
  const auto list = [&](const char* subject, const char* name, const std::vector<recipe::Recipe::Note>& notes) {
    bool first = true;
    for (const recipe::Recipe::Note& n : notes) {
      line(first ? subject : "", "{} ({}): {}", n.key, n.where, n.text);
      facts()[name].push_back({{"key", n.key}, {"where", n.where}, {"text", n.text}});
      first = false;
    }
  };
  list("keys", "notes", r_.notes);
  list("not yet", "later", r_.later);
}

}  // namespace

void explain(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, const Asked& asked) {
  plan.facts = Json::object();
  plan.facts["recipe"] = r.path;
  plan.facts["notes"] = Json::array();
  plan.facts["later"] = Json::array();
  Writer w(plan, r, spec);
  w.model();
  w.mesh(machine);
  w.sequence();
  w.data();
  w.heads();
  w.tiles();
  w.attention();
  w.memory(machine);
  w.time(machine);
  if (asked.longest) w.longest();
  w.batch();
  w.evaluation();
  w.optimizer();
  w.notes();
  w.offload(machine);
  if (asked.explain) add_reasons(plan, spec, question(plan, r, machine));
  plan.facts["pricings"] = {{"search", plan.pricings}, {"longest", plan.longest ? plan.longest->pricings : 0}};
  plan.facts["hash"] = plan.hash;
}

std::string text(const Plan& plan) {
  std::string out;
  for (const Line& line : plan.lines) out += fmt::format("{:<10} {}\n", line.subject, line.text);
  return out;
}

}  // namespace uly::plan
