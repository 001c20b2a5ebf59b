#include "plan/longest.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "base/shapes.h"
#include "base/units.h"

namespace uly::plan {
namespace {

using ops::Tier;

// The largest multiple of `unit` up to `most` for which fits(n) holds, within half a percent, if it does for all below: by doubling
// from `from`, then halving between. 0 if for none.
template <typename Fits>
int64_t largest_about(int64_t most, int64_t unit, int64_t from, Fits&& fits) {
  const auto round = [&](double n) { return static_cast<int64_t>(n) / unit * unit; };
  most = most / unit * unit;
  int64_t low = 0, high = most + unit;
  for (int64_t n = std::clamp(round(static_cast<double>(from)), std::min(unit, most), most); n > low && n < high; n = std::min(2 * n, most)) (fits(n) ? low : high) = n;
  while (high - low > unit && high - low > low / 200) {
    // Where nothing is known to fit, downward by quarters.
    const int64_t middle = std::clamp(round(low > 0 ? std::sqrt(static_cast<double>(low) * static_cast<double>(high)) : static_cast<double>(high) / 4), low + unit, high - unit);
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

int64_t bytes_in(const Price& price, const Plan& plan, Tier tier) { return price.total_bytes(tier) + (tier == Tier::kDevice ? plan.besides_bytes : 0); }

// The first of disk, host and device with too little room for `plan`, which does not fit, where the others have enough; and what has
// least in that tier. Nothing where no tier alone is too small.
struct Short {
  Tier tier = Tier::kDevice;
  Candidate candidate;
  Price price;
};
std::optional<Short> too_small(const step::Model& model, const Plan& plan, const Question& q, int64_t& pricings) {
  std::optional<Short> found;
  constexpr int64_t kWhatever = int64_t{1} << 60;
  Question more = q;
  for (int64_t Room::*bytes : {&Room::host_bytes, &Room::disk_bytes})
    if (more.room.*bytes > 0) more.room.*bytes = kWhatever;
  FitTrial trial;
  const bool for_device = !anything_that_fits(model, plan.options, more, trial);
  pricings += trial.pricings;
  for (const Tier tier : {Tier::kDisk, Tier::kHost, Tier::kDevice}) {
    if (plan.room.of(tier) == 0 || (for_device && tier != Tier::kDevice)) continue;
    FitTrial least;
    std::optional<Candidate> c = with_least(model, plan.options, q, tier, least);
    pricings += least.pricings;
    if (!c) continue;
    Price price = price_with_places(model, c->options, q.rates);
    found = Short{tier, std::move(*c), std::move(price)};
    // More room here helps only where the device has what its places take with their gaps.
    if (tier == Tier::kDevice || plan.room.device_bytes == 0 || bytes_in(found->price, plan, Tier::kDevice) <= plan.room.device_bytes) break;
  }
  return found;
}

const char* kind_words(ops::Kind kind) { return kind == ops::Kind::kOptimizer ? "optimizer states" : ops::name_of(kind); }

// As a recipe takes it, rounded up.
std::string in_gib(int64_t bytes) {
  constexpr int64_t kMiB = int64_t{1} << 20, kGiB = int64_t{1} << 30;
  return bytes < kGiB ? fmt::format("{}MiB", ceil_div(bytes, kMiB)) : fmt::format("{}GiB", ceil_div(bytes, kGiB));
}

// Steps in which a length is looked for that is shorter than `most`.
int64_t unit_below(const recipe::Recipe& r, int64_t most) {
  constexpr int64_t kUnit = 256;
  return most >= 8 * kUnit ? kUnit : std::min(kUnit, r.sequence_parallel_size * r.data.div_length);
}

// --- what would have to change

std::string advice(const Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, Tier tier, int64_t needed) {
  std::vector<std::string> ways;
  const step::Model model(spec);
  const int64_t ranks_here = ranks_on_machine(machine, world);
  const auto fits = [&](const Plan& p, const recipe::Recipe& with) {
    FitTrial trial;
    return anything_that_fits(model, p.options, question(p, with, machine), trial).has_value();
  };
  if (tier == Tier::kHost && plan.room.disk_bytes == 0) {
    Question q = question(plan, r, machine);
    q.room.disk_bytes = 1;  // any
    FitTrial trial;
    if (const auto c = with_least(model, plan.options, q, Tier::kDisk, trial)) ways.push_back(fmt::format("keep them on a disk with memory.disk, {} of it", in_gib(c->bytes[2] * ranks_here)));
  }
  if (tier == Tier::kHost && r.memory_host_bytes > 0) ways.push_back(fmt::format("memory.host={}", in_gib(needed * ranks_here)));
  if (tier == Tier::kDisk) ways.push_back(r.memory_disk_bytes > 0 ? fmt::format("memory.disk_size={}", in_gib(needed * ranks_here)) : "a folder on a larger disk in memory.disk");
  if (tier == Tier::kDevice && machine.cuda && plan.room.disk_bytes == 0 && plan.room.host_bytes == 0) {
    Question q = question(plan, r, machine);
    q.room.host_bytes = 1;  // any
    FitTrial trial;
    if (const auto c = with_least(model, plan.options, q, Tier::kHost, trial)) ways.push_back(fmt::format("memory.host={}", in_gib(c->bytes[1] * ranks_here)));
  }
  if (tier == Tier::kDevice && !machine.cuda && plan.room.disk_bytes == 0) {
    Question q = question(plan, r, machine);
    q.room.disk_bytes = int64_t{1} << 60;
    FitTrial trial;
    if (const auto c = anything_that_fits(model, plan.options, q, trial)) ways.push_back(fmt::format("a disk with memory.disk, {} of it", in_gib(c->bytes[2] * ranks_here)));
  }
  if (r.master_weights != "split" && plan.options.dtype == Dtype::kBf16) {
    Plan split = plan;
    split.options.split_master = true;
    if (fits(split, r)) ways.push_back("memory.master_weights=split");
  }
  // More ranks to a sequence: of those that there are, else of as few more as do.
  const auto wider = [&](int64_t P, int64_t ranks) {
    recipe::Recipe with = r;
    with.sequence_parallel_size = P;
    return ranks % P == 0 && fits(sized(with, spec, machine, ranks, plan.max_length), with);
  };
  const int64_t most_ranks = machine.cuda || r.memory_device_bytes > 0 ? world * spec.N : world;  // else they bring no memory
  for (int64_t ranks = world, found = 0; ranks <= most_ranks && found == 0; ranks *= 2) {
    int64_t widest = plan.mesh.P;
    while (2 * widest <= std::min(spec.N, ranks)) widest *= 2;
    if (widest == plan.mesh.P || !wider(widest, ranks)) continue;
    for (found = 2 * plan.mesh.P; found < widest && !wider(found, ranks);) found *= 2;
    ways.push_back(fmt::format("sequence_parallel_size={}{}", found, ranks > world ? fmt::format(" on {} ranks", ranks) : ""));
  }
  const int64_t longest = plan.longest && plan.longest->max_length > 0 ? plan.longest->max_length : longest_that_fits(r, spec, machine, world, plan.room.device_bytes);
  if (longest > 0) ways.push_back(fmt::format("data.max_length={}", longest));
  else if (ways.empty()) ways.push_back(fmt::format("not even {} tokens fit: use {}a smaller model", unit_below(r, plan.max_length), most_ranks > world ? "more ranks or " : ""));
  return fmt::format("{}", fmt::join(ways, ", or "));
}

// What ends it: what `longer`, of a length that does not fit, has too little room for.
void describe(Longest& found, const step::Model& model, const Plan& longer, const recipe::Recipe& r, const Machine& machine) {
  const std::optional<Short> lacks = too_small(model, longer, question(longer, r, machine), found.pricings);
  found.limit = lacks ? lacks->tier : Tier::kDevice, found.next_length = longer.max_length;
  if (!lacks) return;
  const Largest largest = largest_kind(lacks->price, lacks->tier);
  found.kind = largest.kind, found.kind_bytes = largest.bytes;
  found.bytes = bytes_in(lacks->price, longer, lacks->tier), found.room_bytes = longer.room.of(lacks->tier);
}

}  // namespace

Largest largest_kind(const Price& price, Tier tier) {
  Largest most;
  for (int k = 0; k < ops::kNumKinds; ++k) {
    const int64_t bytes = price.of(tier).run_by_kind[static_cast<size_t>(k)] + price.of(tier).peak_by_kind[static_cast<size_t>(k)];
    if (bytes > most.bytes) most = {static_cast<ops::Kind>(k), bytes};
  }
  return most;
}

Longest find_longest(const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, int64_t most, int64_t unit, int64_t from) {
  Longest found;
  FitTrial trial;
  const step::Model model(spec);
  if (spec.sliding_window > 0) most = std::min(most, spec.sliding_window);
  // Without its places: these have gaps.
  const auto fitting = [&](int64_t n, Plan& plan) {
    plan = sized(r, spec, machine, world, n);
    return anything_that_fits(model, plan.options, question(plan, r, machine), trial);
  };
  Plan plan;
  int64_t n = largest_about(most, unit, from, [&](int64_t tokens) { return fitting(tokens, plan).has_value(); });
  // With them, from there: down by as much as it is over, then halving between, to half a percent too.
  for (int64_t high = n + unit; n > 0 && high - found.max_length > std::max(unit - 1, found.max_length / 200);) {
    plan = sized(r, spec, machine, world, n);
    std::optional<PlacedCandidate> least = least_with_places(model, plan.options, question(plan, r, machine), trial);
    double part = 0.998;
    for (size_t t = 0; least && t < least->over.size(); ++t)
      part = std::min(part, 1 - static_cast<double>(least->over[t]) / static_cast<double>(least->price.total_bytes(static_cast<Tier>(t)) + (t == 0 ? plan.besides_bytes : 0)));
    if (least && *std::max_element(least->over.begin(), least->over.end()) <= 0) {
      found.max_length = n;
    } else {
      high = n;
    }
    n = found.max_length > 0 ? (found.max_length + high) / 2 / unit * unit : std::min(n - unit, static_cast<int64_t>(part * static_cast<double>(n)) / unit * unit);
    if (n <= found.max_length) break;
  }
  if (found.max_length > 0) {
    // What ends it shows a little further on.
    if (found.max_length + unit <= most) describe(found, model, sized(r, spec, machine, world, std::min(most, std::max(found.max_length + unit, found.max_length / 100 * 102))), r, machine);
  }
  found.pricings += trial.pricings;
  return found;
}

int64_t longest_that_fits(const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world, int64_t budget_bytes) {
  recipe::Recipe with_budget = r;
  with_budget.memory_device_bytes = budget_bytes;
  const int64_t most = r.data.max_length > 0 ? r.data.max_length : r.data.max_length == recipe::kAutoLength ? kLongestAsked : spec.max_positions;
  return find_longest(with_budget, spec, machine, world, most, unit_below(r, most), most).max_length;
}

std::string why_not(Plan& plan, const recipe::Recipe& r, const models::Spec& spec, const Machine& machine, int64_t world) {
  const step::Model model(spec);
  const Question q = question(plan, r, machine);
  int64_t pricings = 0;
  std::optional<Short> lacks = too_small(model, plan, q, pricings);
  const Tier tier = lacks ? lacks->tier : Tier::kDevice;
  if (lacks) {
    plan.options = lacks->candidate.options, plan.seconds = lacks->candidate.seconds, plan.states_words = lacks->candidate.words;
    plan.price = std::move(lacks->price);
  }
  const int64_t needed = bytes_in(plan.price, plan, tier);
  const Largest largest = largest_kind(plan.price, tier);
  // A part of a device stays free.
  const int64_t room = plan.room.of(tier), usable = tier == Tier::kDevice ? limits(q)[0] + plan.besides_bytes : room;
  const std::string of_it = usable < room ? fmt::format(", {} of it for a plan", format_bytes(usable)) : "";
  const bool in_group = machine.in_group && (tier == Tier::kDevice ? !machine.cuda && r.memory_device_bytes == 0 : tier == Tier::kHost && r.memory_host_bytes == 0);
  const std::string who = tier == Tier::kDevice && machine.cuda ? "on each GPU" : plan.mesh.W == 1 ? "for the one rank" : "for each rank";
  return fmt::format("{}needs {} {}, {} free{}{}: {} are {}; {}", tier == Tier::kDevice ? "" : tier == Tier::kHost ? "host memory: " : "disk: ", format_bytes(needed), who, format_bytes(room), in_group ? " in this control group" : "", of_it, format_bytes(largest.bytes),
                     kind_words(largest.kind), advice(plan, r, spec, machine, world, tier, needed));
}

}  // namespace uly::plan
