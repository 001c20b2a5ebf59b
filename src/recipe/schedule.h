// The schedules that recipe::learning_rate knows.
#pragma once

#include <string>
#include <vector>

#include "recipe/recipe.h"

namespace uly::recipe {

std::vector<std::string> schedule_names();

// Returns what is wrong with the schedule's name or arguments, in a sentence; "" if nothing is.
std::string schedule_problem(const Scheduler& scheduler, double base);

}  // namespace uly::recipe
