// Fills a plan's lines and facts: what a person and a program read.
#pragma once

#include "plan/plan.h"

namespace uly::plan {

void explain(Plan& plan, const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, const Asked& asked);

}  // namespace uly::plan
