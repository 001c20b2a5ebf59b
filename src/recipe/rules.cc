#include "recipe/rules.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "base/shapes.h"
#include "base/units.h"
#include "recipe/schedule.h"

namespace uly::recipe {
namespace {

bool given(const Recipe& r, const std::string& key) { return r.locations.contains(key); }

std::string item(const std::string& list, size_t i) { return list + "." + std::to_string(i); }

void data_type_is_the_recipes(Recipe& r) {
  const std::string type = r.data.as_given["type"];
  ULY_USER_CHECK(type == r.type, "{}: data.type: expected '{}' like type, found '{}'", r.where("data.type"), r.type, type);
}

void packs_go_alone(Recipe& r) {
  ULY_USER_CHECK(!r.data.pack_samples || r.micro_batch_size == 1, "{}: micro_batch_size: expected 1 with data.pack_samples, found {}",
                 r.where("micro_batch_size"), r.micro_batch_size);
}

// What only chats are packed by, given for texts, or for samples that are not packed; and what excludes each other.
void packing_is_whole(Recipe& r) {
  const bool causal = r.type == "causal";
  ULY_USER_CHECK(!given(r, "data.filter_samples") || r.data.as_given["overlong"].is_null(), "{}: data.overlong: expected it alone, found data.filter_samples ({}) beside it: remove that", r.where("data.overlong"), r.where("data.filter_samples"));
  ULY_USER_CHECK(r.data.pack_strategy == PackStrategy::kInOrder || !r.data.always_max_length || causal, "{}: data.pack_strategy: expected in_order with data.always_max_length, found best_fit: packs that are cut to length have nothing to fit", r.where("data.pack_strategy"));
  if (r.data.as_given["overlong"].is_null() && !r.data.filter_samples) r.data.overlong = Overlong::kKeep;
  for (const char* name : {"pack_samples", "pack_strategy", "always_max_length", "drop_last", "fuse_positions_prob", "repeat_to_pack_max_length", "overlong", "filter_samples", "mask_inputs", "ignore_empty_think"}) {
    const std::string key = std::string("data.") + name;
    if (causal && given(r, key)) r.notes.push_back({r.where(key), key, "no effect: type: causal joins texts and cuts them to packs of max_length"});
  }
  for (const char* name : {"pack_strategy", "always_max_length", "drop_last", "fuse_positions_prob", "repeat_to_pack_max_length"}) {
    const std::string key = std::string("data.") + name;
    if (!causal && !r.data.pack_samples && given(r, key)) r.notes.push_back({r.where(key), key, "no effect: data.pack_samples is false"});
  }
  if (!causal) return;
  r.data.pack_samples = r.data.always_max_length = r.data.drop_last = true;
  r.data.pack_strategy = PackStrategy::kInOrder, r.data.overlong = Overlong::kSplit;
  r.data.fuse_positions_prob = 0, r.data.repeat_to_pack_max_length = false;
}

void padding_fits(Recipe& r) {
  const int64_t length = r.data.max_length;
  const int64_t multiple = r.data.div_length;
  if (r.data.pad_to != PadTo::kMaxLength || !given(r, "data.div_length") || length <= 0 || length % multiple == 0) return;
  const int64_t above = round_up(length, multiple);
  const std::string below = above > multiple ? format_count(above - multiple) + " or " : "";
  user_error("{}: data.max_length: expected a multiple of data.div_length {} with pad_to: max_length, such as {}{}, found {}", r.where("data.max_length"),
             format_count(multiple), below, format_count(above), format_count(length));
}

void shares_sum_to_one(Recipe& r) {
  const Json& shares = r.data.as_given["train_eval_split"];
  const double sum = shares[0].get<double>() + shares[1].get<double>();
  ULY_USER_CHECK(std::fabs(sum - 1.0) < 1e-9, "{}: data.train_eval_split: expected two shares with sum 1, found {}", r.where("data.train_eval_split"),
                 shares.dump());
  ULY_USER_CHECK(shares[1] == 0.0 || r.data.eval_sources.empty(), "{}: data.train_eval_split: expected [1.0, 0.0] with data.eval_sources, found {}",
                 r.where("data.train_eval_split"), shares.dump());
}

void evaluation_is_whole(Recipe& r) {
  const bool has_data = !r.data.eval_sources.empty() || r.data.as_given["train_eval_split"][1] != 0.0;
  ULY_USER_CHECK(!has_data || r.eval_interval > 0, "{}: eval_interval: expected an integer >= 1 as there is data to evaluate on, found 0",
                 r.where("eval_interval"));
  ULY_USER_CHECK(has_data || r.eval_interval == 0, "{}: eval_interval: expected data.eval_sources or data.train_eval_split to evaluate on, found none",
                 r.where("eval_interval"));
  if (!has_data && given(r, "eval_log_iter_interval")) r.notes.push_back({r.where("eval_log_iter_interval"), "eval_log_iter_interval", "no effect: there is no data to evaluate on"});
}

void samples_are_drawn_one_way(Recipe& r) {
  for (const char* list : {"data.sources", "data.eval_sources"}) {
    const std::vector<Source>& sources = list == std::string("data.sources") ? r.data.sources : r.data.eval_sources;
    for (size_t i = 0; i < sources.size(); ++i) {
      const bool both = !sources[i].as_given["sample_ratio"].is_null() && !sources[i].as_given["sample_count"].is_null();
      const std::string path = item(list, i);
      ULY_USER_CHECK(!both, "{}: {}: expected sample_ratio or sample_count, found both", r.where(path + ".sample_count"), path);
    }
  }
}

void special_tokens_are_not_added_twice(Recipe& r) {
  const Json& arguments = r.normalized["tokenizer"]["tokenize_kwargs"];
  const bool added = arguments.contains("add_special_tokens") && arguments["add_special_tokens"] == true;
  ULY_USER_CHECK(!added, "{}: tokenizer.tokenize_kwargs: add_special_tokens would add them twice; remove it", r.where("tokenizer.tokenize_kwargs"));
}

void schedule_is_complete(Recipe& r) {
  const std::string problem = schedule_problem(r.scheduler, r.optimizer.learning_rate);
  const std::string key = given(r, "scheduler.scheduler_specific_kwargs") ? "scheduler.scheduler_specific_kwargs" : "scheduler.name";
  ULY_USER_CHECK(problem.empty(), "{}: {}: {}", r.where(key), key, problem);
}

void one_entry_resumes(Recipe& r) {
  const auto resumes = [](const Checkpoint& c) { return c.auto_resume; };
  ULY_USER_CHECK(std::count_if(r.checkpoint.begin(), r.checkpoint.end(), resumes) <= 1, "{}: checkpoint: expected auto_resume in one entry at most, found more",
                 r.where("checkpoint"));
  for (size_t i = 0; i < r.checkpoint.size(); ++i) {
    const std::string key = item("checkpoint", i) + ".auto_resume";
    ULY_USER_CHECK(!r.checkpoint[i].auto_resume || r.checkpoint[i].type != "huggingface",
                   "{}: {}: a huggingface checkpoint holds weights only; put auto_resume on an entry of type deepspeed", r.where(key), key);
  }
}

void folders_are_of_one_kind(Recipe& r) {
  const auto folder = [](const Checkpoint& c) {
    std::error_code error;
    return std::filesystem::weakly_canonical(std::filesystem::absolute(c.output_dir, error), error);
  };
  for (size_t i = 0; i < r.checkpoint.size(); ++i)
    for (size_t j = 0; j < i; ++j) {
      const Checkpoint &a = r.checkpoint[j], &b = r.checkpoint[i];
      const std::string key = item("checkpoint", i) + ".output_dir";
      ULY_USER_CHECK(!a.enabled || !b.enabled || folder(a) != folder(b) || (a.type == "huggingface") == (b.type == "huggingface"),
                     "{}: {}: {} holds states and models, both as global_step_N: expected a folder for each", r.where(key), key, b.output_dir);
      ULY_USER_CHECK(!a.enabled || !b.enabled || folder(a) != folder(b) || b.type == "huggingface", "{}: {}: {} is another entry's folder for states too: expected one entry, or a folder for each", r.where(key), key, b.output_dir);
    }
}

void limits_are_of_states(Recipe& r) {
  for (size_t i = 0; i < r.checkpoint.size(); ++i) {
    const std::string key = item("checkpoint", i) + ".save_total_limit";
    if (r.checkpoint[i].type == "huggingface" && r.checkpoint[i].save_total_limit > 0) r.notes.push_back({r.where(key), key, "no effect: models that were saved are never removed"});
  }
}

void scratch_has_folders(Recipe& r) {
  const Json& memory = r.normalized["memory"];
  const bool named = memory.is_object() && memory.contains("disk") && memory["disk"].is_string();
  ULY_USER_CHECK(!named || !r.memory_disk_folders.empty(), "{}: memory.disk: expected folders with commas between them, found '{}'", r.where("memory.disk"), memory["disk"].get<std::string>());
  if (r.memory_disk_bytes > 0 && r.memory_disk_folders.empty()) r.notes.push_back({r.where("memory.disk_size"), "memory.disk_size", "no effect: memory.disk names no folder"});
}

constexpr std::array kRules = {
    data_type_is_the_recipes,           packs_go_alone,       packing_is_whole,     padding_fits,      shares_sum_to_one,      evaluation_is_whole, samples_are_drawn_one_way,
    special_tokens_are_not_added_twice, schedule_is_complete, one_entry_resumes, folders_are_of_one_kind, limits_are_of_states,
    scratch_has_folders};

}  // namespace

void check_rules(Recipe& recipe) {
  for (const auto& rule : kRules) rule(recipe);
}

}  // namespace uly::recipe
