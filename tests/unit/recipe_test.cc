// Reading recipes: numbers, YAML, every decision, every file in recipes/.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/check.h"
#include "recipe/convert.h"
#include "recipe/field.h"
#include "recipe/numbers.h"
#include "recipe/recipe.h"
#include "recipe/scalar.h"
#include "recipe/yaml.h"

namespace uly::recipe {
namespace {

const std::filesystem::path kRoot = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();

std::string text_of(const std::filesystem::path& path) {
  std::ostringstream out;
  out << std::ifstream(path).rdbuf();
  return out.str();
}

// A file that goes away with the test.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& text) : path_(std::filesystem::path(testing::TempDir()) / (std::to_string(::getpid()) + "-run.yml")) {
    std::ofstream(path_) << text;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

constexpr const char* kBase = "model: {name_or_path: m}\ndata: {sources: [d]}\n";

Recipe load_text(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const TemporaryFile file(text);
  return load(file.path(), overrides);
}

// Returns the message without the folder of the file.
std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const TemporaryFile file(text);
  try {
    load(file.path(), overrides);
  } catch (const UserError& error) {
    std::string message = error.what();
    for (size_t at = message.find(file.path()); at != std::string::npos; at = message.find(file.path())) message.replace(at, file.path().size(), "run.yml");
    return message;
  }
  return "no error";
}

TEST(HumanNumber, EveryFormOfTheFormatIsRead) {
  const std::vector<std::pair<std::string, double>> table = {{"500_000", 5e5},
                                                             {"1.5k", 1500},
                                                             {"1K", 1000},
                                                             {"2m", 2e6},
                                                             {"3b", 3e9},
                                                             {"1t", 1e12},
                                                             {"64ki", 65536},
                                                             {"1Mi", 1048576},
                                                             {"2gi", 2147483648.0},
                                                             {"1ti", 1099511627776.0},
                                                             {"2^20", 1048576},
                                                             {"-2^2", -4},
                                                             {"4^0.5", 2},
                                                             {"5e8", 5e8},
                                                             {"1.5e3", 1500},
                                                             {"10e-1", 1},
                                                             {"1e-5", 1e-5},
                                                             {"10%", 0.1},
                                                             {"12.5%", 0.125},
                                                             {"1.25e8", 1.25e8},
                                                             {" 1_0.5 ", 10.5},
                                                             {".5", 0.5},
                                                             {"+3", 3},
                                                             {"-7", -7},
                                                             {"1.", 1}};
  for (const auto& [text, value] : table) {
    const auto read = human_number(text);
    ASSERT_TRUE(read.has_value()) << text;
    EXPECT_DOUBLE_EQ(*read, value) << text;
  }
}

TEST(HumanNumber, OtherFormsAreNot) {
  for (const char* text :
       {"", "k", "1Ke3", "1^10e2", "1K^2", "1.25k", "two", "nan", "inf", "-inf", "1 2", "0x10", "1e999", "--1", "1^", "^2", "%", "1e400%", "1kk"}) {
    EXPECT_FALSE(human_number(text).has_value()) << text;
  }
}

TEST(Bytes, SizesAreRead) {
  EXPECT_EQ(bytes_from("80GiB"), 80LL << 30);
  EXPECT_EQ(bytes_from("80 gib"), 80LL << 30);
  EXPECT_EQ(bytes_from("141GB"), 141'000'000'000);
  EXPECT_EQ(bytes_from("1.5KiB"), 1536);
  EXPECT_EQ(bytes_from("1_000"), 1000);
  for (const char* text : {"", "GiB", "-1GiB", "0", "80G", "80GiBB", "much", "1e30TiB"}) EXPECT_FALSE(bytes_from(text).has_value()) << text;
}

TEST(Scalar, MeansWhatPyYamlSays) {
  const std::vector<std::pair<std::string, Json>> table = {{"500_000", 500000},
                                                           {"0x1F", 31},
                                                           {"010", 8},
                                                           {"0b101", 5},
                                                           {"-12", -12},
                                                           {"+7", 7},
                                                           {"1:30", 90},
                                                           {"190:20:30", 685230},
                                                           {"0", 0},
                                                           {"1.0e-5", 1e-5},
                                                           {"1.5", 1.5},
                                                           {"1_0.5", 10.5},
                                                           {".5", 0.5},
                                                           {"1.", 1.0},
                                                           {"1:30.5", 90.5},
                                                           {"1.0E+5", 1e5},
                                                           {"yes", true},
                                                           {"On", true},
                                                           {"TRUE", true},
                                                           {"no", false},
                                                           {"Off", false},
                                                           {"", nullptr},
                                                           {"~", nullptr},
                                                           {"Null", nullptr},
                                                           {"5e8", "5e8"},
                                                           {"1e-5", "1e-5"},
                                                           {"1.0e5", "1.0e5"},
                                                           {"09", "09"},
                                                           {"-.5", "-.5"},
                                                           {"0x", "0x"},
                                                           {"0x_", "0x_"},
                                                           {"y", "y"},
                                                           {"yEs", "yEs"},
                                                           {"nULL", "nULL"},
                                                           {"1:99", "1:99"},
                                                           {"2024-01-01", "2024-01-01"},
                                                           {"=", "="},
                                                           {"1k", "1k"},
                                                           {"0o17", "0o17"},
                                                           {"1_", 1},
                                                           {"9223372036854775808", 9223372036854775808.0}};
  for (const auto& [text, value] : table) {
    EXPECT_EQ(resolve_scalar(text), value) << text;
    EXPECT_EQ(resolve_scalar(text).type_name(), std::string(value.type_name())) << text;
  }
  EXPECT_TRUE(std::isnan(resolve_scalar(".nan").get<double>()));
  EXPECT_EQ(resolve_scalar("-.inf").get<double>(), -INFINITY);
}

TEST(Yaml, AliasesAndMergeKeysAreFollowed) {
  const NodePtr root = read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a], z: '4'}\nd: *a\n", "run.yml", true);
  EXPECT_EQ(to_json(*root).dump(), R"({"a":{"x":1,"y":2},"b":{"x":1,"y":3},"c":{"x":5,"y":2,"z":"4"},"d":{"x":1,"y":2}})");
  EXPECT_EQ(root->find("b")->line, 2);
}

