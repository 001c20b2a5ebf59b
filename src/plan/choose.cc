#include "plan/choose.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>

#include "base/shapes.h"

namespace uly::plan {
namespace {

using ops::Tier;
using step::Keep;

// How much is kept, before it is said where.
struct Kept {
  int64_t every = 1;    // the inputs of layers 0, every, 2 every, ...
  int64_t rebuilt = 1;  // of the others, so many at once
  bool lean = false;    // step::Options::lean
  Tier rebuilt_tier = Tier::kDevice;
  int64_t again = 0;    // layers, the first, whose attention is computed again
  int64_t levels = 0;   // up to L: q, k, v in so many layers, the last; up to 2 L gate and up besides; up to 3 L all else
};

// Where states lie.
struct StatesPlace {
  const char* words;
  step::UnitTiers tiers;
  size_t resident;      // units, the first, whose states stay on the device all the same
};

class Search {
 public:
  Search(const step::Model& model, const step::Options& options, const Question& q) : model_(model), base_(options), q_(q), L_(model.spec.L) {
    // Of a GPU a hundredth stays free: nobody else comes there, and what is not kept costs time. On the CPU the machine's other
    // work and ATen need a fifth.
    device_limit_ = q.room.device_bytes > 0 ? static_cast<int64_t>((q.cuda ? 0.99 : 0.8) * static_cast<double>(q.room.device_bytes)) - q.besides_bytes : INT64_MAX;
  }

  Choice run() {
    Choice choice;
    for (const StatesPlace& states : places()) {
      choice.considered.push_back(best_with(states));
      // Without rates there is nothing to compare: what moves least comes first.
      if (choice.considered.back().fits && q_.rates.gemm_flops == 0) break;
    }
    const auto better = [](const Candidate& a, const Candidate& b) {
      if (a.fits != b.fits) return a.fits;
      return a.fits ? a.seconds < b.seconds * 0.998 : a.bytes[0] < b.bytes[0];
    };
    choice.best = choice.considered.front();
    for (const Candidate& c : choice.considered)
      if (better(c, choice.best)) choice.best = c;
    return choice;
  }

  bool anything_fits() {
    const std::vector<StatesPlace> all = places();
    return std::any_of(all.rbegin(), all.rend(), [&](const StatesPlace& states) { return leanest(states).has_value(); });
  }

 private:
  bool has(Tier tier) const { return q_.room.of(tier) > 0; }

  std::vector<StatesPlace> places() const {
    std::vector<StatesPlace> all{{"states on the device", {}, 0}};
    if (!base_.optimizer) {
      if (has(Tier::kHost)) all.push_back({"weights on the host", {.weight = Tier::kHost}, 0});
      return all;
    }
    const size_t units = model_.units.size();
    const auto add = [&](const char* words, const step::UnitTiers& tiers) {
      // Updates of the first units have nothing to hide under.
      for (const size_t resident : {units / 2, units / 4, size_t{2}, size_t{0}})
        if (all.back().resident != resident || all.back().words != words) all.push_back({words, tiers, resident});
    };
    if (has(Tier::kHost)) {
      add("optimizer on the host, updated on the device", {.optimizer = Tier::kHost});
      add("optimizer and gradients on the host, updated there", {.optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true});
      add("optimizer and gradients on the host, updated on the device", {.optimizer = Tier::kHost, .gradient = Tier::kHost});
      add("optimizer, gradients and weights on the host, updated there", {.weight = Tier::kHost, .optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true});
    }
    if (has(Tier::kDisk)) {
      add("optimizer on the disk, updated on the device", {.optimizer = Tier::kDisk});
      if (has(Tier::kHost)) {
        add("optimizer on the disk, gradients on the host, updated on the device", {.optimizer = Tier::kDisk, .gradient = Tier::kHost});
        add("optimizer on the disk, gradients and weights on the host, updated on the device", {.weight = Tier::kHost, .optimizer = Tier::kDisk, .gradient = Tier::kHost});
      }
    }
    return all;
  }

  // --- candidates

  step::Options with_states(const StatesPlace& states) const {
    step::Options o = base_;
    o.tiers.assign(model_.units.size(), states.tiers);
    std::fill_n(o.tiers.begin(), std::min(states.resident, o.tiers.size()), step::UnitTiers{});
    if (states.tiers == step::UnitTiers{}) o.tiers.clear();
    return o;
  }

  void keep(step::Options& o, const Kept& kept) const {
    o.keep.assign(static_cast<size_t>(L_), {});
    for (int64_t l = 0; l < L_; ++l) {
      step::LayerKeep& k = o.keep[static_cast<size_t>(l)];
      k.input = l % kept.every == 0;
      k.output = l >= kept.again;
      // The last layers: what they keep waits least.
      const auto level = [&](int64_t of) { return L_ - l <= kept.levels - of * L_; };
      k.level = level(2) ? Keep::kEverything : level(1) ? Keep::kGateUp : level(0) ? Keep::kProjections : Keep::kInput;
    }
    o.rebuilt_inputs = kept.rebuilt;
    o.lean = kept.lean, o.rebuilt_tier = kept.rebuilt_tier;
  }

