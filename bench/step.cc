// Forward and backward of the Llama-3.1-8B shape on one GPU, random weights and ids, bf16, gradients summed in fp32; with
// --optimizer whole training steps, AdamW with fp32 states included: steps until the given time has passed. Prints one JSON
// object: what was measured, and what the plan had said.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <span>

#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/units.h"
#include "comm/world.h"
#include "engine/make.h"
#include "engine/profile.h"
#include "kernels/bf16.h"
#include "memory/gauges.h"
#include "launch/environment.h"
#include "launch/gpus.h"
#include "models/families.h"
#include "plan/plan.h"
#include "step/decoder.h"

namespace {

using namespace uly;
using Clock = std::chrono::steady_clock;

struct Flags {
  int64_t length = 16384, layers = 32, documents = 1, forward_block = 0, backward_queries = -1, backward_keys = 0, heads_at_once = 0, mlp_tile = 0;
  double seconds = 60, memory_gib = 0, host_gib = 0, disk_gib = 0;
  int warmup = 2;
  bool deterministic = false, untimed = false, keep_inputs = false, optimizer = false, split = false, show = false;
  std::string disk, profile, attention = "auto", shape = "meta-llama/Llama-3.1-8B";
};

Flags parse(int argc, char** argv) {
  Flags f;
  CLI::App app{"Measures forward and backward"};
  app.add_option("--length", f.length);
  app.add_option("--layers", f.layers);
  app.add_option("--documents", f.documents, "of equal length");
  app.add_option("--seconds", f.seconds);
  app.add_option("--warmup", f.warmup, "steps");
  app.add_option("--memory", f.memory_gib, "GiB to plan for; by default what is free");
  app.add_option("--host-memory", f.host_gib, "GiB; by default what is free");
  app.add_option("--disk", f.disk, "folders");
  app.add_option("--disk-size", f.disk_gib, "GiB");
  app.add_flag("--optimizer", f.optimizer, "whole training steps");
  app.add_flag("--split-master", f.split);
  app.add_flag("--show", f.show, "print the plan's choices and stop");
  app.add_option("--forward-block", f.forward_block);
  app.add_option("--backward-queries", f.backward_queries, "0: in one call");
  app.add_option("--backward-keys", f.backward_keys);
  app.add_option("--heads-at-once", f.heads_at_once, "key-value heads");
  app.add_option("--mlp-tile", f.mlp_tile, "tokens");
  app.add_option("--attention", f.attention);
  app.add_option("--shape", f.shape);
  app.add_flag("--untimed", f.untimed, "without the last step, in which the kinds of work are timed");
  app.add_option("--profile", f.profile, "file for a trace of the last step");
  app.add_flag("--deterministic", f.deterministic);
  app.add_flag("--keep-inputs", f.keep_inputs, "keep layer inputs, attention output and log-sum-exp only");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    std::exit(app.exit(e));
  }
  return f;
}

// Of the control group, pages of files included; 0 where that is not known.
int64_t host_peak_bytes() {
  std::ifstream file("/sys/fs/cgroup/memory.peak");
  int64_t bytes = 0;
  return file >> bytes ? bytes : memory::peak_resident_bytes();
}

plan::Machine look() {
  plan::Machine m = plan::this_machine(true, 1);
  const launch::Gpus gpus = launch::ask_gpus();
  ULY_USER_CHECK(!gpus.list.empty(), "no GPU: {}", gpus.why);
  plan::use_gpus(m, std::span(gpus.list).first(1));
  return m;
}

// Norms are 1, all else the same noise again and again: what it is worth is no matter here, that it is not zero is.
void fill(engine::Engine& engine, const step::Model& model, const step::States& states) {
  std::vector<kernels::Bf16> noise(size_t{1} << 24), ones(size_t{1} << 20, kernels::to_bf16(1.0f));
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 0.02f);
  for (auto& x : noise) x = kernels::to_bf16(normal(random));
  std::vector<float> noise32, ones32(ones.size(), 1.0f);
  for (const auto x : noise) noise32.push_back(kernels::to_float(x));
  for (size_t u = 0; u < model.units.size(); ++u)
    for (const models::Tensor& t : model.units[u].tensors) {
      const bool norm = t.elements() <= model.spec.D;
      const auto& values = norm ? ones : noise;
      const step::UnitState& state = states.units[u];
      for (int64_t at = 0; at < t.elements(); at += static_cast<int64_t>(values.size())) {
        const int64_t count = std::min<int64_t>(t.elements() - at, static_cast<int64_t>(values.size()));
        for (const ops::Buffer& half : {state.weight, state.copy})
          if (half.exists()) engine.write(half.column_range(t.offset + at, count), values.data());
        if (state.master.exists() && state.master.dtype == Dtype::kF32) engine.write(state.master.column_range(t.offset + at, count), norm ? ones32.data() : noise32.data());
      }
    }
}

