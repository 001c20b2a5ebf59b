// What was asked: a recipe file as one struct a section. Reading is strict; every key of the format is decided in
// fields.cc: it works, has no effect (said in the plan), comes later (plan accepts, train refuses), or is refused.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/json.h"

namespace uly::recipe {

enum class PadTo { kDivLength, kMaxLength };
enum class LossReduction { kToken, kSample };
enum class PackStrategy { kInOrder, kBestFit };
// What becomes of a sample longer than max_length; kKeep: it is trained whole.
enum class Overlong { kDrop, kTruncateLeft, kTruncateRight, kSplit, kKeep };

struct Model {
  std::string name_or_path;
  Dtype dtype = Dtype::kBf16;          // kBf16 or kF32
  bool random_init = false;            // init: random
  bool disable_activation_checkpoint = false;
  Json hf_config_kwargs = Json::object();
};

struct Tokenizer {
  std::string name_or_path;            // default: the model's
};

struct Source {
  std::string name_or_path;            // hub id, folder, file, or a builder name such as "json"
  std::string split = "train";
  double weight = 1;                   // how often each of its samples is seen in an epoch
  Json as_given = Json::object();      // the whole mapping, defaults filled in, for `prepare`
};

inline constexpr int64_t kMostTokens = int64_t{1} << 40;  // of a micro-batch: all its sizes are far from 64 bits
inline constexpr int64_t kAutoLength = -1;  // data.max_length: auto, the longest that fits

struct Data {
  std::vector<Source> sources;
  std::vector<Source> eval_sources;
  int64_t max_length = 0;              // 0: key absent, the model's max_position_embeddings; or kAutoLength
  bool mask_inputs = true;
  bool filter_samples = true;
  Overlong overlong = Overlong::kDrop; // where the key is absent, as filter_samples says
  bool pack_samples = false;           // always with type: causal
  PackStrategy pack_strategy = PackStrategy::kInOrder;
  bool always_max_length = false, drop_last = false, repeat_to_pack_max_length = false;
  double fuse_positions_prob = 0;
  double eval_share = 0;               // of train_eval_split
  int64_t div_length = 256;
  PadTo pad_to = PadTo::kDivLength;
  int64_t num_proc = 16;
  int64_t seed = 42;
  std::string cache_dir = "/tmp";
  Json as_given = Json::object();      // the section with defaults, for `prepare`
};

struct Optimizer {
  double learning_rate = 5e-4;
  double weight_decay = 0.1;
  double beta1 = 0.9, beta2 = 0.999;
  double eps = 1e-8;
};

struct Scheduler {
  std::string name = "linear";
  double warmup_ratio = 0.1;
  Json specific = Json::object();      // scheduler_specific_kwargs
};

struct Checkpoint {
  std::string type = "deepspeed";      // deepspeed | huggingface
  std::string output_dir;
  bool enabled = true, auto_resume = false, save_end_of_training = false;
  int64_t save_every_n_steps = 0, save_every_n_epochs = 0, save_total_limit = 0;
};

// What the `deepspeed` section means to this engine.
struct Deepspeed {
  int64_t zero_stage = 3;                       // as given; the engine always shards like stage 3
  double gradient_clipping = 1.0;               // 0: off
  Dtype wire_dtype = Dtype::kF32;               // seq_parallel_communication_data_type
  bool offload_optimizer = false, offload_param = false;
  int64_t hpz_partition_size = 1;               // ranks that share a second copy of the weights; 1: none
};

struct Recipe {
  std::string path;                             // as the user wrote it
  std::string type = "sft";                     // sft | causal
  Model model;
  Tokenizer tokenizer;
  Data data;
  Optimizer optimizer;
  Scheduler scheduler;
  std::vector<Checkpoint> checkpoint;
  Deepspeed deepspeed;
  int64_t epochs = 1;
  int64_t train_log_iter_interval = 1;
  std::string train_log_metrics_path = "train-log-metrics.jsonl";
  int64_t gradient_accumulation_steps = 1, micro_batch_size = 1, sequence_parallel_size = 1;
  bool activation_checkpoint_cpu_offload = false, tiled_mlp_compute = false;
  LossReduction loss_reduction = LossReduction::kToken;
  std::string attention = "auto";               // auto | cudnn | flash: what computes attention on a GPU
  bool deterministic = false;                   // the same bits in every run
  std::string attention_scope = "sequence";     // sequence | shard: `shard` keeps attention inside each rank (a control for experiments)
  int64_t seed = 42;
  int64_t train_iters = 0, eval_interval = 0, eval_log_iter_interval = 1;
  int64_t exit_iteration = 0, exit_iteration_this_run = 0, min_iterations = 0;
  bool overfit_first_batch = false;
  std::string kill_switch_path = "/tmp/at_kill_switch";
  std::string on_nan = "stop";                  // stop | skip: at a loss or gradient norm that is not finite
  double exit_after_seconds = 0;                // exit_after: of wall-clock time, from the first step on; 0: never
  int64_t memory_device_bytes = 0;              // memory.device: what one rank may use; 0 = by the machine
  int64_t memory_host_bytes = 0;                // memory.host: what all ranks of a machine may use besides; 0 = by the machine
  std::vector<std::string> memory_disk_folders; // memory.disk: where scratch files may lie; none: no disk
  int64_t memory_disk_bytes = 0;                // of all ranks of a machine together
  std::string master_weights = "fp32";          // memory.master_weights: fp32 | split
  int64_t memory_tile_bytes = 0;                // memory.tile: of the MLP or the logits; 0 = by the device

  // What a key was taken to mean, in the order of the file: printed in the plan.
  struct Note {
    std::string where;                          // run.yml:14
    std::string key;                            // model.attn_implementation
    std::string text;
  };
  std::vector<Note> notes;
  std::vector<Note> later;                      // accepted by plan, refused by train

  Json normalized;                              // every decided key with its value; ranks compare its hash

  // Returns "run.yml:7" for a key that stands in the file, "command line" for an override, "run.yml" for a default.
  std::string where(const std::string& key) const;
  std::map<std::string, std::string> locations;
};

// Whether runs of this recipe leave states behind for another to go on from; and on their way.
bool saves_states(const Recipe& recipe);
bool saves_on_the_way(const Checkpoint& checkpoint);

// Reads `path` and applies `overrides` ("key.path=value", value read as YAML). Throws UserError naming file, line,
// expectation and finding.
Recipe load(const std::string& path, const std::vector<std::string>& overrides);

// Learning rate of update number `step` (0-based) out of `horizon` updates, as Transformers' schedule of that name gives
// it. Throws UserError for an unknown name or an argument it does not take (call it once in plan).
double learning_rate(const Scheduler& scheduler, double base, int64_t step, int64_t horizon);

// docs/recipe.md, generated from the field tables.
std::string reference_markdown();

}  // namespace uly::recipe
