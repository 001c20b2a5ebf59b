// Walks a document along the rows of its sections.
#pragma once

#include <string>

#include "recipe/field.h"
#include "recipe/yaml.h"

namespace uly::recipe {

// Sets every member of `recipe` that has a row, its locations, its notes and what comes later; returns the whole file
// as JSON with defaults filled in. `recipe.path` must be set. Throws UserError.
Json read_recipe(const Section& rows, const Node& root, Recipe& recipe);

}  // namespace uly::recipe
