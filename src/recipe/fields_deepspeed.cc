// Every key of `deepspeed`: few mean something to this engine, the others are noted.
#include "recipe/field.h"

namespace uly::recipe {
namespace {

using enum Kind;
using enum Decision;

std::vector<Field> without_effect(const char* why, std::initializer_list<const char*> names) {
  std::vector<Field> out;
  for (const char* name : names) out.push_back({.name = name, .kind = kAny, .decision = kNoEffect, .why = why, .doc = "Kept for existing recipes."});
  return out;
}

void append(std::vector<Field>& fields, const std::vector<Field>& more) { fields.insert(fields.end(), more.begin(), more.end()); }

Section offload_section(const char* title, bool Deepspeed::*member) {
  const char* const planned = "the plan says what is kept where";
  Section out{
      .title = title,
      .doc = "Asks to keep it in host memory. The plan says what is kept where.",
      .fields = {{.name = "device",
                  .initial = "none",
                  .choices = {{"none"}, {"cpu"}, {"nvme", kNoEffect, "taken as cpu; a disk is used where memory.disk names a folder (see the plan)", "cpu"}},
                  .doc = "`cpu`: asked for.",
                  .set = [=](Recipe& r, const Json& v) { r.deepspeed.*member = v == "cpu"; }}},
      .open = true,
      .open_why = planned,
  };
  append(out.fields, without_effect(planned, {"pin_memory", "ratio", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "pipeline",
                                              "pipeline_read", "pipeline_write"}));
  return out;
}

Section zero_section() {
  const char* const as_three = "every stage runs as 3: weights, gradients and optimizer states are sharded over all ranks";
  Section out{
      .title = "deepspeed.zero_optimization",
      .doc = "Weights, gradients and optimizer states are always sharded over all ranks.",
      .fields =
          {
              {.name = "stage",
               .kind = kHumanInt,
               .initial = "3",
               .choices = {{"0", kNoEffect, as_three}, {"1", kNoEffect, as_three}, {"2", kNoEffect, as_three}, {"3"}},
               .doc = "Kept as given; every stage runs as 3.",
               .set = into(&Recipe::deepspeed, &Deepspeed::zero_stage)},
              {.name = "offload_optimizer",
               .kind = kSection,
               .initial = "{}",
               .doc = "Optimizer states in host memory.",
               .section = {offload_section("deepspeed.zero_optimization.offload_optimizer", &Deepspeed::offload_optimizer)}},
              {.name = "offload_param",
               .kind = kSection,
               .initial = "{}",
               .doc = "Weights in host memory.",
               .section = {offload_section("deepspeed.zero_optimization.offload_param", &Deepspeed::offload_param)}},
              {.name = "zero_hpz_partition_size",
               .kind = kInt,
               .initial = "1",
               .min = 1,
               .doc = "Ranks, in a row, that share a second copy of the weights in the compute dtype: those of a node. Weights are gathered from all ranks once after an update, afterwards inside the node. A divisor of the ranks; 1: no such copy.",
               .set = into(&Recipe::deepspeed, &Deepspeed::hpz_partition_size)},
          },
      .open = true,
      .open_why = "buffers and prefetching are planned, not set",
  };
  append(out.fields, without_effect("buffers and prefetching are planned, not set", {"contiguous_gradients",
                                                                                     "reduce_scatter",
                                                                                     "overlap_comm",
                                                                                     "reduce_bucket_size",
                                                                                     "use_multi_rank_bucket_allreduce",
                                                                                     "allgather_partitions",
                                                                                     "allgather_bucket_size",
                                                                                     "sub_group_size",
                                                                                     "stage3_prefetch_bucket_size",
                                                                                     "stage3_param_persistence_threshold",
                                                                                     "stage3_model_persistence_threshold",
                                                                                     "stage3_max_live_parameters",
                                                                                     "stage3_max_reuse_distance",
                                                                                     "stage3_gather_16bit_weights_on_model_save",
                                                                                     "stage3_gather_fp16_weights_on_model_save",
                                                                                     "stage3_module_granularity_threshold",
                                                                                     "stage3_use_all_reduce_for_fetch_params",
                                                                                     "memory_efficient_linear",
                                                                                     "round_robin_gradients",
                                                                                     "elastic_checkpoint",
                                                                                     "load_from_fp32_weights",
                                                                                     "ignore_unused_parameters",
                                                                                     "legacy_stage1",
                                                                                     "pipeline_loading_checkpoint",
                                                                                     "override_module_apply",
                                                                                     "log_trace_cache_warnings",
                                                                                     "cpu_offload",
                                                                                     "cpu_offload_param",
                                                                                     "cpu_offload_use_pin_memory"}));
  append(out.fields, without_effect("exchanges are exact and over all ranks",
                                    {"zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
                                     "zeropp_loco_param", "mics_shard_size", "mics_hierarchical_params_gather"}));
  return out;
}

Section half_section() {
  return {
      .title = "deepspeed.fp16",
      .doc = "Not offered.",
      .fields = {{.name = "enabled",
                  .kind = kBool,
                  .initial = "false",
                  .decision = kRefused,
                  .why = "training in fp16 needs loss scaling, which this engine has not; use bf16",
                  .doc = "fp16."}},
      .open = true,
      .open_why = "there is no fp16",
  };
}

Section bf16_section(const char* title) {
  Section out{.title = title, .doc = "Precision is `model.dtype`.", .open = true, .open_why = "model.dtype says the precision"};
  append(out.fields, without_effect("model.dtype says the precision", {"enabled", "immediate_grad_update", "check_grad_overflow"}));
  append(out.fields, without_effect("master weights, accumulated gradients and moments are fp32", {"bf16_master_weights_and_grads", "bf16_optimizer_states"}));
  return out;
}

Section autocast_section() {
  Section out{.title = "deepspeed.torch_autocast", .doc = "Precision is `model.dtype`.", .open = true, .open_why = "model.dtype says the precision"};
  append(out.fields, without_effect("model.dtype says the precision", {"enabled", "dtype", "lower_precision_safe_modules"}));
  return out;
}

}  // namespace

Section deepspeed_section() {
  const char* const no_half = "exchanges in fp16 are not offered; use bf16 or fp32";
  Section out{
      .title = "deepspeed",
      .doc = "A DeepSpeed configuration. What it says about sizes and schedules is planned here instead.",
      .fields =
          {
              {.name = "zero_optimization", .kind = kSection, .initial = "{}", .doc = "Sharding and offload.", .section = {zero_section()}},
              {.name = "gradient_clipping",
               .kind = kHumanNumber,
               .initial = "1.0",
               .min = 0,
               .doc = "Largest norm of the whole gradient; 0: no limit.",
               .set = into(&Recipe::deepspeed, &Deepspeed::gradient_clipping)},
              {.name = "seq_parallel_communication_data_type",
               .initial = "fp32",
               .choices = {{"bf16"},
                           {"bfloat16", kWorks, "", "bf16"},
                           {"fp32"},
                           {"float32", kWorks, "", "fp32"},
                           {"fp16", kRefused, no_half},
                           {"float16", kRefused, no_half}},
               .doc = "Precision in which gradients travel.",
               .set = [](Recipe& r, const Json& v) { r.deepspeed.wire_dtype = v == "bf16" ? Dtype::kBf16 : Dtype::kF32; }},
              {.name = "bf16", .kind = kSection, .initial = "{}", .doc = "Precision.", .section = {bf16_section("deepspeed.bf16")}},
              {.name = "bfloat16", .kind = kSection, .initial = "{}", .doc = "Precision.", .section = {bf16_section("deepspeed.bfloat16")}},
              {.name = "fp16", .kind = kSection, .initial = "{}", .doc = "Precision.", .section = {half_section()}},
              {.name = "torch_autocast", .kind = kSection, .initial = "{}", .doc = "Precision.", .section = {autocast_section()}},
          },
      .open = true,
      .open_why = "this engine reads no such key",
  };
  append(out.fields, without_effect("it follows from micro_batch_size, gradient_accumulation_steps and the number of ranks",
                                    {"train_batch_size", "train_micro_batch_size_per_gpu"}));
  append(out.fields, without_effect("the key of that name at the top level says it", {"gradient_accumulation_steps", "sequence_parallel_size"}));
  append(out.fields, without_effect("the section of that name at the top level says it", {"optimizer", "scheduler", "checkpoint", "wandb"}));
  append(out.fields, without_effect("gradients travel as seq_parallel_communication_data_type says and are added in fp32",
                                    {"communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"}));
  append(out.fields,
         without_effect("the plan says what is kept and what is recomputed", {"activation_checkpointing", "compile", "aio", "use_node_local_storage"}));
  append(out.fields, without_effect("metrics lie in train_log_metrics_path", {"steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
                                                                              "flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "comet"}));
  append(out.fields, without_effect("AdamW is the engine's own", {"zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "amp"}));
  return out;
}

}  // namespace uly::recipe
