// The keys at the top level that are no section, and what becomes of each.
#include "recipe/field.h"
#include "recipe/numbers.h"

namespace uly::recipe {
namespace {

using enum Kind;
using enum Decision;

const char* const kMoe = "mixture-of-experts models are not part of this engine; remove the key";

// "a, b" -> a and b.
std::vector<std::string> parts(const std::string& text) {
  std::vector<std::string> out;
  for (size_t from = 0; from <= text.size();) {
    const size_t comma = std::min(text.find(',', from), text.size()), first = text.find_first_not_of(' ', from), last = text.find_last_not_of(' ', comma == 0 ? 0 : comma - 1);
    if (first < comma && last != std::string::npos && last >= first) out.push_back(text.substr(first, last - first + 1));
    from = comma + 1;
  }
  return out;
}

Section memory_section() {
  return {
      .title = "memory",
      .doc = "Room that the plan may use.",
      .fields = {{.name = "device",
                  .alias = "gpu",
                  .kind = kBytes,
                  .doc = "Bytes on each device, such as `80GiB`; by default what the machine has.",
                  .set = [](Recipe& r, const Json& v) { r.memory_device_bytes = v.is_null() ? 0 : bytes_from(v.get<std::string>()).value_or(0); }},
                 {.name = "host",
                  .kind = kBytes,
                  .doc = "Bytes of host memory that all ranks of a machine may use together for what does not fit on the devices; by default, on a GPU, what is free. On the CPU none: there everything is in host memory.",
                  .set = [](Recipe& r, const Json& v) { r.memory_host_bytes = v.is_null() ? 0 : bytes_from(v.get<std::string>()).value_or(0); }},
                 {.name = "disk",
                  .kind = kText,
                  .doc = "Folders for scratch files, with commas between them, best each on a disk of its own; used in turn. None: no disk is used.",
                  .set = [](Recipe& r, const Json& v) { r.memory_disk_folders = v.is_null() ? std::vector<std::string>{} : parts(v.get<std::string>()); }},
                 {.name = "disk_size",
                  .kind = kBytes,
                  .doc = "Bytes that all ranks of a machine may use there together; by default nine tenths of what is free.",
                  .set = [](Recipe& r, const Json& v) { r.memory_disk_bytes = v.is_null() ? 0 : bytes_from(v.get<std::string>()).value_or(0); }},
                 {.name = "tile",
                  .kind = kBytes,
                  .doc = "Bytes of one tile of the MLP or of the logits; by default `2GiB` on a GPU, `64MiB` on the CPU.",
                  .set = [](Recipe& r, const Json& v) { r.memory_tile_bytes = v.is_null() ? 0 : bytes_from(v.get<std::string>()).value_or(0); }},
                 {.name = "master_weights",
                  .initial = "fp32",
                  .choices = {{"fp32"}, {"split"}},
                  .doc = "Master weights in 4 bytes, or split into the bf16 weight and the 16 bits it lacks of fp32: the same precision in 2 bytes less a parameter. A weight that lies exactly between two bf16 values is rounded away from zero, not to even.",
                  .set = into(&Recipe::master_weights)}},
  };
}

// A switch for experts: off it has no effect, on it is refused.
Field no_experts(const char* name, Kind kind) {
  return {.name = name, .kind = kind, .initial = "false", .decision = kRefused, .why = kMoe, .choices = {{"false", kNoEffect, "there are no experts"}}, .doc = "Experts."};
}

}  // namespace

std::vector<Field> run_fields() {
  return {
      {.name = "micro_batch_size", .kind = kInt, .initial = "1", .min = 1, .doc = "Samples in a micro-batch.", .set = into(&Recipe::micro_batch_size)},
      {.name = "gradient_accumulation_steps",
       .kind = kInt,
       .initial = "1",
       .min = 1,
       .doc = "Micro-batches in an update.",
       .set = into(&Recipe::gradient_accumulation_steps)},
      {.name = "sequence_parallel_size",
       .kind = kInt,
       .initial = "1",
       .min = 1,
       .doc = "Devices that share one sequence.",
       .set = into(&Recipe::sequence_parallel_size)},
      {.name = "activation_checkpoint_cpu_offload",
       .kind = kBool,
       .initial = "false",
       .doc = "Asks to keep layers' inputs in host memory. The plan says what is kept where.",
       .set = into(&Recipe::activation_checkpoint_cpu_offload)},
      {.name = "tiled_mlp_compute",
       .kind = kBool,
       .initial = "false",
       .doc = "Asks to compute the MLP in tiles. The plan says how large they are.",
       .set = into(&Recipe::tiled_mlp_compute)},
      {.name = "epochs", .kind = kInt, .initial = "1", .min = 0, .doc = "Passes over the data.", .set = into(&Recipe::epochs)},
      {.name = "train_iters", .kind = kHumanInt, .initial = "0", .min = 0, .doc = "Updates to train; 0: as `epochs` says.", .set = into(&Recipe::train_iters)},
      {.name = "exit_iteration",
       .kind = kInt,
       .initial = "0",
       .min = 0,
       .doc = "Stop after this update; the schedule still counts to the end. 0: off.",
       .set = into(&Recipe::exit_iteration)},
      {.name = "exit_iteration_this_run",
       .kind = kInt,
       .initial = "0",
       .min = 0,
       .doc = "The same, counted from the start of this run.",
       .set = into(&Recipe::exit_iteration_this_run)},
      {.name = "min_iterations",
       .kind = kHumanInt,
       .initial = "0",
       .min = 0,
       .doc = "Repeat the data until it is enough for this many updates.",
       .set = into(&Recipe::min_iterations)},
      {.name = "kill_switch_path",
       .initial = "/tmp/at_kill_switch",
       .doc = "Once this file exists the run stops: where a state is saved (`checkpoint` of type `deepspeed`) with exit code 85, else saving as at its end.",
       .set = into(&Recipe::kill_switch_path)},
      {.name = "exit_after",
       .kind = kHumanNumber,
       .initial = "0",
       .min = 0,
       .doc = "Seconds of wall-clock time from the start of `ulysses`, such as `42_000`, or 11:40:00, which YAML reads as seconds; then the run stops: where a state is saved (`checkpoint` of type `deepspeed`) with exit code 85, else saving as at its end. 0: never.",
       .set = into(&Recipe::exit_after_seconds)},
      {.name = "on_nan",
       .initial = "stop",
       .choices = {{"stop"}, {"skip"}},
       .doc = "When a step's loss or gradient norm is NaN or infinite the step is not applied, and where it came from is said: the layer and the sample. `stop` saves the state and ends with exit code 76, `skip` goes on with the next samples; the learning rate's schedule counts the step, AdamW's bias correction does not.",
       .set = into(&Recipe::on_nan)},
      {.name = "seed", .kind = kInt, .initial = "42", .min = 0, .doc = "Seed of random weights; `data.seed` orders the data.", .set = into(&Recipe::seed)},
      {.name = "loss_log_interval",
       .kind = kHumanInt,
       .initial = "1",
       .min = 0,
       .decision = kNoEffect,
       .why = "the line of every step has its loss",
       .doc = "Kept for existing recipes."},
      {.name = "train_log_iter_interval",
       .kind = kInt,
       .initial = "1",
       .min = 0,
       .max = 1,
       .doc = "0: no metrics.",
       .set = into(&Recipe::train_log_iter_interval)},
      {.name = "train_log_metrics_path",
       .initial = "train-log-metrics.jsonl",
       .doc = "Metrics, a JSON line each; appended.",
       .set = into(&Recipe::train_log_metrics_path)},
      {.name = "eval_interval",
       .kind = kHumanInt,
       .initial = "0",
       .min = 0,
       .doc = "Updates between evaluations; needed where there is data to evaluate on.",
       .set = into(&Recipe::eval_interval)},
      {.name = "eval_log_iter_interval",
       .kind = kHumanInt,
       .initial = "1",
       .min = 1,
       .doc = "Evaluations from one line on the terminal to the next.",
       .set = into(&Recipe::eval_log_iter_interval)},
  };
}

std::vector<Field> experiment_fields() {
  const char* const profiler = "read together with mem_profiler, which comes later; `ulysses plan` shows the bytes of every buffer";
  return {
      {.name = "loss_reduction",
       .initial = "token",
       .choices = {{"token"}, {"sample"}},
       .doc = "`token`: mean over all trained tokens of an update. `sample`: mean of the micro-batches' means.",
       .set = [](Recipe& r, const Json& v) { r.loss_reduction = v == "sample" ? LossReduction::kSample : LossReduction::kToken; }},
      {.name = "attention",
       .initial = "auto",
       .choices = {{"auto"}, {"cudnn"}, {"flash"}},
       .doc = "What computes attention on a GPU: cuDNN, or ATen's flash attention. `auto`: cuDNN where it has fast kernels (sm_90 and newer). On the CPU it is ATen's always.",
       .set = into(&Recipe::attention)},
      {.name = "deterministic",
       .kind = Kind::kBool,
       .initial = "false",
       .doc = "The same bits in every run on a GPU: attention's backward adds in a fixed order, in blocks, which costs about a fifth of its speed (9 % of a step of 65,536 tokens). On the CPU it is so always.",
       .set = into(&Recipe::deterministic)},
      {.name = "attention_scope",
       .initial = "sequence",
       .choices = {{"sequence"}, {"shard"}},
       .doc = "`shard` keeps attention inside each rank's part of the sequence: a control for experiments.",
       .set = into(&Recipe::attention_scope)},
      {.name = "memory", .kind = kSection, .initial = "{}", .doc = "Room that the plan may use.", .section = {memory_section()}},
      {.name = "overfit_first_batch",
       .kind = kBool,
       .initial = "false",
       .doc = "Train on the first batch again and again.",
       .set = into(&Recipe::overfit_first_batch)},
      {.name = "mem_profiler",
       .decision = kWorks,
       .choices = {{"step", kLater, "profiles of memory"}, {"e2e", kLater, "profiles of memory"}},
       .doc = "Memory history of every step, or of the whole run."},
      {.name = "mem_profiler_dir", .decision = kNoEffect, .why = profiler, .doc = "Where profiles go."},
      {.name = "mem_profiler_max_entries",
       .kind = kHumanInt,
       .initial = "100_000",
       .min = 1,
       .decision = kNoEffect,
       .why = profiler,
       .doc = "Longest history."},
      {.name = "code",
       .decision = kRefused,
       .why = "code of the user's own is not run; prepare data with `ulysses prepare` and describe the rest by keys",
       .doc = "A Python file of the user's."},
      {.name = "skip_validation",
       .kind = kBool,
       .initial = "false",
       .decision = kNoEffect,
       .why = "every recipe is checked",
       .doc = "Kept for existing recipes."},
      {.name = "expert_parallel_size",
       .kind = kInt,
       .initial = "1",
       .min = 1,
       .decision = kRefused,
       .why = kMoe,
       .choices = {{"1", kNoEffect, "there are no experts"}},
       .doc = "Experts."},
      no_experts("arctic_moe", kAny),
      no_experts("enable_arctic_moe_custom_optimization", kBool),
      no_experts("enable_routing_replay", kBool),
  };
}

}  // namespace uly::recipe
