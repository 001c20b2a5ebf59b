// The keys of the small sections, and what becomes of each.
#include "recipe/field.h"
#include "recipe/schedule.h"

namespace uly::recipe {
namespace {

using enum Kind;
using enum Decision;

Section model_section() {
  const char* const half = "training in fp16 needs loss scaling, which this engine has not; use bf16";
  return {
      .title = "model",
      .doc = "Which model is trained, and in what precision it computes.",
      .fields =
          {
              {.name = "type",
               .initial = "huggingface",
               .choices = {{"huggingface"}, {"liger", kNoEffect, "the engine brings its own fused kernels for every model"}},
               .doc = "Kept for existing recipes."},
              {.name = "name_or_path",
               .initial = kRequired,
               .doc = "Hub id, or a folder in the Hugging Face layout.",
               .set = into(&Recipe::model, &Model::name_or_path)},
              {.name = "init",
               .initial = "pretrained",
               .choices = {{"pretrained"}, {"random"}},
               .doc = "`random` draws the weights anew, from `seed`; no weights are read.",
               .set = [](Recipe& r, const Json& v) { r.model.random_init = v == "random"; }},
              {.name = "dtype",
               .initial = "bf16",
               .choices = {{"bf16"},
                           {"bfloat16", kWorks, "", "bf16"},
                           {"bfloat", kWorks, "", "bf16"},
                           {"torch.bfloat16", kWorks, "", "bf16"},
                           {"fp32"},
                           {"float32", kWorks, "", "fp32"},
                           {"float", kWorks, "", "fp32"},
                           {"torch.float32", kWorks, "", "fp32"},
                           {"fp16", kRefused, half},
                           {"float16", kRefused, half},
                           {"half", kRefused, half},
                           {"torch.float16", kRefused, half}},
               .doc = "Precision of weights and activations. Master weights, moments and accumulated gradients are fp32.",
               .set = [](Recipe& r, const Json& v) { r.model.dtype = v == "fp32" ? Dtype::kF32 : Dtype::kBf16; }},
              {.name = "hf_config_kwargs",
               .kind = kFree,
               .initial = "{}",
               .doc = "Overrides of the model's config.json.",
               .set = into(&Recipe::model, &Model::hf_config_kwargs)},
              {.name = "disable_activation_checkpoint",
               .kind = kBool,
               .initial = "false",
               .doc = "Asks that no layer is recomputed. The plan says what is kept.",
               .set = into(&Recipe::model, &Model::disable_activation_checkpoint)},
              {.name = "attn_implementation",
               .initial = "sdpa",
               .decision = kNoEffect,
               .why = "attention is the engine's own: exact, documents kept apart",
               .doc = "Kept for existing recipes."},
              {.name = "save_name",
               .decision = kNoEffect,
               .why = "checkpoints are named by `checkpoint.output_dir` and the step",
               .doc = "Kept for existing recipes."},
              {.name = "peft_config",
               .kind = kFree,
               .decision = kRefused,
               .why = "adapters are not trained here: every weight is; remove the key",
               .doc = "Adapters."},
          },
  };
}

Section tokenizer_section() {
  return {
      .title = "tokenizer",
      .doc = "How text becomes tokens.",
      .fields =
          {
              {.name = "type", .initial = "huggingface", .choices = {{"huggingface"}}, .doc = "Kept for existing recipes."},
              {.name = "name_or_path",
               .doc = "Hub id or folder; by default the model's.",
               .set = [](Recipe& r, const Json& v) { r.tokenizer.name_or_path = v.is_null() ? "" : v.get<std::string>(); }},
              {.name = "tokenize_kwargs",
               .kind = kFree,
               .initial = "{}",
               .decision = kNoEffect,
               .why = "texts are tokenized without special tokens, and framed by the tokenizer's first and last token",
               .doc = "Arguments of the tokenizer's call."},
          },
  };
}

Section optimizer_section() {
  const char* const adam = "AdamW either way; the plan says where its states live";
  const char* const no_moe = "optimizers for mixtures of experts are not part of this engine; use fused_adam";
  return {
      .title = "optimizer",
      .doc = "AdamW with bias correction. Biases and norm weights are not decayed; epsilon is 1e-8.",
      .fields =
          {
              {.name = "type",
               .initial = "fused_adam",
               .choices =
                   {{"fused_adam", kNoEffect, adam}, {"cpu_adam", kNoEffect, adam}, {"fused_adam_moe", kRefused, no_moe}, {"cpu_adam_moe", kRefused, no_moe}},
               .doc = "Kept for existing recipes."},
              {.name = "learning_rate",
               .alias = "lr",
               .kind = kHumanNumber,
               .initial = "5.0e-4",
               .min = 0,
               .doc = "Highest learning rate; `scheduler` shapes it.",
               .set = into(&Recipe::optimizer, &Optimizer::learning_rate)},
              {.name = "weight_decay",
               .kind = kHumanNumber,
               .initial = "0.1",
               .min = 0,
               .doc = "Decoupled weight decay.",
               .set = into(&Recipe::optimizer, &Optimizer::weight_decay)},
              {.name = "betas",
               .kind = kNumbers,
               .initial = "[0.9, 0.999]",
               .min = 0,
               .below = 1,
               .count = 2,
               .doc = "Decay of the first and of the second moment.",
               .set = [](Recipe& r, const Json& v) { r.optimizer.beta1 = v[0].get<double>(), r.optimizer.beta2 = v[1].get<double>(); }},
          },
  };
}

std::vector<Choice> schedule_choices() {
  std::vector<Choice> out;
  for (const std::string& name : schedule_names()) out.push_back({name});
  const char* const metric = "it follows a metric, not the step number; use a schedule such as linear, cosine or warmup_stable_decay";
  out.push_back({"reduce_lr_on_plateau", kRefused, metric});
  out.push_back({"greedy", kRefused, metric});
  return out;
}

Section scheduler_section() {
  return {
      .title = "scheduler",
      .doc = "The learning rate over the updates, by the names and formulas of Transformers. Counted in optimizer updates.",
      .fields =
          {
              {.name = "type",
               .initial = "huggingface",
               .choices = {{"huggingface"}, {"wds", kRefused, "use type: huggingface with name: warmup_stable_decay"}},
               .doc = "Kept for existing recipes."},
              {.name = "name", .initial = "linear", .choices = schedule_choices(), .doc = "Which schedule.", .set = into(&Recipe::scheduler, &Scheduler::name)},
              {.name = "warmup_ratio",
               .kind = kHumanNumber,
               .initial = "0.1",
               .min = 0,
               .max = 1,
               .doc = "Share of the updates that warm up, rounded down.",
               .set = into(&Recipe::scheduler, &Scheduler::warmup_ratio)},
              {.name = "scheduler_specific_kwargs",
               .kind = kFree,
               .initial = "{}",
               .doc = "The schedule's own arguments, such as `num_cycles` or `min_lr`.",
               .set = into(&Recipe::scheduler, &Scheduler::specific)},
              {.name = "learning_rate",
               .alias = "lr",
               .kind = kAny,
               .decision = kRefused,
               .why = "it is a key of the optimizer; write optimizer.learning_rate",
               .doc = "Moved to `optimizer`."},
          },
  };
}

Section checkpoint_section() {
  const auto list = &Recipe::checkpoint;
  return {
      .title = "checkpoint",
      .doc = "What is saved, and when: one mapping or a list of them.",
      .fields =
          {
              {.name = "type",
               .initial = "deepspeed",
               .choices = {{"deepspeed"}, {"huggingface"}},
               .doc = "`huggingface`: weights that Transformers loads. `deepspeed`: the whole state, to go on from (docs/operations.md); it is written while training goes on.",
               .set = into_newest(list, &Checkpoint::type)},
              {.name = "output_dir", .initial = kRequired, .doc = "Folder, relative to the current one.", .set = into_newest(list, &Checkpoint::output_dir)},
              {.name = "enabled",
               .kind = kBool,
               .initial = "true",
               .doc = "false: as if the entry were not there.",
               .set = into_newest(list, &Checkpoint::enabled)},
              {.name = "save_every_n_steps",
               .kind = kHumanInt,
               .initial = "0",
               .min = 0,
               .doc = "Updates between saves; 0: none.",
               .set = into_newest(list, &Checkpoint::save_every_n_steps)},
              {.name = "save_every_n_epochs",
               .kind = kHumanInt,
               .initial = "0",
               .min = 0,
               .doc = "Epochs between saves; 0: none.",
               .set = into_newest(list, &Checkpoint::save_every_n_epochs)},
              {.name = "save_end_of_training",
               .kind = kBool,
               .initial = "false",
               .doc = "Save once more at the end.",
               .set = into_newest(list, &Checkpoint::save_end_of_training)},
              {.name = "auto_resume",
               .kind = kBool,
               .initial = "false",
               .doc = "Go on from the newest state in `output_dir` that is whole, if there is one; at most one entry, of type `deepspeed`.",
               .set = into_newest(list, &Checkpoint::auto_resume)},
              {.name = "save_total_limit",
               .kind = kHumanInt,
               .initial = "0",
               .min = 0,
               .doc = "States that are kept, the newest; 0: all. Of type `deepspeed`.",
               .set = into_newest(list, &Checkpoint::save_total_limit)},
          },
      .begin = [](Recipe& r) { r.checkpoint.emplace_back(); },
  };
}

Section logger_section() {
  const char* const ranks = "one process prints; a rank that fails says so itself";
  return {
      .title = "logger",
      .doc = "Lines for people.",
      .fields =
          {
              {.name = "output_dir", .initial = "/dev/null", .decision = kNoEffect, .why = "lines for people go to stderr, figures to train_log_metrics_path", .doc = "Kept for existing recipes."},
              {.name = "level", .initial = "WARNING", .decision = kNoEffect, .why = "there is one line a step, and what goes wrong is always said", .doc = "Kept for existing recipes."},
              {.name = "print_output_ranks", .kind = kRanks, .initial = "[0]", .decision = kNoEffect, .why = ranks, .doc = "Kept for existing recipes."},
              {.name = "file_output_ranks", .kind = kRanks, .initial = "'*'", .decision = kNoEffect, .why = ranks, .doc = "Kept for existing recipes."},
          },
  };
}

Section wandb_section() {
  const char* const off = "read together with wandb.enable, which comes later";
  return {
      .title = "wandb",
      .doc = "Weights & Biases. Until it comes, metrics lie in `train_log_metrics_path`.",
      .fields =
          {
              {.name = "enable", .kind = kBool, .initial = "false", .decision = kLater, .why = "sending metrics to Weights & Biases", .doc = "Send metrics."},
              {.name = "entity", .decision = kNoEffect, .why = off, .doc = "Account."},
              {.name = "project", .initial = "arctic-training", .decision = kNoEffect, .why = off, .doc = "Project."},
              {.name = "name", .decision = kNoEffect, .why = off, .doc = "Name of the run."},
          },
  };
}

}  // namespace

Section recipe_section() {
  Section out{.title = "The whole file", .doc = "Keys at the top level."};
  out.fields = {
      {.name = "type",
       .initial = "sft",
       .choices = {{"sft"}, {"causal"}, {"dpo", kRefused, "preference training is not part of this engine; use sft"}},
       .doc = "What is trained: `sft`, answers in chats; `causal`, plain text: joined, and cut to documents that fill packs of exactly `max_length`; what does not fill one at the end is left out.",
       .set = into(&Recipe::type)},
      {.name = "model", .kind = kSection, .initial = kRequired, .doc = "Which model is trained.", .section = {model_section()}},
      {.name = "tokenizer", .kind = kSection, .initial = "{}", .doc = "How text becomes tokens.", .section = {tokenizer_section()}},
      {.name = "data", .kind = kSection, .initial = kRequired, .doc = "What is trained on.", .section = {data_section()}},
      {.name = "optimizer", .kind = kSection, .initial = "{}", .doc = "AdamW's numbers.", .section = {optimizer_section()}},
      {.name = "scheduler", .kind = kSection, .initial = "{}", .doc = "The learning rate over the updates.", .section = {scheduler_section()}},
      {.name = "checkpoint", .kind = kSections, .initial = "[]", .doc = "What is saved, and when.", .section = {checkpoint_section()}},
      {.name = "logger", .kind = kSection, .initial = "{}", .doc = "Lines for people.", .section = {logger_section()}},
      {.name = "wandb", .kind = kSection, .initial = "{}", .doc = "Weights & Biases.", .section = {wandb_section()}},
      {.name = "deepspeed", .kind = kSection, .initial = "{}", .doc = "What a DeepSpeed configuration means here.", .section = {deepspeed_section()}},
  };
  for (const auto& more : {run_fields(), experiment_fields()}) out.fields.insert(out.fields.end(), more.begin(), more.end());
  return out;
}

}  // namespace uly::recipe
