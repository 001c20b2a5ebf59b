// Every key of `data` and of its sources, and what becomes of it.
#include "recipe/field.h"

namespace uly::recipe {
namespace {

using enum Kind;
using enum Decision;

using SourceList = std::vector<Source> Data::*;

template <class T>
Set into_newest_source(SourceList list, T Source::*member) {
  return [=](Recipe& r, const Json& v) { (r.data.*list).back().*member = v.get<T>(); };
}

std::vector<Choice> source_types() {
  const char* const preference = "preference training is not part of this engine; use a source of chats";
  const char* const warehouse = "this engine reads no warehouse; export the table and name the files in a huggingface_instruct source";
  return {{"huggingface_instruct"},
          {"huggingface", kLater, "plain text"},
          {"huggingface_causal", kLater, "plain text"},
          {"ProjectGutenbergSFT", kRefused, "prepare these books as chats and name them in a huggingface_instruct source"},
          {"HuggingFaceH4/ultrafeedback_binarized", kRefused, preference},
          {"snowflake", kRefused, warehouse}};
}

Section source_section(const char* title, SourceList list, const char* split) {
  return {
      .title = title,
      .doc = "One data set: a mapping, or its name alone.",
      .fields =
          {
              {.name = "type", .choices = source_types(), .doc = "What it holds; by default chats for `sft`."},
              {.name = "name_or_path",
               .initial = kRequired,
               .doc = "Hub id, folder, file or glob (JSON also as .gz, .zst, .xz, .bz2), or a builder's name such as `json` (its files then stand in `kwargs`). `name:train[:50]` also names the split.",
               .set = into_newest_source(list, &Source::name_or_path)},
              {.name = "split", .initial = split, .doc = "Which part of it.", .set = into_newest_source(list, &Source::split)},
              {.name = "split_mapping", .kind = kFree, .initial = "{}", .doc = "Other names for splits."},
              {.name = "kwargs", .kind = kFree, .initial = "{}", .doc = "Arguments of `datasets.load_dataset`."},
              {.name = "role_mapping", .kind = kFree, .doc = "Where each role's text stands: a column, or `list.field.value`. None is needed for well-known data sets and for `messages`, `conversations`, `prompt` with `completion`, and `instruction` with `output` (Alpaca)."},
              {.name = "content_key", .doc = "The field that holds a turn's text; by default the first of content, text, message, value."},
              {.name = "column", .decision = kLater, .why = "plain text", .doc = "Column of plain text."},
              {.name = "sample_ratio", .kind = kNumber, .min = 0, .max = 1, .doc = "Draw this share of it; excludes `sample_count`."},
              {.name = "sample_count", .kind = kInt, .min = 1, .doc = "Draw this many; all, if there are fewer."},
              {.name = "sample_seed", .kind = kInt, .initial = "42", .doc = "Seed of the draw."},
              {.name = "process",
               .kind = kBool,
               .initial = "true",
               .decision = kRefused,
               .why = "a source that is not tokenized has nothing to train on; remove the key",
               .doc = "Tokenize it."},
          },
      .bare = "name_or_path",
      .begin = [=](Recipe& r) { (r.data.*list).emplace_back(); },
  };
}

std::vector<Field> common_fields() {
  const char* const seen = "every host must see cache_dir, or hold its own copy of the token files";
  return {
      {.name = "type",
       .choices = {{"sft"}, {"causal", kLater, "training on plain text"}, {"dpo", kRefused, "preference training is not part of this engine; use sft"}},
       .doc = "By default the recipe's `type`, which it must equal."},
      {.name = "sources",
       .kind = kSections,
       .initial = kRequired,
       .min = 1,
       .doc = "Data sets to train on, concatenated and shuffled.",
       .section = {source_section("data.sources", &Data::sources, "train")}},
      {.name = "eval_sources",
       .kind = kSections,
       .initial = "[]",
       .decision = kLater,
       .why = "evaluation",
       .doc = "Data sets to evaluate on.",
       .section = {source_section("data.eval_sources", &Data::eval_sources, "eval")}},
      {.name = "train_eval_split",
       .kind = kNumbers,
       .initial = "[1.0, 0.0]",
       .min = 0,
       .max = 1,
       .count = 2,
       .decision = kLater,
       .why = "evaluation",
       .doc = "Shares to train on and to evaluate on; their sum is 1."},
      {.name = "max_length",
       .kind = kHumanInt,
       .min = 1,
       .word = "auto",
       .doc = "Longest sample in tokens; by default the model's max_position_embeddings. `auto`: the longest that fits, of which the plan says what it is; a multiple of `sequence_parallel_size` times `div_length`.",
       .set = [](Recipe& r, const Json& v) { r.data.max_length = v.is_null() ? 0 : v.is_string() ? kAutoLength : v.get<int64_t>(); }},
      {.name = "num_proc", .kind = kInt, .initial = "16", .min = 1, .doc = "Processes that tokenize.", .set = into(&Recipe::data, &Data::num_proc)},
      {.name = "seed", .kind = kInt, .initial = "42", .min = 0, .doc = "Seed of the shuffle.", .set = into(&Recipe::data, &Data::seed)},
      {.name = "cache_dir", .initial = "/tmp", .doc = "Folder of token files, made if missing.", .set = into(&Recipe::data, &Data::cache_dir)},
      {.name = "on_error",
       .initial = "stop",
       .choices = {{"stop"}, {"skip"}},
       .doc = "A sample that cannot be used (not JSON, an unknown role, refused by the template, nobody answers): `stop` with a sentence that names it, or `skip` it and count."},
      {.name = "fail_on_missing_cache", .kind = kBool, .initial = "false", .doc = "An error instead of tokenizing."},
      {.name = "cache_fs_type",
       .initial = "auto",
       .choices = {{"auto", kNoEffect, seen}, {"local", kNoEffect, seen}, {"shared", kNoEffect, seen}},
       .doc = "Kept for existing recipes."},
      {.name = "dl_num_workers",
       .kind = kInt,
       .initial = "2",
       .min = 0,
       .decision = kNoEffect,
       .why = "batches are read from a memory map; there are no workers",
       .doc = "Kept for existing recipes."},
      {.name = "use_data_cache", .kind = kBool, .decision = kNoEffect, .why = "token files are always cached", .doc = "Kept for existing recipes."},
      {.name = "cache_processed_data", .kind = kBool, .decision = kNoEffect, .why = "token files are always cached", .doc = "Kept for existing recipes."},
  };
}

std::vector<Field> chat_fields() {
  const char* const packing = "read together with pack_samples, which comes later";
  return {
      {.name = "mask_inputs", .kind = kBool, .initial = "true", .doc = "Train the assistant's text only.", .set = into(&Recipe::data, &Data::mask_inputs)},
      {.name = "ignore_empty_think", .kind = kBool, .initial = "false", .doc = "Do not train an empty `<think></think>` that begins an answer."},
      {.name = "filter_samples",
       .kind = kBool,
       .initial = "true",
       .doc = "Drop samples longer than `max_length`.",
       .set = into(&Recipe::data, &Data::filter_samples)},
      {.name = "div_length",
       .kind = kHumanInt,
       .initial = "256",
       .min = 1,
       .doc = "A batch is padded to a multiple of this many tokens.",
       .set = into(&Recipe::data, &Data::div_length)},
      {.name = "pad_to",
       .initial = "div_length",
       .choices = {{"div_length"}, {"max_length"}},
       .doc = "`max_length`: every batch is padded to it.",
       .set = [](Recipe& r, const Json& v) { r.data.pad_to = v == "max_length" ? PadTo::kMaxLength : PadTo::kDivLength; }},
      {.name = "pack_samples",
       .kind = kBool,
       .initial = "false",
       .decision = kLater,
       .why = "packing samples up to max_length",
       .doc = "Join samples up to `max_length`; needs `micro_batch_size: 1`.",
       .set = into(&Recipe::data, &Data::pack_samples)},
      {.name = "always_max_length", .kind = kBool, .initial = "false", .decision = kLater, .why = packing, .doc = "Packs of exactly `max_length`."},
      {.name = "drop_last", .kind = kBool, .initial = "false", .decision = kLater, .why = packing, .doc = "Drop the last pack if it is short."},
      {.name = "fuse_positions_prob",
       .kind = kNumber,
       .initial = "0.0",
       .min = 0,
       .max = 1,
       .decision = kLater,
       .why = packing,
       .doc = "How often a pack counts its positions through."},
      {.name = "repeat_to_pack_max_length",
       .kind = kBool,
       .initial = "false",
       .decision = kLater,
       .why = packing,
       .doc = "Repeat a small data set up to `max_length`."},
  };
}

}  // namespace

Section data_section() {
  Section out{.title = "data", .doc = "What is trained on, and how it becomes batches."};
  for (const auto& more : {common_fields(), chat_fields()}) out.fields.insert(out.fields.end(), more.begin(), more.end());
  return out;
}

}  // namespace uly::recipe
