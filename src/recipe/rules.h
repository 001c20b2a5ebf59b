// What the keys must be together. Rules that need the model or the number of ranks are the planner's.
#pragma once

#include "recipe/recipe.h"

namespace uly::recipe {

// Throws UserError for the first rule that is broken; adds to `later` what only several keys together ask for.
// `recipe.normalized` must be set.
void check_rules(Recipe& recipe);

}  // namespace uly::recipe
