#include "base/check.h"
#include "base/log.h"
#include "cli/job.h"

namespace uly::cli {

// Asks for the model's configuration only, prepares nothing, and writes nothing: what comes later in a recipe is no reason to
// refuse, as it takes no part in a step's memory.
int rehearse(const Options& options) {
  ULY_USER_CHECK(options.profile_path.empty() && options.dump_folder.empty(), "ulysses rehearse: --profile and --dump are for training: there is no arithmetic to see");
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const Ranks ranks = choose_ranks(options, recipe, true);
  if (ranks.cuda && ranks.obstacle) throw UserError(ranks.obstacle->sentence());
  std::vector<std::string> command = {engine_program(), "train", options.recipe, "--rehearse", "--device", ranks.cuda ? "cuda" : "cpu", "--model"};
  check_meeting_place(ranks);
  if (ranks.speaks() && !ranks.chosen) say("device: {}", device_words(ranks));

  const models::Spec spec = find_model(recipe, Fetch::kConfiguration);
  const plan::Machine machine = machine_of(ranks);
  const plan::Plan plan = plan::make(recipe, spec, machine, ranks.world, std::nullopt);
  if (!plan.fits) throw WillNotFit(plan.why_not);

  command.push_back(model_place(spec));
  if (machine.measured) command.insert(command.end(), {"--rates", launch::rates_path()});
  if (options.json) command.push_back("--json");
  command.insert(command.end(), options.overrides.begin(), options.overrides.end());
  if (ranks.place) launch::set_place(*ranks.place);
  wait_for_machines(ranks);
  return run_ranks(options, ranks, machine, command);
}

}  // namespace uly::cli
