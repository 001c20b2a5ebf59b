// Why a plan is as it is: what else was considered, and a sentence for each choice, from the prices of the alternatives.
#pragma once

#include "plan/plan.h"

namespace uly::plan {

// Adds lines and facts to a plan whose search was thorough.
void add_reasons(Plan& plan, const models::Spec& spec, const Question& question);

// "optimizer on the host, updated on the device; the first 8 of 34 units stay on the device"
std::string states_words(const std::string& words, const step::Options& options);

// What is kept of layers and where, in a phrase: "inputs of 32 layers (20 away), q, k, v of 17; states on the device".
std::string kept_words(const Plan& plan);

// "the device is 3.1 GiB short, the disk is 12.0 GiB short"; "" where nothing is.
std::string shortage_words(const Bytes& bytes, const Bytes& limits);

}  // namespace uly::plan
