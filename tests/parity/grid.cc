#include "grid.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/json.h"
#include "base/safetensors.h"
#include "comm/world.h"
#include "plan/plan.h"
#include "train/train.h"

namespace uly::parity {
namespace {

namespace fs = std::filesystem;

void write_model(const fs::path& folder, const Shape& s, const std::string& more) {
  fs::create_directories(folder);
  const std::map<std::string, std::string> classes = {{"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}, {"mistral", "MistralForCausalLM"}};
  Json config = {{"architectures", {classes.at(s.family)}}, {"model_type", s.family}, {"hidden_size", s.D}, {"intermediate_size", s.F}, {"num_attention_heads", s.N}, {"num_key_value_heads", s.K},
                 {"head_dim", s.H}, {"vocab_size", s.V}, {"num_hidden_layers", s.L}, {"tie_word_embeddings", s.tied}, {"max_position_embeddings", 512}, {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0}, {"hidden_act", "silu"}, {"initializer_range", 0.1}};
  if (s.family == "mistral") config["sliding_window"] = nullptr;
  config.update(Json::parse(more));
  std::ofstream(folder / "config.json") << config.dump();
}

// Ragged documents: some trained only near their end, one not at all.
void write_tokens(const fs::path& path, const Training& run) {
  std::vector<int32_t> ids;
  std::vector<uint8_t> trained;
  std::vector<int64_t> starts{0};
  uint32_t state = 12345;
  for (size_t d = 0; d < run.lengths.size(); ++d) {
    for (int64_t i = 0; i < run.lengths[d]; ++i) {
      state = state * 1664525u + 1013904223u;
      const int64_t token = static_cast<int64_t>(ids.size());
      ids.push_back(run.distinct ? static_cast<int32_t>(token + 1) : static_cast<int32_t>((state >> 8) % static_cast<uint32_t>(run.shape.V)));
      if (token == run.changed) ids.back() = static_cast<int32_t>(run.shape.V) - 1;
      const auto& only = run.trained_documents;
      trained.push_back(!only.empty() ? std::count(only.begin(), only.end(), static_cast<int64_t>(d)) > 0 : d % 4 == 1 ? 0 : d % 4 == 0 ? (i * 10 > run.lengths[d] * 9) : (state >> 28) % 2);
    }
    starts.push_back(static_cast<int64_t>(ids.size()));
  }
  const int64_t T = static_cast<int64_t>(ids.size()), n = static_cast<int64_t>(starts.size());
  SafetensorsWriter writer(path, {{"ids", Dtype::kI32, {T}}, {"trained", Dtype::kU8, {T}}, {"starts", Dtype::kI64, {n}}},
                           {{"format", "ulysses-tokens-1"}, {"vocabulary", std::to_string(run.shape.V)}});
  writer.append(ids.data(), T * 4);
  writer.append(trained.data(), T);
  writer.append(starts.data(), n * 8);
  writer.finish();
}

void write_recipe(const fs::path& path, const fs::path& folder, const Training& run) {
  std::ofstream(path) << fmt::format(
      "type: sft\nmodel:\n  name_or_path: {0}/model\n  dtype: {1}\n  init: random\ndata:\n  sources: [{0}/none.jsonl]\n  max_length: 128\n  div_length: {7}\n"
      "optimizer:\n  learning_rate: 1.0e-3\nscheduler:\n  warmup_ratio: 0.0\ndeepspeed:\n  zero_optimization:\n    stage: 3\n    zero_hpz_partition_size: {10}\n  seq_parallel_communication_data_type: {8}\n"
      "sequence_parallel_size: {2}\ngradient_accumulation_steps: {3}\nmicro_batch_size: {4}\ntrain_log_iter_interval: {9}\ntrain_log_metrics_path: {0}/metrics.jsonl\nexit_iteration: {5}\nkill_switch_path: /nonexistent/stop\n{6}",
      folder.string(), run.dtype, run.P, run.accumulation, run.micro_batch, run.steps, run.extra, run.div_length, run.wire, run.evaluates ? 1 : 0, run.node);
}

}  // namespace

Result train(const Training& run) {
  static int count = 0;
  const fs::path folder = fs::temp_directory_path() / fmt::format("ulysses_parity_{}_{}", getpid(), count++);
  fs::create_directories(folder);
  write_model(folder / "model", run.shape, run.config);
  write_tokens(folder / "tokens.safetensors", run);
  write_recipe(folder / "run.yml", folder, run);
  train::Job job{.recipe_path = folder / "run.yml", .overrides = run.overrides, .model_folder = folder / "model", .tokenizer_folder = "", .tokens_path = folder / "tokens.safetensors", .dump_folder = folder / "dump"};
  if (run.evaluates && std::none_of(run.overrides.begin(), run.overrides.end(), [](const std::string& o) { return o.starts_with("data.train_eval_split"); })) {
    job.overrides.push_back("data.eval_sources=[none.jsonl]");
    job.eval_tokens_path = job.tokens_path;
  }
  if (run.evaluates) job.overrides.push_back("eval_interval=1");
  std::vector<comm::World> worlds = comm::World::threads(run.W, std::chrono::seconds(60));
  std::vector<std::thread> ranks;
  std::vector<std::exception_ptr> failures(static_cast<size_t>(run.W));
  for (size_t r = 0; r < worlds.size(); ++r)
    ranks.emplace_back([&, r] {
      try {
        train::run(job, worlds[r]);
      } catch (...) {
        failures[r] = std::current_exception();
      }
    });
  for (std::thread& t : ranks) t.join();
  for (const std::exception_ptr& f : failures)
    if (f) std::rethrow_exception(f);

  Result result;
  for (int64_t step = 1; step <= run.steps; ++step) {
    const SafetensorsFile file(folder / fmt::format("dump/step_{}.safetensors", step));
    result.losses.push_back(std::stod(file.metadata().at("loss")));
    auto& gradients = result.gradients.emplace_back();
    for (const auto& [name, t] : file.tensors()) {
      const float* data = reinterpret_cast<const float*>(t.data);
      gradients[name] = std::vector<float>(data, data + t.elements());
    }
  }
  if (run.evaluates) {
    std::ifstream metrics(folder / "metrics.jsonl");
    for (std::string line; std::getline(metrics, line);)
      if (const Json row = Json::parse(line); row.contains("eval_loss")) result.eval_losses.push_back(row["eval_loss"].get<double>());
  }
  fs::remove_all(folder);
  return result;
}

int64_t device_bytes_for(const Training& run, int64_t bytes) {
  constexpr int64_t kLongest = 128;
  const Shape& s = run.shape;
  models::Spec spec;
  spec.D = s.D, spec.F = s.F, spec.N = s.N, spec.K = s.K, spec.H = s.H, spec.V = s.V, spec.L = s.L;
  recipe::Recipe recipe;
  recipe.model.dtype = Dtype::kF32, recipe.sequence_parallel_size = run.P;
  plan::Machine machine = plan::this_machine(false, 0);
  machine.local_ranks = 1;
  plan::Plan plan;
  plan.mesh = {.W = run.W, .P = run.P, .rank = 0};
  plan.max_length = plan.planned_length = kLongest;
  plan::choose(plan, recipe, spec, machine, run.W);
  return (plan.besides_bytes + bytes) * 20 / 19 + 1;
}

double gradient_difference(const Result& a, const Result& b) {
  const auto norm = [](const std::vector<float>& v) {
    double sum = 0;
    for (const float x : v) sum += static_cast<double>(x) * x;
    return std::sqrt(sum);
  };
  double worst = 0;
  for (size_t step = 0; step < a.gradients.size(); ++step) {
    double largest = 0;
    for (const auto& [name, g] : a.gradients[step]) largest = std::max(largest, norm(g));
    for (const auto& [name, g] : a.gradients[step]) {
      const std::vector<float>& other = b.gradients[step].at(name);
      std::vector<float> difference(g.size());
      for (size_t i = 0; i < g.size(); ++i) difference[i] = g[i] - other[i];
      worst = std::max(worst, norm(difference) / std::max(norm(g), 1e-3 * largest));
      EXPECT_TRUE(std::isfinite(norm(other))) << name;
    }
  }
  return worst;
}

}  // namespace uly::parity