TEST(Yaml, FaultsNameTheLine) {
  std::string bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n";
  for (char c = 'b'; c < 'h'; ++c) bomb += fmt::format("{0}: &{0} [*{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}, *{1}]\n", c, static_cast<char>(c - 1));
  EXPECT_EQ(error_of(bomb), "run.yml:5: holds more than 100,000 values once its aliases are expanded");
  EXPECT_EQ(error_of("a: " + std::string(100, '[') + std::string(100, ']')), "run.yml:1: nested deeper than 64 levels");
  EXPECT_EQ(error_of("a: &a [*a]"), "run.yml:1: alias '*a' stands inside its own anchor");
  EXPECT_EQ(error_of("a: *b"), "run.yml:1: alias '*b' names no anchor above it");
  EXPECT_EQ(error_of("a: !!python/name:os.system x"),
            "run.yml:1: tag 'tag:yaml.org,2002:python/name:os.system' does not fit 'x' or is not one of str, int, float, bool, null");
  EXPECT_EQ(error_of("epochs: 1\nseed: 2\nepochs: 3"), "run.yml:3: duplicate key 'epochs', first given in line 1");
  EXPECT_EQ(error_of("model:\n\tname: x"), "run.yml:2: not valid YAML: a tab indents this line; YAML takes spaces");
  EXPECT_EQ(error_of("a: b: c"), "run.yml:1: not valid YAML: mapping values are not allowed in this context");
  EXPECT_EQ(error_of("a: 1\n---\nb: 2"), "run.yml:2: expected one document, found a second one");
  EXPECT_EQ(error_of(""), "run.yml: the recipe is empty: expected a mapping with at least 'model' and 'data'");
  EXPECT_EQ(error_of("- a"), "run.yml:1: expected a mapping of keys, found a list");
  EXPECT_EQ(error_of("a: \xff\xfe"), "run.yml:1: not valid YAML: invalid leading UTF-8 octet");
}

