// Fills a plan's lines and facts: what a person and a program read.
#pragma once

#include <optional>

#include "data/token_file.h"
#include "plan/plan.h"

namespace uly::plan {

void explain(Plan& plan, const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, const std::optional<DataFacts>& facts, const data::Selection& selection, const Asked& asked);

}  // namespace uly::plan
