#include "plan/reasons.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/units.h"

namespace uly::plan {
namespace {

using ops::Tier;

int64_t resident_units(const step::Options& o) { return std::count(o.tiers.begin(), o.tiers.end(), step::UnitTiers{}); }

step::UnitTiers tiers_of(const step::Options& o) { return o.tiers.empty() ? step::UnitTiers{} : o.tiers.back(); }

class Reasons {
 public:
  Reasons(Plan& plan, const models::Spec& spec, const Question& q) : plan_(plan), q_(q), model_(spec), limits_(limits(q)), chosen_(price_candidate(model_, plan.options, q)) { chosen_.words = plan.states_words; }

  void add() {
    table();
    if (!plan_.fits) return;
    states();
    updates();
    resident();
    away();
    again();
  }

 private:
  void say(const std::string& text) {
    plan_.lines.push_back({said_ ? "" : "why", text});
    plan_.facts["why"].push_back(text);
    said_ = true;
  }

  double tokens_per_second(double seconds) const { return static_cast<double>(plan_.planned_length) * static_cast<double>(plan_.micro_batches) / static_cast<double>(plan_.mesh.P) / seconds; }

  bool is_chosen(const Candidate& c) const { return plan_.fits && c.options.tiers == plan_.options.tiers && c.words == plan_.states_words; }

  // As short as a table wants it.
  static std::string row_words(const Candidate& c) { return c.options.tiers.empty() || resident_units(c.options) == 0 ? c.words : fmt::format("{}; {} of {} units stay", c.words, resident_units(c.options), c.options.tiers.size()); }

  void table() {
    plan_.facts["considered"] = Json::array(), plan_.facts["why"] = Json::array();
    size_t width = 0;
    for (const Candidate& c : plan_.considered) width = std::max(width, row_words(c).size());
    plan_.lines.push_back({"considered", fmt::format("  {:<{}} {:>10} {:>10} {:>10} {:>9} {:>8}", "", width, "device", "host", "disk", "seconds", "tokens/s")});
    for (const Candidate& c : plan_.considered) {
      const std::string words = row_words(c), shortage = shortage_words(c.bytes, limits_);
      std::string row = fmt::format("{} {:<{}}", is_chosen(c) ? "*" : " ", words, width);
      for (const int64_t bytes : c.bytes) row += fmt::format(" {:>10}", bytes > 0 ? format_bytes(bytes) : "");
      if (!c.fits) row += "  does not fit: " + (shortage.empty() ? "places leave gaps" : shortage);
      else if (c.seconds > 0) row += fmt::format(" {:>9.2f} {:>8.0f}", c.seconds, tokens_per_second(c.seconds));
      plan_.lines.push_back({"", row.substr(0, row.find_last_not_of(' ') + 1)});
      plan_.facts["considered"].push_back({{"states", words}, {"chosen", is_chosen(c)}, {"fits", c.fits}, {"short", shortage}, {"device_bytes", c.bytes[0]}, {"host_bytes", c.bytes[1]}, {"disk_bytes", c.bytes[2]}, {"seconds", c.seconds}, {"tokens_per_second", c.seconds > 0 ? tokens_per_second(c.seconds) : 0}});
    }
  }

  // The fastest of those considered for which `of` holds; nullptr where none fits.
  const Candidate* fastest(const std::function<bool(const step::UnitTiers&, const Candidate&)>& of) const {
    const Candidate* best = nullptr;
    for (const Candidate& c : plan_.considered)
      if (c.fits && of(tiers_of(c.options), c) && (!best || c.seconds < best->seconds)) best = &c;
    return best;
  }

  std::string instead(double seconds) const {
    const double more = seconds / chosen_.seconds - 1;
    if (seconds <= 0 || std::abs(more) < 5e-4) return "as long, as far as is known";
    if (more < 0) return fmt::format("{:.1f} % less, too little for what more it moves", -100 * more);
    return fmt::format("{:.2f} s a step instead of {:.2f}", seconds, chosen_.seconds);
  }

  void states() {
    const Candidate& all_there = plan_.considered.front();
    if (plan_.options.tiers.empty()) {
      const Candidate* other = fastest([](const step::UnitTiers& t, const Candidate&) { return t != step::UnitTiers{}; });
      if (other) say(fmt::format("states are on the device: the fastest other way ({}) takes {}", states_words(other->words, other->options), instead(other->seconds)));
      else say("states are on the device: they fit there");
    } else if (all_there.fits) {
      say(fmt::format("not all states are on the device: that takes {}, as there is less room for what is kept of layers", instead(all_there.seconds)));
    } else {
      say(fmt::format("not all states are on the device: with as little as can be kept of layers {}", shortage_words(all_there.bytes, limits_)));
    }
  }