TEST(Recipe, DefaultsAreThoseOfTheStructs) {
  const Recipe r = load_text(kBase);
  const Recipe fresh;
  EXPECT_EQ(r.epochs, fresh.epochs);
  EXPECT_EQ(r.seed, fresh.seed);
  EXPECT_EQ(r.optimizer.learning_rate, fresh.optimizer.learning_rate);
  EXPECT_EQ(r.optimizer.weight_decay, fresh.optimizer.weight_decay);
  EXPECT_EQ(r.optimizer.beta1, fresh.optimizer.beta1);
  EXPECT_EQ(r.optimizer.beta2, fresh.optimizer.beta2);
  EXPECT_EQ(r.scheduler.name, fresh.scheduler.name);
  EXPECT_EQ(r.scheduler.warmup_ratio, fresh.scheduler.warmup_ratio);
  EXPECT_EQ(r.deepspeed.gradient_clipping, fresh.deepspeed.gradient_clipping);
  EXPECT_EQ(r.deepspeed.zero_stage, fresh.deepspeed.zero_stage);
  EXPECT_EQ(r.deepspeed.wire_dtype, fresh.deepspeed.wire_dtype);
  EXPECT_EQ(r.data.div_length, fresh.data.div_length);
  EXPECT_EQ(r.data.num_proc, fresh.data.num_proc);
  EXPECT_EQ(r.data.cache_dir, fresh.data.cache_dir);
  EXPECT_EQ(r.data.max_length, 0);
  EXPECT_EQ(r.kill_switch_path, fresh.kill_switch_path);
  EXPECT_EQ(r.train_log_metrics_path, fresh.train_log_metrics_path);
  EXPECT_EQ(r.tokenizer.name_or_path, "m");
  EXPECT_TRUE(r.checkpoint.empty());
  EXPECT_TRUE(r.notes.empty());
  EXPECT_TRUE(r.later.empty());
}

TEST(Recipe, EveryRowHasADefaultOfItsOwnKind) {
  const std::function<void(const Section&)> check = [&](const Section& section) {
    for (const Field& field : section.fields) {
      if (field.initial != kRequired) {
        EXPECT_NO_THROW(default_of(field)) << section.title << " " << field.name;
      }
      EXPECT_FALSE(field.doc.empty()) << section.title << " " << field.name;
      EXPECT_TRUE(field.decision == Decision::kWorks || !field.why.empty()) << section.title << " " << field.name;
      for (const Section& inner : field.section) check(inner);
    }
  };
  check(recipe_section());
}