  // Bytes of a layer that can be away.
  int64_t bytes_away(const step::Options& o, const step::LayerKeep& k) const {
    const models::Spec& m = model_.spec;
    const int64_t element = bytes_of(o.dtype), s = o.s, S = o.S();
    const ops::Heads h = step::heads_of_rank(m, o.exchange_ranks(), 0);
    const auto up = [](int64_t bytes) { return round_up(bytes, ops::place_alignment(Tier::kHost)); };
    int64_t bytes = 0;
    if (k.input) bytes += up(s * m.D * element);
    if (k.output) bytes += up(s * m.query_columns() * element) + up(S * h.n * 4);
    if (k.level >= Keep::kProjections) bytes += up(S * (h.n + 2 * h.k) * h.H * element) + up(s * m.D * element) + (m.qk_norm ? up(s * (m.query_columns() + m.key_columns()) * element) + up(s * (m.N + m.K) * 4) : 0);
    if (k.level >= Keep::kGateUp) bytes += up(2 * s * m.F * element);
    return bytes;
  }

  // Puts what the first `away` layers keep on the host as far as there is room, the first of them on the disk.
  bool send_away(step::Options& o, int64_t away, int64_t host_room) const {
    int64_t disk_room = q_.room.disk_bytes;
    for (int64_t l = away; l-- > 0;) {
      step::LayerKeep& k = o.keep[static_cast<size_t>(l)];
      if (k.level == Keep::kEverything) k.level = Keep::kGateUp;
      const int64_t bytes = bytes_away(o, k);
      const Tier tier = bytes <= host_room ? Tier::kHost : Tier::kDisk;
      (tier == Tier::kHost ? host_room : disk_room) -= bytes;
      if (disk_room < 0) return false;
      k.input_tier = k.output_tier = k.projections_tier = k.gate_up_tier = tier;
    }
    return true;
  }

  Candidate price(step::Options o, const char* states) const {
    Candidate c;
    for (const step::Options& one : unlike_ranks(model_.spec, o)) {
      const Priced priced = read_step(model_, one, q_.rates);
      for (size_t t = 0; t < c.bytes.size(); ++t) c.bytes[t] = std::max(c.bytes[t], priced.so_far().tiers[t].alive());
      c.seconds = std::max(c.seconds, priced.so_far().seconds);
    }
    c.words = states;
    c.options = std::move(o);
    c.fits = c.bytes[0] <= device_limit_ && c.bytes[1] <= q_.room.host_bytes && c.bytes[2] <= q_.room.disk_bytes;
    return c;
  }

  // As `kept` says, with as few layers away as the device allows; nothing where that does not fit.
  std::optional<Candidate> arrange(const StatesPlace& states, const Kept& kept) const {
    step::Options o = with_states(states);
    keep(o, kept);
    std::optional<Candidate> found;
    const auto with_away = [&](int64_t away) -> std::optional<Candidate> {
      step::Options tried = o;
      if (away == 0) return price(std::move(tried), states.words);
      if (!send_away(tried, away, host_room_)) return {};
      return price(std::move(tried), states.words);
    };
    // Room on the host that states leave, with what is on its way through.
    Candidate none = *with_away(0);
    if (none.fits) return none;
    if (!has(Tier::kHost) && !has(Tier::kDisk)) return {};
    host_room_ = q_.room.host_bytes - none.bytes[1];
    if (host_room_ < 0 || none.bytes[2] > q_.room.disk_bytes) return {};
    const int64_t stay = largest(L_ - 1, [&](int64_t n) {
      const auto c = with_away(L_ - n);
      return !c || c->bytes[0] <= device_limit_;  // too much away is for fewer to stay, not for more: told apart below
    });
    for (int64_t n = stay; n >= std::max<int64_t>(0, stay - 1); --n) {
      found = with_away(L_ - n);
      if (found && found->fits) return found;
    }
    return {};
  }

  // Ways to keep less than every layer's input.
  std::vector<Kept> sparser() const {
    std::vector<Kept> all;
    for (int64_t every = 2; every < 2 * L_; every *= 2)
      for (const int64_t rebuilt : {every - 1, int64_t{3}, int64_t{1}})
        if (rebuilt < every && (all.empty() || all.back().every != std::min(every, L_) || all.back().rebuilt > rebuilt)) all.push_back({.every = std::min(every, L_), .rebuilt = rebuilt});
    if (!has(Tier::kHost)) return all;
    for (size_t i = 0, n = all.size(); i < n; ++i) {
      all.push_back(all[i]);
      all.back().lean = true;
      if (all[i].rebuilt > 1) continue;
      all.push_back(all.back());
      all.back().rebuilt_tier = Tier::kHost;
    }
    return all;
  }