  void updates() {
    const step::UnitTiers t = tiers_of(plan_.options);
    if (t.optimizer == Tier::kDevice) return;
    if (t.optimizer == Tier::kDisk) {
      const Candidate* on_host = fastest([](const step::UnitTiers& u, const Candidate&) { return u.optimizer == Tier::kHost; });
      say(on_host ? fmt::format("the optimizer is on the disk: on the host, where the layers' tensors want room too, it takes {}", instead(on_host->seconds)) : std::string("the optimizer is on the disk: no way with it on the host fits"));
      return;
    }
    const Candidate* other = fastest([&](const step::UnitTiers& u, const Candidate&) { return u.optimizer == Tier::kHost && u.update_on_host != t.update_on_host; });
    const std::string here = t.update_on_host ? "updates are made on the host" : "updates are streamed through the device", there = t.update_on_host ? "streamed through the device" : "made on the host";
    say(other ? fmt::format("{}: {} it takes {}", here, there, instead(other->seconds)) : fmt::format("{}: {} nothing fits", here, there));
  }

  void resident() {
    if (plan_.options.tiers.empty()) return;
    std::string text;
    for (const Candidate& c : plan_.considered) {
      if (c.words != plan_.states_words || is_chosen(c)) continue;
      text += fmt::format("{}with {} {}", text.empty() ? "" : ", ", resident_units(c.options), c.fits ? fmt::format("{:.2f} s", c.seconds) : "it does not fit");
    }
    if (!text.empty()) say(fmt::format("states of {} units stay on the device: {:.2f} s a step, {}", resident_units(plan_.options), chosen_.seconds, text));
  }

  void away() {
    step::Options here = plan_.options;
    int64_t layers = 0;
    for (step::LayerKeep& k : here.keep) {
      layers += k.input_tier != Tier::kDevice;
      k.input_tier = k.output_tier = k.projections_tier = k.gate_up_tier = Tier::kDevice;
    }
    if (layers == 0) return say("nothing that is kept of a layer is away from the device: there is room for it");
    const Candidate c = price_candidate(model_, here, q_);
    double waited = 0;
    for (const Stream stream : {Stream::kToHost, Stream::kToDevice, Stream::kDisk}) waited += plan_.price.waited[static_cast<size_t>(stream)];
    say(fmt::format("what is kept of {} layer{} is away: with it on the device, {}; compute waits {:.2f} s a step for all that moves", layers, layers == 1 ? "" : "s", shortage_words(c.bytes, limits_), waited));
  }

  // What rebuilding costs, and what it would take to keep all.
  void again() {
    step::Options all = plan_.options;
    for (step::LayerKeep& k : all.keep) k = {.level = q_.cuda ? step::Keep::kEverything : step::Keep::kGateUp};
    all.lean = false, all.rebuilt_tier = Tier::kDevice;
    const Candidate c = price_candidate(model_, all, q_);
    const double again = chosen_.compute_seconds - c.compute_seconds;
    const std::string shortage = shortage_words(c.bytes, limits_);
    if (all.keep == plan_.options.keep || shortage.empty()) return;
    say(chosen_.seconds > 0 ? fmt::format("{:.2f} of {:.2f} s go to computing again what is not kept: with all of it on the device, {}", again, chosen_.seconds, shortage)
                            : fmt::format("not all is kept: with all of it on the device, {}", shortage));
  }

  Plan& plan_;
  const Question& q_;
  const step::Model model_;
  const Bytes limits_;
  Candidate chosen_;
  bool said_ = false;
};

}  // namespace

std::string states_words(const std::string& words, const step::Options& options) {
  const int64_t resident = options.tiers.empty() ? 0 : resident_units(options);
  return resident > 0 ? fmt::format("{}; those of the first {} of {} units stay on the device", words, resident, options.tiers.size()) : words;
}

std::string kept_words(const Plan& plan) {
  const auto& keep = plan.options.keep;
  const auto count = [&](auto&& of) { return std::count_if(keep.begin(), keep.end(), of); };
  const int64_t layers = static_cast<int64_t>(keep.size()), inputs = count([](const auto& k) { return k.input; }), outputs = count([](const auto& k) { return k.output; });
  const int64_t away = count([](const auto& k) { return (k.input && k.input_tier != Tier::kDevice) || (k.output && k.output_tier != Tier::kDevice); });
  std::string text = inputs == layers ? "all inputs" : fmt::format("inputs of {} layers", inputs);
  const auto level = [&](step::Keep least, const char* what) {
    if (const int64_t n = count([&](const auto& k) { return k.level >= least; }); n > 0) text += fmt::format(", {} of {}", what, n == layers ? "all" : std::to_string(n));
  };
  level(step::Keep::kProjections, "q, k, v"), level(step::Keep::kGateUp, "gate and up"), level(step::Keep::kEverything, "all else");
  if (outputs < layers) text += fmt::format(", attention twice in {}", layers - outputs);
  if (away > 0) text += fmt::format("; of {} layers away", away);
  return text + "; " + states_words(plan.states_words, plan.options);
}

std::string shortage_words(const Bytes& bytes, const Bytes& limits) {
  std::string text;
  for (size_t t = 0; t < bytes.size(); ++t)
    if (bytes[t] > limits[t]) text += fmt::format("{}{} {} short", text.empty() ? "" : ", ", t == 0 ? "the device is" : t == 1 ? "host memory is" : "the disk is", format_bytes(bytes[t] - limits[t]));
  return text;
}

void add_reasons(Plan& plan, const models::Spec& spec, const Question& question) { Reasons(plan, spec, question).add(); }

}  // namespace uly::plan