TEST(Recipe, KeysReachTheStructs) {
  const Recipe r = load_text(
      "model: {name_or_path: m, dtype: float32, init: random, disable_activation_checkpoint: yes, hf_config_kwargs: {num_hidden_layers: 2}}\n"
      "data:\n"
      "  sources: ['name:train[:50]', {name_or_path: json, split: test, kwargs: {data_files: a.jsonl}}]\n"
      "  max_length: 64ki\n  pad_to: max_length\n"
      "optimizer: {lr: 1e-5, betas: [0.8, 0.95], weight_decay: 1%}\n"
      "scheduler: {name: cosine, warmup_ratio: 5%, scheduler_specific_kwargs: {num_cycles: 2}}\n"
      "checkpoint: {type: huggingface, output_dir: out, save_every_n_steps: 1k}\n"
      "deepspeed:\n  gradient_clipping: '0.5'\n  seq_parallel_communication_data_type: bf16\n"
      "  zero_optimization: {stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: nvme}}\n"
      "loss_reduction: sample\nattention_scope: shard\nmemory: {device: 80GiB}\ntrain_iters: 1.5k\nsequence_parallel_size: '8'\n");
  EXPECT_EQ(r.model.dtype, Dtype::kF32);
  EXPECT_TRUE(r.model.random_init);
  EXPECT_TRUE(r.model.disable_activation_checkpoint);
  EXPECT_EQ(r.model.hf_config_kwargs["num_hidden_layers"], 2);
  ASSERT_EQ(r.data.sources.size(), 2U);
  EXPECT_EQ(r.data.sources[0].name_or_path, "name:train[:50]");
  EXPECT_EQ(r.data.sources[0].as_given["type"], "huggingface_instruct");
  EXPECT_EQ(r.data.sources[1].split, "test");
  EXPECT_EQ(r.data.sources[1].as_given["kwargs"]["data_files"], "a.jsonl");
  EXPECT_EQ(r.data.as_given["sources"][1], r.data.sources[1].as_given);
  EXPECT_EQ(r.data.as_given["type"], "sft");
  EXPECT_EQ(r.data.max_length, 65536);
  EXPECT_EQ(r.data.pad_to, PadTo::kMaxLength);
  EXPECT_DOUBLE_EQ(r.optimizer.learning_rate, 1e-5);
  EXPECT_DOUBLE_EQ(r.optimizer.beta1, 0.8);
  EXPECT_DOUBLE_EQ(r.optimizer.weight_decay, 0.01);
  EXPECT_DOUBLE_EQ(r.scheduler.warmup_ratio, 0.05);
  EXPECT_EQ(r.checkpoint.at(0).save_every_n_steps, 1000);
  EXPECT_DOUBLE_EQ(r.deepspeed.gradient_clipping, 0.5);
  EXPECT_EQ(r.deepspeed.wire_dtype, Dtype::kBf16);
  EXPECT_TRUE(r.deepspeed.offload_optimizer);
  EXPECT_TRUE(r.deepspeed.offload_param);
  EXPECT_EQ(r.loss_reduction, LossReduction::kSample);
  EXPECT_EQ(r.attention_scope, "shard");
  EXPECT_EQ(r.memory_device_bytes, 80LL << 30);
  EXPECT_EQ(r.train_iters, 1500);
  EXPECT_EQ(r.sequence_parallel_size, 8);
  EXPECT_TRUE(r.later.empty());
}

TEST(Recipe, WrongValuesNameLineKeyAndExpectation) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"sequence_parallel_size: two", "run.yml:3: sequence_parallel_size: expected an integer >= 1, found 'two'"},
      {"sequence_parallel_size: 0", "run.yml:3: sequence_parallel_size: expected an integer >= 1, found 0"},
      {"sequence_parallel_size: yes", "run.yml:3: sequence_parallel_size: expected an integer >= 1, found yes"},
      {"sequence_parallel_size: 1k", "run.yml:3: sequence_parallel_size: expected an integer >= 1, found '1k'"},
      {"epochs:", "run.yml:3: epochs: expected an integer >= 0, found nothing"},
      {"train_iters: 1.5", "run.yml:3: train_iters: expected an integer >= 0, found 1.5"},
      {"train_iters: 1e-3", "run.yml:3: train_iters: expected an integer >= 0, found '1e-3'"},
      {"train_iters: 99999999999999999999", "run.yml:3: train_iters: expected an integer >= 0, found 99999999999999999999"},
      {"optimizer: {betas: [0.9]}", "run.yml:3: optimizer.betas: expected a list of 2 numbers >= 0 and < 1, found a list"},
      {"optimizer: {betas: [0.9, 1]}", "run.yml:3: optimizer.betas: expected a list of 2 numbers >= 0 and < 1, found a list"},
      {"optimizer: {lr: .inf}", "run.yml:3: optimizer.learning_rate: expected a number >= 0, found .inf"},
      {"optimizer: {lr: 1, learning_rate: 2}", "run.yml:3: 'lr' and 'learning_rate' are the same key; keep one"},
      {"optimizer: adam", "run.yml:3: optimizer: expected a mapping, found 'adam'"},
      {"scheduler: {warmup_ratio: 2}", "run.yml:3: scheduler.warmup_ratio: expected a number from 0 to 1, found 2"},
      {"overfit_first_batch: maybe", "run.yml:3: overfit_first_batch: expected true or false, found 'maybe'"},
      {"kill_switch_path: 12", "run.yml:3: kill_switch_path: expected text, found 12"},
      {"loss_reduction: mean", "run.yml:3: loss_reduction: expected one of 'token', 'sample', found 'mean'"},
      {"memory: {device: much}", "run.yml:3: memory.device: expected a size such as 80GiB, found 'much'"},
      {"logger: {print_output_ranks: all}", "run.yml:3: logger.print_output_ranks: expected '*' or a list of integers, found 'all'"},
      {"deepspeed: {zero_optimization: {stage: 4}}", "run.yml:3: deepspeed.zero_optimization.stage: expected one of '0', '1', '2', '3', found 4"},
      {"checkpoint: {type: huggingface}", "run.yml:3: checkpoint.0.output_dir is required: Folder, relative to the current one."},
      {"checkpoint: out", "run.yml:3: checkpoint.0: expected a mapping, found 'out'"},
  };
  for (const auto& [line, message] : table) EXPECT_EQ(error_of(kBase + line), message);
  EXPECT_EQ(error_of("model: {}\ndata: {sources: [d]}"), "run.yml:1: model.name_or_path is required: Hub id, or a folder in the Hugging Face layout.");
  EXPECT_EQ(error_of("model: {name_or_path: m}"), "run.yml: data is required: What is trained on.");
  EXPECT_EQ(error_of("model: {name_or_path: m}\ndata: {sources: []}"), "run.yml:2: data.sources: expected at least one entry, found an empty list");
}