  // The least that can be kept with these states, if it fits.
  std::optional<Candidate> leanest(const StatesPlace& states) const {
    if (auto c = arrange(states, {})) return c;
    for (const int64_t again : {int64_t{0}, L_})
      for (Kept kept : sparser()) {
        if (kept.rebuilt > 1) continue;
        kept.again = again;
        if (auto c = arrange(states, kept)) return c;
      }
    return {};
  }

  Candidate best_with(const StatesPlace& states) const {
    std::optional<Candidate> best;
    const auto consider = [&](std::optional<Candidate> c) {
      if (c && (!best || c->seconds < best->seconds)) best = std::move(c);
    };
    consider(with_all_inputs(states));
    if (q_.rates.gemm_flops == 0 && best) return *best;
    // Fewer inputs: where there is no room for all, or getting them back takes longer than GEMMs.
    if (!best || best->options.keep[0].input_tier != Tier::kDevice)
      for (const Kept& kept : sparser()) consider(arrange(states, kept));
    if (!best) consider(least_attention_again(states));
    if (best) return *best;
    step::Options o = with_states(states);
    keep(o, {.every = L_, .rebuilt = 1, .lean = has(Tier::kHost), .rebuilt_tier = has(Tier::kHost) ? Tier::kHost : Tier::kDevice, .again = L_});
    Candidate c = price(std::move(o), states.words);
    c.fits = false;
    return c;
  }

  // Every layer's input, and of the rest as much as pays.
  std::optional<Candidate> with_all_inputs(const StatesPlace& states) const {
    std::optional<Candidate> best = arrange(states, {});
    if (!best) return best;
    // As many levels as fit, and fewer, where moving them takes longer than computing them again.
    const int64_t most_levels = (q_.cuda ? 3 : 2) * L_;  // on the CPU memory is worth more than a norm
    const auto at = [&](int64_t levels) { return arrange(states, {.levels = levels}); };
    const int64_t top = largest(most_levels, [&](int64_t levels) { return at(levels).has_value(); });
    if (q_.rates.gemm_flops == 0) {
      // Nothing leaves the device for the sake of a time that is not known.
      const auto stays = [](const std::optional<Candidate>& c) { return c && c->options.keep[0].input_tier == Tier::kDevice; };
      const int64_t here = stays(best) ? largest(top, [&](int64_t levels) { return stays(at(levels)); }) : 0;
      return here > 0 ? at(here) : best;
    }
    std::set<int64_t> points{top};
    for (int64_t i = 1; i < 12; ++i) points.insert(top * i / 12);
    for (const int64_t levels : points)
      if (levels > 0)
        if (const auto c = at(levels); c && c->seconds < best->seconds) best = c;
    return best;
  }

  // Attention again in as few layers as fit.
  std::optional<Candidate> least_attention_again(const StatesPlace& states) const {
    std::optional<Candidate> best;
    for (Kept kept : sparser()) {
      const auto at = [&](int64_t once) {
        kept.again = L_ - once;
        return arrange(states, kept);
      };
      if (!at(0)) continue;
      const auto c = at(largest(L_, [&](int64_t once) { return at(once).has_value(); }));
      if (c && (!best || c->seconds < best->seconds)) best = c;
    }
    return best;
  }

  const step::Model& model_;
  const step::Options& base_;
  const Question& q_;
  int64_t L_, device_limit_;
  mutable int64_t host_room_ = 0;
};

}  // namespace

std::vector<step::Options> unlike_ranks(const models::Spec& spec, const step::Options& options) {
  std::set<std::array<int64_t, 3>> seen;
  std::vector<step::Options> unlike;
  for (int64_t p = 0; p < options.mesh.P; ++p) {
    const ops::Heads h = step::heads_of_rank(spec, options.exchange_ranks(), options.exchange ? p : 0);
    if (!seen.insert({h.n, h.k, h.first_head % h.G}).second) continue;
    unlike.push_back(options);
    unlike.back().mesh.rank = p;
  }
  return unlike;
}

Priced read_step(const step::Model& model, const step::Options& options, const Rates& rates) {
  Priced priced({options.mesh.P, options.mesh.W}, options.s, ops::document_table_bytes(options.attention, options.S()), rates);
  const bool deferred = options.optimizer && options.defers_updates();
  const step::States states = step::make_states(priced, model.units, options);
  step::begin(priced, states);
  step::micro_step(priced, model, options, states, {.update = deferred});
  step::finish_gradients(priced, options, states);
  if (options.optimizer && !deferred) step::update(priced, model, options, states);
  return priced;
}

Choice choose_places(const step::Model& model, const step::Options& options, const Question& question) { return Search(model, options, question).run(); }

bool can_fit(const step::Model& model, const step::Options& options, const Question& question) { return Search(model, options, question).anything_fits(); }

}  // namespace uly::plan
