#include "recipe/schedule.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>
#include <string_view>

#include "base/check.h"
#include "recipe/numbers.h"

namespace uly::recipe {
namespace {

using std::numbers::pi;

enum class Shape { kLinear, kCosine, kOneMinusSqrt };

// A schedule's own arguments, and the counts it is a function of.
struct Terms {
  double step = 0, warmup = 0, horizon = 0, base = 0;
  std::optional<double> num_cycles, lr_end, power, timescale, min_lr, min_lr_rate, warmup_lr_rate, num_decay_steps, num_stable_steps, min_lr_ratio;
  Shape warmup_shape = Shape::kLinear, decay_shape = Shape::kCosine;

  double after_warmup() const { return (step - warmup) / std::max(1.0, horizon - warmup); }
  double rising() const { return step / std::max(1.0, warmup); }
  double floor_rate() const { return min_lr ? *min_lr / base : min_lr_rate.value_or(0.0); }
};

double raised(double factor, double floor) { return std::max(0.0, factor * (1.0 - floor) + floor); }

double constant(const Terms&) { return 1.0; }

double constant_with_warmup(const Terms& t) { return t.step < t.warmup ? t.rising() : 1.0; }

double linear(const Terms& t) { return t.step < t.warmup ? t.rising() : std::max(0.0, (t.horizon - t.step) / std::max(1.0, t.horizon - t.warmup)); }

double cosine(const Terms& t) {
  if (t.step < t.warmup) return t.rising();
  return std::max(0.0, 0.5 * (1.0 + std::cos(pi * t.num_cycles.value_or(0.5) * 2.0 * t.after_warmup())));
}

double cosine_with_restarts(const Terms& t) {
  if (t.step < t.warmup) return t.rising();
  const double progress = t.after_warmup();
  if (progress >= 1.0) return 0.0;
  return std::max(0.0, 0.5 * (1.0 + std::cos(pi * std::fmod(t.num_cycles.value_or(1.0) * progress, 1.0))));
}

double polynomial(const Terms& t) {
  if (t.step < t.warmup) return t.rising();
  const double end = t.lr_end.value_or(1e-7);
  if (t.step > t.horizon || t.horizon <= t.warmup) return end / t.base;
  const double remaining = 1.0 - (t.step - t.warmup) / (t.horizon - t.warmup);
  return ((t.base - end) * std::pow(remaining, t.power.value_or(1.0)) + end) / t.base;
}

double inverse_sqrt(const Terms& t) {
  if (t.step < t.warmup) return t.rising();
  const double timescale = t.timescale.value_or(t.warmup > 0 ? t.warmup : 10'000.0);
  return 1.0 / std::sqrt((t.step + timescale - t.warmup) / timescale);
}

double cosine_with_min_lr(const Terms& t) {
  if (t.step < t.warmup) return t.rising();
  return raised(0.5 * (1.0 + std::cos(pi * t.num_cycles.value_or(0.5) * 2.0 * t.after_warmup())), t.floor_rate());
}

double cosine_warmup_with_min_lr(const Terms& t) {
  if (t.step < t.warmup) {
    if (!t.warmup_lr_rate) return (t.step + 1.0) / std::max(1.0, t.warmup);
    return *t.warmup_lr_rate + (1.0 - *t.warmup_lr_rate) * t.step / std::max(1.0, t.warmup - 1.0);
  }
  const double progress = (t.step - t.warmup + 1.0) / std::max(1.0, t.horizon - t.warmup);
  return raised(0.5 * (1.0 + std::cos(pi * t.num_cycles.value_or(0.5) * 2.0 * progress)), t.floor_rate());
}

double rising_as(Shape shape, double progress) {
  if (shape == Shape::kLinear) return progress;
  return shape == Shape::kCosine ? 0.5 * (1.0 - std::cos(pi * progress)) : 1.0 - std::sqrt(1.0 - progress);
}

double falling_as(Shape shape, double progress, double cycles) {
  if (shape == Shape::kLinear) return 1.0 - progress;
  return shape == Shape::kCosine ? 0.5 * (1.0 + std::cos(pi * cycles * 2.0 * progress)) : 1.0 - std::sqrt(progress);
}

double warmup_stable_decay(const Terms& t) {
  const double floor = t.min_lr_ratio.value_or(0.0);
  if (t.step < t.warmup) return raised(rising_as(t.warmup_shape, t.rising()), floor);
  const double decay = *t.num_decay_steps;
  const double decay_begin = t.warmup + t.num_stable_steps.value_or(t.horizon - t.warmup - decay);
  if (t.step < decay_begin) return 1.0;
  if (t.step >= decay_begin + decay) return floor;
  return raised(falling_as(t.decay_shape, (t.step - decay_begin) / std::max(1.0, decay), t.num_cycles.value_or(0.5)), floor);
}

struct Argument {
  std::string_view name;
  std::optional<double> Terms::*number;  // or
  Shape Terms::*shape;
};
const std::array kArguments = {
    Argument{"num_cycles", &Terms::num_cycles, nullptr},
    Argument{"lr_end", &Terms::lr_end, nullptr},
    Argument{"power", &Terms::power, nullptr},
    Argument{"timescale", &Terms::timescale, nullptr},
    Argument{"min_lr", &Terms::min_lr, nullptr},
    Argument{"min_lr_rate", &Terms::min_lr_rate, nullptr},
    Argument{"warmup_lr_rate", &Terms::warmup_lr_rate, nullptr},
    Argument{"num_decay_steps", &Terms::num_decay_steps, nullptr},
    Argument{"num_stable_steps", &Terms::num_stable_steps, nullptr},
    Argument{"min_lr_ratio", &Terms::min_lr_ratio, nullptr},
    Argument{"warmup_type", nullptr, &Terms::warmup_shape},
    Argument{"decay_type", nullptr, &Terms::decay_shape},
};

struct Schedule {
  const char* name;
  std::vector<std::string_view> arguments;
  double (*factor)(const Terms&);
};

const std::vector<Schedule>& schedules() {
  static const std::vector<Schedule> table = {
      {"linear", {}, linear},
      {"cosine", {"num_cycles"}, cosine},
      {"cosine_with_restarts", {"num_cycles"}, cosine_with_restarts},
      {"polynomial", {"lr_end", "power"}, polynomial},
      {"constant", {}, constant},
      {"constant_with_warmup", {}, constant_with_warmup},
      {"inverse_sqrt", {"timescale"}, inverse_sqrt},
      {"cosine_with_min_lr", {"num_cycles", "min_lr", "min_lr_rate"}, cosine_with_min_lr},
      {"cosine_warmup_with_min_lr", {"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"}, cosine_warmup_with_min_lr},
      {"warmup_stable_decay", {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}, warmup_stable_decay},
  };
  return table;
}

const Schedule* find_schedule(const std::string& name) {
  for (const Schedule& schedule : schedules()) {
    if (schedule.name == name) return &schedule;
  }
  return nullptr;
}

bool set_shape(Shape& shape, const Json& value) {
  if (value == "linear") {
    shape = Shape::kLinear;
  } else if (value == "cosine") {
    shape = Shape::kCosine;
  } else if (value == "1-sqrt") {
    shape = Shape::kOneMinusSqrt;
  } else {
    return false;
  }
  return true;
}

// Reads the schedule's own arguments into `terms`; returns what is wrong with them.
std::string read_arguments(const Schedule& schedule, const Json& given, Terms& terms) {
  for (const auto& [key, value] : given.items()) {
    const bool known = std::find(schedule.arguments.begin(), schedule.arguments.end(), key) != schedule.arguments.end();
    if (!known)
      return fmt::format("schedule '{}' takes {}, found '{}'", schedule.name,
                         schedule.arguments.empty() ? "no arguments" : fmt::format("{}", fmt::join(schedule.arguments, ", ")), key);
    if (value.is_null()) continue;
    const auto argument = std::find_if(kArguments.begin(), kArguments.end(), [&](const Argument& a) { return a.name == key; });
    if (argument->shape != nullptr) {
      if (!set_shape(terms.*(argument->shape), value)) return fmt::format("{}: expected one of 'linear', 'cosine', '1-sqrt', found {}", key, value.dump());
      continue;
    }
    const auto number = value.is_number() ? std::optional(value.get<double>()) : value.is_string() ? human_number(value.get<std::string>()) : std::nullopt;
    if (!number || !std::isfinite(*number)) return fmt::format("{}: expected a number, found {}", key, value.dump());
    terms.*(argument->number) = *number;
  }
  return "";
}

std::string problem_of(const Schedule& schedule, const Terms& t) {
  const std::string_view name = schedule.name;
  const bool has_floor = name == "cosine_with_min_lr" || name == "cosine_warmup_with_min_lr";
  if (has_floor && t.min_lr.has_value() == t.min_lr_rate.has_value())
    return fmt::format("schedule '{}' takes one of min_lr and min_lr_rate, found {}", name, t.min_lr ? "both" : "none");
  if (t.min_lr && !(t.base > 0)) return "min_lr needs a learning rate above 0";
  if (name == "polynomial" && !(t.base > t.lr_end.value_or(1e-7)))
    return fmt::format("lr_end ({}) must be smaller than the learning rate ({})", t.lr_end.value_or(1e-7), t.base);
  if (name == "warmup_stable_decay" && !t.num_decay_steps) return "schedule 'warmup_stable_decay' needs num_decay_steps";
  if (t.timescale && !(*t.timescale > 0)) return fmt::format("timescale: expected a number > 0, found {}", *t.timescale);
  return "";
}

}  // namespace

std::vector<std::string> schedule_names() {
  std::vector<std::string> out;
  for (const Schedule& schedule : schedules()) out.emplace_back(schedule.name);
  return out;
}

std::string schedule_problem(const Scheduler& scheduler, double base) {
  const Schedule* schedule = find_schedule(scheduler.name);
  if (schedule == nullptr) return fmt::format("expected one of {}, found '{}'", fmt::join(schedule_names(), ", "), scheduler.name);
  Terms terms{.base = base};
  const std::string problem = read_arguments(*schedule, scheduler.specific, terms);
  return problem.empty() ? problem_of(*schedule, terms) : problem;
}

double learning_rate(const Scheduler& scheduler, double base, int64_t step, int64_t horizon) {
  if (const std::string problem = schedule_problem(scheduler, base); !problem.empty()) throw UserError("scheduler: " + problem);
  const Schedule* schedule = find_schedule(scheduler.name);
  Terms terms{.step = static_cast<double>(step),
              .warmup = std::floor(scheduler.warmup_ratio * static_cast<double>(horizon)),
              .horizon = static_cast<double>(horizon),
              .base = base};
  read_arguments(*schedule, scheduler.specific, terms);
  return base * schedule->factor(terms);
}

}  // namespace uly::recipe