engine::BatchData make_batch(const Flags& f, const models::Spec& spec) {
  engine::BatchData b;
  std::mt19937_64 random(3);
  for (int64_t i = 0; i < f.length; ++i) b.ids.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(spec.V))), b.labels.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(spec.V)));
  for (int64_t d = 0; d < f.documents; ++d) {
    const int64_t from = d * f.length / f.documents, to = (d + 1) * f.length / f.documents;
    b.document_starts.push_back(from);
    for (int64_t i = from; i < to; ++i) b.positions.push_back(i - from);
  }
  b.document_starts.push_back(f.length);
  b.scale = 1.0 / static_cast<double>(f.length);
  const models::RopeTable rope = models::rope_table(spec, f.length);
  b.inverse_frequencies = rope.inverse_frequencies, b.rope_factor = rope.attention_factor;
  return b;
}

void run(const Flags& f) {
  models::Spec spec = models::find(f.shape, "", Json::object());
  spec.L = f.layers;
  const plan::Machine machine = look();
  recipe::Recipe recipe;
  recipe.model.dtype = Dtype::kBf16;
  recipe.attention = f.attention, recipe.deterministic = f.deterministic;
  const auto bytes = [](double gib) { return static_cast<int64_t>(gib * 1073741824.0); };
  recipe.memory_device_bytes = bytes(f.memory_gib), recipe.memory_host_bytes = bytes(f.host_gib), recipe.memory_disk_bytes = bytes(f.disk_gib);
  if (!f.disk.empty()) recipe.memory_disk_folders = {f.disk};
  if (f.split) recipe.master_weights = "split";
  plan::Plan plan;
  plan.planned_length = f.length;
  plan.options.optimizer = f.optimizer;
  plan::choose(plan, recipe, spec, machine, 1);
  step::Options& o = plan.options;
  if (f.forward_block > 0) o.attention.forward_block = f.forward_block;
  if (f.backward_queries >= 0) o.attention.backward_queries = f.backward_queries, o.attention.backward_keys = f.backward_keys;
  if (f.heads_at_once > 0) o.attention.kv_heads_at_once = f.heads_at_once;
  if (f.mlp_tile > 0) o.mlp_tile = f.mlp_tile;
  if (f.keep_inputs) o.keep.assign(static_cast<size_t>(spec.L), {});
  const step::Model model(spec);
  const bool defers = o.optimizer && o.defers_updates();
  const plan::Price price = plan::price_step(model, o), first_price = plan::price_micro_step(model, o, {});
  ULY_USER_CHECK(plan.fits, "does not fit: {} on the device, {} on the host, {} on the disk", format_bytes(plan::total_bytes(plan)), format_bytes(price.total_bytes(ops::Tier::kHost)), format_bytes(price.total_bytes(ops::Tier::kDisk)));
  Json choices = {{"states", plan.states_words}, {"host_gib", static_cast<double>(price.total_bytes(ops::Tier::kHost)) / 1073741824.0}, {"disk_gib", static_cast<double>(price.total_bytes(ops::Tier::kDisk)) / 1073741824.0}, {"predicted_seconds", plan.price.seconds}, {"rebuilt_inputs", o.rebuilt_inputs}};
  for (const step::LayerKeep& k : o.keep)
    choices["layers"].push_back(fmt::format("{}{}{}{}", static_cast<int>(k.level), k.input ? ops::name_of(k.input_tier)[1] : '-', k.output ? ops::name_of(k.output_tier)[1] : '-', ops::name_of(k.gate_up_tier)[1]));
  if (f.show) {
    std::cout << choices.dump() << std::endl;
    return;
  }
  step::Options nothing_rebuilt = o;
  nothing_rebuilt.keep.assign(static_cast<size_t>(spec.L), {.level = step::Keep::kEverything});
  const double least_flops = plan::price_step(model, nothing_rebuilt).gemm_flops;
  const int64_t priced = price.total_bytes() + plan.besides_bytes;

  comm::World world = std::move(comm::World::threads(1)[0]);
  const auto sequence = world.subgroup({0}, "sequence");
  const auto engine = engine::make_cuda_engine(launch::program_folder(), world.all(), *sequence, {.device = 0, .scratch_bytes = ops::kernel_scratch_bytes(plan::widest_summed_columns(spec)), .deterministic = f.deterministic, .disk_folders = recipe.memory_disk_folders, .advice = {}});
  const auto started = Clock::now();
  const auto progress = [&](std::string_view what) { say("{:6.1f} s: {}", std::chrono::duration<double>(Clock::now() - started).count(), what); };
  engine->begin_run(price.run_places);
  ops::Places largest = price.step_places;
  for (size_t t = 0; t < largest.arena_bytes.size(); ++t) largest.arena_bytes[t] = std::max(largest.arena_bytes[t], first_price.step_places.arena_bytes[t]);
  engine->reserve_step(largest);
  const step::States states = step::make_states(*engine, model.units, o);
  progress("memory taken");
  fill(*engine, model, states);
  progress("states filled");
  const engine::BatchData batch = make_batch(f, spec);
  double loss = 0;
  int64_t steps = 0;
  const plan::Price with_update = plan::price_micro_step(model, o, {.update = defers});
  const auto step = [&] {
    const auto begin = Clock::now();
    const bool update = defers && steps++ > 0;
    step::begin(*engine, states);
    engine->begin_step(update ? with_update.step_places : first_price.step_places, batch, ops::document_table_bytes(o.attention, o.S()));
    step::micro_step(*engine, model, o, states, {.update = update});
    if (o.optimizer) {
      step::finish_gradients(*engine, o, states);
      engine->set_update({.learning_rate = 1e-6, .weight_decay = 0.1, .step = steps + 1});
      if (!defers) step::update(*engine, model, o, states);
    }
    const double launched = std::chrono::duration<double>(Clock::now() - begin).count();
    loss = engine->scalar(states.loss_total);
    progress(fmt::format("a step of {:.2f} s", std::chrono::duration<double>(Clock::now() - begin).count()));
    return std::pair(std::chrono::duration<double>(Clock::now() - begin).count(), launched);
  };
  std::vector<double> warm;
  for (int i = 0; i < f.warmup; ++i) warm.push_back(step().first);
  std::vector<double> times;
  double total = 0, launching = 0;
  while (total < f.seconds) {
    const auto [seconds, launched] = step();
    times.push_back(seconds), total += seconds, launching += launched;
  }
  double timed = 0;
  std::map<std::string, double> by_kind;
  if (!f.untimed) {
    engine->time(true);
    timed = step().first;
    by_kind = engine->seconds();
    engine->time(false);
  }
  if (!f.profile.empty()) {
    engine::start_profile(true);
    step();
    engine::stop_profile(f.profile);
  }
  double known = 0;
  for (const auto& [name, seconds] : by_kind)
    if (name != "elementwise") known += seconds;
  const launch::Gpus after = launch::ask_gpus();
  const double attention_flops = 2.0 * static_cast<double>(f.length) * static_cast<double>(f.length) / static_cast<double>(f.documents) * static_cast<double>(spec.N * spec.H * spec.L);
  const auto count = [&](step::Keep k) { return std::count_if(o.keep.begin(), o.keep.end(), [&](const step::LayerKeep& l) { return l.level == k; }); };
  const auto gib = [](int64_t bytes) { return static_cast<double>(bytes) / 1073741824.0; };
  const int64_t used = machine.gpu_total_bytes - (after.list.empty() ? 0 : after.list[0].free_bytes) - (machine.gpu_total_bytes - machine.gpu_free_bytes);
  const Json row = {{"system", "ulysses"}, {"length", f.length}, {"layers", spec.L}, {"documents", f.documents}, {"tokens_per_second", static_cast<double>(f.length) * static_cast<double>(times.size()) / total}, {"steps", times.size()},
                    {"seconds", total}, {"step_seconds", times}, {"warmup_seconds", warm}, {"launch_seconds", launching / static_cast<double>(times.size())}, {"timed_step_seconds", timed},
                    {"attention_forward_seconds", by_kind["attention_forward"]}, {"attention_backward_seconds", by_kind["attention_backward"]}, {"gemm_seconds", by_kind["gemm"]}, {"elementwise_seconds", by_kind["elementwise"]},
                    {"other_seconds", timed - known}, {"attention_forward_tflops", attention_flops / by_kind["attention_forward"] / 1e12}, {"attention_backward_tflops", 2.5 * attention_flops / by_kind["attention_backward"] / 1e12},
                    {"gemm_tflops", price.gemm_flops / by_kind["gemm"] / 1e12}, {"peak_gib", gib(used)}, {"driver_peak_gib", gib(used)}, {"priced_gib", gib(priced)}, {"optimizer", o.optimizer}, {"plan", choices}, {"host_peak_gib", gib(host_peak_bytes())}, {"arenas_gib", gib(price.total_bytes())},
                    {"workspace_gib", gib(ops::attention_grad_workspace_bytes(o.attention, {.n = spec.N, .k = spec.K, .H = spec.H, .G = spec.N / spec.K}, f.length))}, {"recomputed_gemm_flops", price.gemm_flops - least_flops},
                    {"recomputed", fmt::format("{} layers keep everything, {} gate and up, {} projections, {} input, output and LSE only", count(step::Keep::kEverything), count(step::Keep::kGateUp), count(step::Keep::kProjections), count(step::Keep::kInput))},
                    {"loss", loss}, {"gpu", machine.gpu_name}, {"attention", {{"kv_heads_at_once", std::min(o.attention.kv_heads_at_once, spec.K)}, {"forward_block", o.attention.forward_block}, {"backward_queries", o.attention.backward_queries}, {"backward_keys", o.attention.backward_keys}, {"deterministic", o.attention.deterministic}}}};
  std::cout << row.dump() << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 70;
  }
  return 0;
}
