// A saved state as a Hugging Face model: read in pieces, never the whole in memory.
#include <cstdio>
#include <filesystem>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/units.h"
#include "checkpoint/hub.h"
#include "checkpoint/state.h"
#include "cli/job.h"
#include "kernels/bf16.h"
#include "kernels/optimizer.h"

namespace uly::cli {
namespace {

// The newest of what the recipe saves, unless the command line names one.
std::string state_of(const Options& options, const recipe::Recipe& recipe) {
  if (!options.from.empty()) return options.from;
  std::string looked;
  for (const recipe::Checkpoint& c : recipe.checkpoint) {
    if (!c.enabled || c.type != "deepspeed") continue;
    if (const auto found = checkpoint::find_states(c.output_dir); !found.empty()) return found[0];
    looked += (looked.empty() ? "" : ", ") + c.output_dir;
  }
  if (looked.empty()) user_error("{}: it saves no state (checkpoint of type deepspeed): expected --from FOLDER", recipe.path);
  user_error("{}: expected a saved state (global_step_N), found none", looked);
}

}  // namespace

int export_state(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const models::Spec spec = find_model(recipe, Fetch::kConfiguration);
  const std::vector<models::Unit> units = models::units(spec);
  std::string from = state_of(options, recipe);
  while (from.size() > 1 && from.ends_with('/')) from.pop_back();
  const std::string to = options.to.empty() ? from + "-huggingface" : options.to;
  checkpoint::StateReader state(from);
  state.check_model(checkpoint::identity(spec, units));
  std::string tokenizer = tokenizer_folder(recipe);
  if (tokenizer.empty()) tokenizer = spec.folder;
  checkpoint::HubWriter writer(spec, {.folder = to, .dtype = recipe.model.dtype, .tokenizer_folder = tokenizer});
  const bool split = recipe.master_weights == "split";
  std::vector<float> values;
  std::vector<uint16_t> rounded;
  for (const models::Unit& unit : units)
    for (int64_t at = 0; at < unit.elements; at += checkpoint::kAtOnce) {
      const int64_t count = std::min(checkpoint::kAtOnce, unit.elements - at);
      values.resize(static_cast<size_t>(count));
      state.read(unit.name, checkpoint::Moment::kMaster, at, count, values.data());
      if (recipe.model.dtype == Dtype::kF32) {
        writer.append(values.data(), count);
        continue;
      }
      rounded.resize(values.size());
      for (size_t i = 0; i < values.size(); ++i) rounded[i] = split ? kernels::split(values[i]).weight : kernels::to_bf16(values[i]).bits;  // as training does
      writer.append(rounded.data(), count);
    }
  writer.finish();
  const Json facts = {{"state", from}, {"step", state.manifest().at("step")}, {"folder", to}};
  if (options.json) fmt::print("{}\n", facts.dump(2));
  else say("{}: step {} as a Hugging Face model", to, format_count(state.manifest().at("step").get<int64_t>()));
  return 0;
}

}  // namespace uly::cli
