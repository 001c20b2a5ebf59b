#include "plan/plan.h"

#include <fmt/format.h>

#include <cstdio>

#include "base/check.h"
#include "cli/job.h"

namespace uly::cli {

Ranks choose_ranks(const Options& options, const recipe::Recipe& recipe, bool join) {
  Ranks ranks;
  ranks.gpus = launch::visible_gpus();
  if (options.device) {
    ULY_USER_CHECK(*options.device == "cpu" || *options.device == "cuda", "--device: expected cpu or cuda, found '{}'", *options.device);
    ranks.cuda = *options.device == "cuda";
  } else if (ranks.gpus.visible > 0) {
    ranks.why = "training on GPUs is not available in this version";
  } else if (ranks.gpus.in_machine > 0) {
    ranks.why = fmt::format("no GPU visible: CUDA_VISIBLE_DEVICES is '{}'", ranks.gpus.variable.value_or(""));
  } else {
    ranks.why = "no GPU visible";
  }
  if (join) ranks.place = launch::place_in_job();
  const int64_t P = recipe.sequence_parallel_size;
  if (ranks.place) {
    ULY_USER_CHECK(!options.num_ranks || *options.num_ranks == ranks.place->world_size,
                   "--num_gpus: this process belongs to a job of WORLD_SIZE = {} ranks, found {}", ranks.place->world_size, options.num_ranks.value_or(0));
    ranks.world = ranks.place->world_size;
  } else {
    ranks.world = options.num_ranks.value_or(P);
  }
  ULY_USER_CHECK(ranks.world >= 1, "--num_gpus: expected at least 1, found {}", ranks.world);
  ULY_USER_CHECK(ranks.world % P == 0, "sequence_parallel_size ({}): expected a divisor of {} rank{}, found {}", recipe.where("sequence_parallel_size"),
                 ranks.world, ranks.world == 1 ? "" : "s", P);
  return ranks;
}

// Starts nothing and asks no network: a plan is made from the recipe, the model's configuration and this machine.
int plan(const Options& options) {
  const recipe::Recipe recipe = recipe::load(options.recipe, options.overrides);
  const Ranks ranks = choose_ranks(options, recipe, false);
  const models::Spec spec = find_model(recipe, Fetch::kNothing);
  const plan::Plan plan = plan::make(recipe, spec, plan::this_machine(ranks.cuda, ranks.gpus.visible), ranks.world, std::nullopt);
  const std::string out = options.json ? plan.facts.dump(2) + "\n" : plan::text(plan);
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
  return 0;  // also where it does not fit here: the plan says so, and may be for another machine; `train` refuses
}

}  // namespace uly::cli
