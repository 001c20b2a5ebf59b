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
          {"huggingface"},
          {"huggingface_causal"},
          {"ProjectGutenbergSFT", kRefused, "prepare these books as chats and name them in a huggingface_instruct source"},
          {"HuggingFaceH4/ultrafeedback_binarized", kRefused, preference},
          {"snowflake", kRefused, warehouse}};
}

Section source_section(const char* title, SourceList list, const char* split) {
  Field weight{.name = "weight", .kind = kNumber, .initial = "1.0", .min = 0, .max = 1000};
  if (list == &Data::sources) {
    weight.doc = "How often each of its samples is seen in an epoch: 2, twice; 0.5, a half of them, drawn by `data.seed`; 1.5, all once and a half of them twice; 0, none. Of what `sample_ratio` or `sample_count` left, and of the training side of `train_eval_split`. Changing it prepares nothing again.";
    weight.set = into_newest_source(list, &Source::weight);
  } else {
    weight.doc = "Kept so that a source can be moved here.";
    weight.decision = kNoEffect, weight.why = "every sample is evaluated once";
  }
  return {
      .title = title,
      .doc = "One data set: a mapping, or its name alone.",
      .fields =
          {
              {.name = "type", .choices = source_types(), .doc = "What it holds; by default chats (`huggingface_instruct`) for `sft`, plain text (`huggingface`) for `causal`."},
              {.name = "name_or_path",
               .initial = kRequired,
               .doc = "Hub id, folder (of data files, or of `save_to_disk`), file or glob (.jsonl, .json, .parquet, .csv, .txt, .arrow, each also with .gz, .zst, .xz, .bz2), or a builder's name such as `json` (its files then stand in `kwargs` as `data_files`). `name:train[:50]` also names the split.",
               .set = into_newest_source(list, &Source::name_or_path)},
              {.name = "split", .initial = split, .doc = "Which part of it; slices such as `train[:50]`, sums such as `train+test`. A file, or files of a glob, are `train`; to evaluate on, the only split there is need not be named.", .set = into_newest_source(list, &Source::split)},
              {.name = "split_mapping", .kind = kFree, .initial = "{}", .doc = "Other names for splits."},
              {.name = "kwargs", .kind = kFree, .initial = "{}", .doc = "Arguments of `datasets.load_dataset`."},
              {.name = "role_mapping", .kind = kFree, .doc = "Where each role's text stands: a column, or `list.field.value`. None is needed for well-known data sets and for `messages`, `conversations`, `prompt` with `completion`, and `instruction` with `output` (Alpaca). A column `tools` is shown to the chat template, as are all keys of a message; a column `system` precedes messages without a system turn, and Alpaca's `history` its question."},
              {.name = "content_key", .doc = "The field that holds a turn's text; by default the first of content, text, message, value."},
              {.name = "column", .doc = "Column of plain text; by default `text`, or the only one. Texts without anything in them are left out and counted."},
              weight,
              {.name = "sample_ratio", .kind = kNumber, .min = 0, .max = 1, .doc = "Draw this share of it; excludes `sample_count`."},
              {.name = "sample_count", .kind = kInt, .min = 1, .doc = "Draw this many; all, with a warning, if there are fewer."},
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
  return {
      {.name = "type",
       .choices = {{"sft"}, {"causal"}, {"dpo", kRefused, "preference training is not part of this engine; use sft"}},
       .doc = "By default the recipe's `type`, which it must equal."},
      {.name = "sources",
       .kind = kSections,
       .initial = kRequired,
       .min = 1,
       .doc = "Data sets to train on, concatenated and shuffled; a mixture by their `weight`s.",
       .section = {source_section("data.sources", &Data::sources, "train")}},
      {.name = "eval_sources",
       .kind = kSections,
       .initial = "[]",
       .doc = "Data sets to evaluate on, every `eval_interval` updates.",
       .section = {source_section("data.eval_sources", &Data::eval_sources, "eval")}},
      {.name = "train_eval_split",
       .kind = kNumbers,
       .initial = "[1.0, 0.0]",
       .min = 0,
       .max = 1,
       .count = 2,
       .doc = "Shares to train on and to evaluate on; their sum is 1. Drawn by sample, before packing: none is in both. Excludes `eval_sources`.",
       .set = [](Recipe& r, const Json& v) { r.data.eval_share = v[1].get<double>(); }},
      {.name = "max_length",
       .kind = kHumanInt,
       .min = 1,
       .below = kMostTokens,
       .word = "auto",
       .doc = "Longest sample in tokens; by default the model's max_position_embeddings. `auto`: the longest that fits, of which the plan says what it is; a multiple of `sequence_parallel_size` times `div_length`.",
       .set = [](Recipe& r, const Json& v) { r.data.max_length = v.is_null() ? 0 : v.is_string() ? kAutoLength : v.get<int64_t>(); }},
      {.name = "num_proc", .kind = kInt, .initial = "16", .min = 1, .doc = "Processes that tokenize.", .set = into(&Recipe::data, &Data::num_proc)},
      {.name = "seed", .kind = kInt, .initial = "42", .min = 0, .doc = "Seed of the shuffle.", .set = into(&Recipe::data, &Data::seed)},
      {.name = "cache_dir", .initial = "/tmp", .doc = "Folder of token files, made if missing. On a job's every machine: one that all see, or each its own.", .set = into(&Recipe::data, &Data::cache_dir)},
      {.name = "on_error",
       .initial = "stop",
       .choices = {{"stop"}, {"skip"}},
       .doc = "A sample that cannot be used (not JSON, an unknown role, refused by the template, nobody answers): `stop` with a sentence that names it, or `skip` it and count."},
      {.name = "fail_on_missing_cache", .kind = kBool, .initial = "false", .doc = "An error instead of tokenizing; for data that `ulysses prepare` has prepared elsewhere, with the same recipe."},
      {.name = "cache_fs_type",
       .initial = "auto",
       .choices = {{"auto"}, {"local"}, {"shared"}},
       .doc = "Who else sees `cache_dir`: this machine's processes (`local`: one of each machine prepares, the others wait for it) or other machines too (`shared`: one of all prepares). `auto`: as the type of its file system says."},
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
  return {
      {.name = "mask_inputs", .kind = kBool, .initial = "true", .doc = "Train the assistant's text only.", .set = into(&Recipe::data, &Data::mask_inputs)},
      {.name = "ignore_empty_think", .kind = kBool, .initial = "false", .doc = "Do not train an empty `<think></think>` that begins an answer."},
      {.name = "filter_samples",
       .kind = kBool,
       .initial = "true",
       .doc = "Drop samples longer than `max_length`; false: train them whole. `overlong` says more and takes its place.",
       .set = into(&Recipe::data, &Data::filter_samples)},
      {.name = "overlong",
       .choices = {{"drop"}, {"truncate_left"}, {"truncate_right"}, {"split"}},
       .doc = "Samples longer than `max_length`: dropped, cut on the left (the end is kept) or on the right, or split into documents of `max_length` and a rest. By default as `filter_samples` says.",
       .set =
           [](Recipe& r, const Json& v) {
             if (v == "drop") r.data.overlong = Overlong::kDrop;
             if (v == "truncate_left") r.data.overlong = Overlong::kTruncateLeft;
             if (v == "truncate_right") r.data.overlong = Overlong::kTruncateRight;
             if (v == "split") r.data.overlong = Overlong::kSplit;
           }},
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
       .doc = "Join samples up to `max_length`, over the whole data set; needs `micro_batch_size: 1`. Documents stay apart: attention, positions and targets never cross from one to the next.",
       .set = into(&Recipe::data, &Data::pack_samples)},
      {.name = "pack_strategy",
       .initial = "in_order",
       .choices = {{"in_order"}, {"best_fit"}},
       .doc = "How samples find their pack. `in_order`: in the order of a shuffle by `seed`, one pack open at a time. `best_fit`: into the fullest pack that has room, long samples first.",
       .set = [](Recipe& r, const Json& v) { r.data.pack_strategy = v == "best_fit" ? PackStrategy::kBestFit : PackStrategy::kInOrder; }},
      {.name = "always_max_length",
       .kind = kBool,
       .initial = "false",
       .doc = "Packs of exactly `max_length`: a sample that does not fit is cut, and its rest begins the next pack as a document of its own.",
       .set = into(&Recipe::data, &Data::always_max_length)},
      {.name = "drop_last", .kind = kBool, .initial = "false", .doc = "Drop the last pack if it is short.", .set = into(&Recipe::data, &Data::drop_last)},
      {.name = "fuse_positions_prob",
       .kind = kNumber,
       .initial = "0.0",
       .min = 0,
       .max = 1,
       .doc = "Share of the packs that are merged on purpose: all of such a pack is one document for positions and attention. Which, depends on `seed` only.",
       .set = into(&Recipe::data, &Data::fuse_positions_prob)},
      {.name = "repeat_to_pack_max_length",
       .kind = kBool,
       .initial = "false",
       .doc = "Repeat a data set of fewer tokens than `max_length` up to it, before packing.",
       .set = into(&Recipe::data, &Data::repeat_to_pack_max_length)},
  };
}

}  // namespace

Section data_section() {
  Section out{.title = "data", .doc = "What is trained on, and how it becomes batches."};
  for (const auto& more : {common_fields(), chat_fields()}) out.fields.insert(out.fields.end(), more.begin(), more.end());
  return out;
}

}  // namespace uly::recipe
