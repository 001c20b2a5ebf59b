// What would fit: the longest sequence, and what is short where a plan does not.
#pragma once

#include <string>

#include "plan/plan.h"

namespace uly::plan {

// In plan.cc. All of a plan but what is kept where, for samples of `max_length` tokens; what the search is asked for it; and the
// search itself.
Plan sized(const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world, int64_t max_length);
Question question(const Plan& plan, const recipe::Recipe& recipe, const Machine& machine);
void choose_kept(const step::Model& model, Plan& plan, const Question& question);

// In multiples of `unit` tokens, with the places of buffers. A pure function, as the plan is. Nothing where the device's memory is
// not known.
Longest find_longest(const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world, int64_t most, int64_t unit, int64_t from);

// The kind of bytes that a tier has most of at its fullest.
struct Largest {
  ops::Kind kind = ops::Kind::kWeights;
  int64_t bytes = 0;
};
Largest largest_kind(const Price& price, ops::Tier tier);

// Of a plan that does not fit: finds the tier with too little room, puts in the plan's choices what would do with least more of it,
// and returns a sentence: what is short and by how much, what of it is largest, and what to change.
std::string why_not(Plan& plan, const recipe::Recipe& recipe, const models::Spec& spec, const Machine& machine, int64_t world);

}  // namespace uly::plan