TEST(Recipe, UnknownKeysAreRefusedWithTheNearest) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"sequence_paralel_size: 2", "run.yml:3: unknown key 'sequence_paralel_size'; did you mean 'sequence_parallel_size'?"},
      {"max_length: 2", "run.yml:3: unknown key 'max_length'; did you mean 'data.max_length'?"},
      {"optimizer: {weigth_decay: 2}", "run.yml:3: unknown key 'optimizer.weigth_decay'; did you mean 'optimizer.weight_decay'?"},
      {"optimizer: {epochs: 2}", "run.yml:3: unknown key 'optimizer.epochs'; did you mean 'epochs'?"},
      {"deepspeed: {zero_optimisation: {}}", "run.yml:3: unknown key 'deepspeed.zero_optimisation'; did you mean 'deepspeed.zero_optimization'?"},
      {"quite_another: 2", "run.yml:3: unknown key 'quite_another'; docs/recipe.md lists the keys"},
  };
  for (const auto& [line, message] : table) EXPECT_EQ(error_of(kBase + line), message);
}

TEST(Recipe, KeysWithoutEffectAreNoted) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"skip_validation: true", "skip_validation"},
      {"tokenizer: {tokenize_kwargs: {truncation: true}}", "tokenizer.tokenize_kwargs"},
      {"optimizer: {type: cpu_adam}", "optimizer.type"},
      {"arctic_moe: false", "arctic_moe"},
      {"expert_parallel_size: 1", "expert_parallel_size"},
      {"logger: {print_output_ranks: '*'}", "logger.print_output_ranks"},
      {"eval_log_iter_interval: 2", "eval_log_iter_interval"},
      {"wandb: {enable: false, project: p}", "wandb.project"},
      {"deepspeed: {zero_optimization: {stage: 2}}", "deepspeed.zero_optimization.stage"},
      {"deepspeed: {zero_optimization: {reduce_bucket_size: 5e8}}", "deepspeed.zero_optimization.reduce_bucket_size"},
      {"deepspeed: {torch_autocast: {enabled: true}}", "deepspeed.torch_autocast.enabled"},
      {"deepspeed: {a_key_of_tomorrow: 1}", "deepspeed.a_key_of_tomorrow"},
  };
  for (const auto& [line, key] : table) {
    const Recipe r = load_text(kBase + line);
    ASSERT_EQ(r.notes.size(), 1U) << line;
    EXPECT_EQ(r.notes[0].key, key);
    EXPECT_TRUE(r.notes[0].text.starts_with("no effect: ")) << r.notes[0].text;
    EXPECT_TRUE(r.notes[0].where.ends_with("run.yml:3")) << r.notes[0].where;
    EXPECT_TRUE(r.later.empty()) << line;
  }
}

TEST(Recipe, WhatComesLaterIsListed) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"mem_profiler: step", "mem_profiler"},
      {"wandb: {enable: true}", "wandb.enable"},
  };
  for (const auto& [line, key] : table) {
    const Recipe r = load_text(kBase + line);
    ASSERT_EQ(r.later.size(), 1U) << line;
    EXPECT_EQ(r.later[0].key, key);
  }
  EXPECT_TRUE(load_text(kBase, {"checkpoint={output_dir: o, save_every_n_steps: 5, auto_resume: true}"}).later.empty());
}

TEST(Recipe, PackingIsAskedForWholeOrSaidToHaveNoEffect) {
  for (const char* key : {"always_max_length=true", "drop_last=true", "repeat_to_pack_max_length=true", "fuse_positions_prob=0.5", "pack_strategy=best_fit"}) {
    const std::string assignment = fmt::format("data.{}", key);
    const Recipe alone = load_text(kBase, {assignment}), packed = load_text(kBase, {assignment, "data.pack_samples=true"});
    ASSERT_EQ(alone.notes.size(), 1U) << key;
    EXPECT_EQ(alone.notes[0].text, "no effect: data.pack_samples is false");
    EXPECT_TRUE(packed.notes.empty()) << key;
    EXPECT_TRUE(packed.later.empty());
  }
  EXPECT_EQ(load_text(kBase, {"data.pack_samples=true", "data.pack_strategy=best_fit"}).data.pack_strategy, PackStrategy::kBestFit);
  EXPECT_EQ(load_text(kBase).data.overlong, Overlong::kDrop);
  EXPECT_EQ(load_text(kBase, {"data.filter_samples=false"}).data.overlong, Overlong::kKeep);
  EXPECT_EQ(load_text(kBase, {"data.overlong=split"}).data.overlong, Overlong::kSplit);
  EXPECT_EQ(load_text(kBase, {"data.overlong=truncate_left"}).data.overlong, Overlong::kTruncateLeft);
  EXPECT_EQ(load_text(kBase, {"data.overlong=truncate_right"}).data.overlong, Overlong::kTruncateRight);
  EXPECT_EQ(load_text(kBase, {"data.train_eval_split=[0.75, 0.25]", "eval_interval=5"}).data.eval_share, 0.25);
  const Recipe causal = load_text(kBase, {"type=causal", "data.drop_last=false", "micro_batch_size=2"});
  EXPECT_TRUE(causal.data.pack_samples && causal.data.always_max_length && causal.data.drop_last);
  EXPECT_EQ(causal.data.overlong, Overlong::kSplit);
  ASSERT_EQ(causal.notes.size(), 1U);
  EXPECT_EQ(causal.notes[0].key, "data.drop_last");
  EXPECT_TRUE(causal.later.empty());
}

TEST(Recipe, RefusalsSayWhatToDo) {
  const std::vector<std::pair<std::string, std::string>> table = {
      {"type: dpo", "run.yml:3: type: preference training is not part of this engine; use sft"},
      {"code: train.py", "run.yml:3: code: code of the user's own is not run; prepare data with `ulysses prepare` and describe the rest by keys"},
      {"scheduler: {learning_rate: 1.0}", "run.yml:3: scheduler.learning_rate: it is a key of the optimizer; write optimizer.learning_rate"},
      {"expert_parallel_size: 2", "run.yml:3: expert_parallel_size: mixture-of-experts models are not part of this engine; remove the key"},
      {"deepspeed: {fp16: {enabled: true}}", "run.yml:3: deepspeed.fp16.enabled: training in fp16 needs loss scaling, which this engine has not; use bf16"},
      {"scheduler: {name: greedy}",
       "run.yml:3: scheduler.name: it follows a metric, not the step number; use a schedule such as linear, cosine or warmup_stable_decay"},
      {"scheduler: {name: cosine_with_min_lr}", "run.yml:3: scheduler.name: schedule 'cosine_with_min_lr' takes one of min_lr and min_lr_rate, found none"},
      {"tokenizer: {tokenize_kwargs: {add_special_tokens: true}}", "run.yml:3: tokenizer.tokenize_kwargs: add_special_tokens would add them twice; remove it"},
  };
  for (const auto& [line, message] : table) EXPECT_EQ(error_of(kBase + line), message);
  EXPECT_EQ(error_of(kBase, {"model.peft_config={peft_type: Lora}"}),
            "command line: model.peft_config: adapters are not trained here: every weight is; remove the key");
  EXPECT_EQ(error_of(kBase, {"model.dtype=fp16"}), "command line: model.dtype: training in fp16 needs loss scaling, which this engine has not; use bf16");
}

TEST(Recipe, KeysMustFitTogether) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> table = {
      {{"data.pack_samples=true", "micro_batch_size=2"}, "command line: micro_batch_size: expected 1 with data.pack_samples, found 2"},
      {{"data.overlong=split", "data.filter_samples=true"}, "command line: data.overlong: expected it alone, found data.filter_samples (command line) beside it: remove that"},
      {{"data.pack_samples=true", "data.always_max_length=true", "data.pack_strategy=best_fit"},
       "command line: data.pack_strategy: expected in_order with data.always_max_length, found best_fit: packs that are cut to length have nothing to fit"},
      {{"data.train_eval_split=[0.9, 0.2]"}, "command line: data.train_eval_split: expected two shares with sum 1, found [0.9,0.2]"},
      {{"data.eval_sources=[e]"}, "run.yml: eval_interval: expected an integer >= 1 as there is data to evaluate on, found 0"},
      {{"eval_interval=3"}, "command line: eval_interval: expected data.eval_sources or data.train_eval_split to evaluate on, found none"},
      {{"data.pad_to=max_length", "data.div_length=100", "data.max_length=250"},
       "command line: data.max_length: expected a multiple of data.div_length 100 with pad_to: max_length, such as 200 or 300, found 250"},
      {{"data.sources.0={name_or_path: d, sample_ratio: 0.5, sample_count: 3}"},
       "command line: data.sources.0: expected sample_ratio or sample_count, found both"},
      {{"checkpoint=[{output_dir: a, auto_resume: true}, {output_dir: b, auto_resume: true}]"},
       "command line: checkpoint: expected auto_resume in one entry at most, found more"},
      {{"checkpoint={output_dir: a, type: huggingface, auto_resume: true}"},
       "command line: checkpoint.0.auto_resume: a huggingface checkpoint holds weights only; put auto_resume on an entry of type deepspeed"},
      {{"data.type=causal"}, "command line: data.type: expected 'sft' like type, found 'causal'"},
  };
  for (const auto& [overrides, message] : table) EXPECT_EQ(error_of(kBase, overrides), message);
  EXPECT_EQ(load_text(kBase, {"data.pad_to=max_length", "data.max_length=250"}).data.max_length, 250);
}

TEST(Recipe, OverridesReachEveryDepth) {
  const std::string text = std::string(kBase) + "optimizer: {learning_rate: 1.0}\ncheckpoint: {type: huggingface, output_dir: a}\n";
  const Recipe r = load_text(text, {"optimizer.lr=2e-5", "checkpoint.0.output_dir=b", "data.max_length=1M", "data.sources.1=second", "scheduler.name=cosine"});
  EXPECT_DOUBLE_EQ(r.optimizer.learning_rate, 2e-5);
  EXPECT_EQ(r.checkpoint.at(0).output_dir, "b");
  EXPECT_EQ(r.data.max_length, 1'000'000);
  EXPECT_EQ(r.data.sources.at(1).name_or_path, "second");
  EXPECT_EQ(r.scheduler.name, "cosine");
  EXPECT_EQ(r.where("data.max_length"), "command line");
  EXPECT_TRUE(r.where("checkpoint").ends_with("run.yml:4"));
  EXPECT_EQ(r.where("epochs"), r.path);
  EXPECT_EQ(load_text(kBase, {"checkpoint.0.output_dir=c"}).checkpoint.at(0).output_dir, "c");
}

TEST(Recipe, WrongOverridesAreExplained) {
  EXPECT_EQ(error_of(kBase, {"epochs"}), "command line: expected key.path=value, found 'epochs'");
  EXPECT_EQ(error_of(kBase, {"=1"}), "command line: expected key.path=value, found '=1'");
  EXPECT_EQ(error_of(kBase, {"epoch=1"}), "command line: unknown key 'epoch'; did you mean 'epochs'?");
  EXPECT_TRUE(error_of(kBase, {"epochs=[1"}).starts_with("command line: 'epochs=[1': not valid YAML: "));
  EXPECT_EQ(error_of(kBase, {"data.sources.7=x"}), "command line: 'data.sources.7=x': expected an index from 0 to 1, found '7'");
  EXPECT_EQ(error_of(kBase, {"data.sources.0.split=x"}), "command line: 'data.sources.0.split=x': expected a mapping before 'split', found 'd'");
  EXPECT_EQ(error_of(kBase, {"epochs=two"}), "command line: epochs: expected an integer >= 0, found 'two'");
}

TEST(Recipe, SecretsDoNotReachTheNormalizedForm) {
  const Recipe r = load_text(kBase, {"data.sources.0={name_or_path: d, kwargs: {token: hf_x, data_files: a}}"});
  EXPECT_EQ(r.normalized.dump().find("hf_x"), std::string::npos);
  EXPECT_EQ(r.data.sources[0].as_given["kwargs"]["token"], "hf_x");
}

TEST(Recipe, SecretsAreKnownByTheWordsInTheirKeys) {
  const std::string source = "{name_or_path: d, kwargs: {headers: {Authorization: S1, x-api-key: S2, accept: V1}, HF_TOKEN: S3, access_token: S4, aws_secret_access_key: 12345678, clientSecret: [S5], use_auth_token: true, db-passwd: S6, "
                             "credentials: {id: S7, more: {a: S8}}, private_key_id: S9, hfToken: S0, token: null, pad_token: V2, max_tokens: 77, num_tokens_per_row: 78, tokenizer: V3, eos_token_id: 79, author: V4, content_key: V5, keys: V6}}";
  const Recipe r = load_text("model: {name_or_path: m, hf_config_kwargs: {eos_token_id: 5}}\ndata: {sources: [" + source + "]}\n");
  const std::string all = r.normalized.dump();
  EXPECT_EQ(all.find("12345678"), std::string::npos);
  for (const char* hidden : {"S0", "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9"}) EXPECT_EQ(all.find(hidden), std::string::npos) << hidden;
  for (const char* visible : {"V1", "V2", "V3", "V4", "V5", "V6", "77", "78", "79"}) EXPECT_NE(all.find(visible), std::string::npos) << visible;
  const Json& kwargs = r.normalized["data"]["sources"][0]["kwargs"];
  EXPECT_EQ(kwargs["credentials"], "hidden");
  EXPECT_EQ(kwargs["token"], nullptr);
  EXPECT_EQ(kwargs["use_auth_token"], true);
  EXPECT_EQ(r.data.sources[0].as_given["kwargs"]["headers"]["Authorization"], "S1");
}

// Of the reference's keys none is taken for a secret: what a manifest says of them is compared when a run goes on.
TEST(Recipe, NoKeyOfItsOwnIsHidden) {
  for (const auto& file : std::filesystem::directory_iterator(kRoot / "recipes")) {
    if (file.path().extension() != ".yml") continue;
    EXPECT_EQ(load(file.path().string(), {}).normalized.dump().find("\"hidden\""), std::string::npos) << file.path();
  }
}

TEST(Recipe, MissingFilesAreNamed) {
  EXPECT_THROW(load("/nowhere/run.yml", {}), UserError);
  try {
    load("/nowhere/run.yml", {});
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "/nowhere/run.yml: cannot read the recipe: No such file or directory");
  }
}

TEST(Recipe, EveryFileInRecipesLoads) {
  size_t count = 0;
  for (const auto& file : std::filesystem::directory_iterator(kRoot / "recipes")) {
    if (file.path().extension() != ".yml") continue;
    ++count;
    EXPECT_NO_THROW(load(file.path().string(), {})) << file.path();
  }
  EXPECT_GE(count, 46U);
}

TEST(Reference, TheFileInDocsIsUpToDate) {
  const std::filesystem::path path = kRoot / "docs" / "recipe.md";
  if (std::getenv("ULYSSES_UPDATE") != nullptr) std::ofstream(path) << reference_markdown();
  EXPECT_EQ(text_of(path), reference_markdown()) << "run `make docs`";
}

}  // namespace
}  // namespace uly::recipe
