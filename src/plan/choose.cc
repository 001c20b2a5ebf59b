#include "plan/choose.h"

#include <algorithm>
#include <limits>
#include <map>
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
  int64_t apart = 1;    // of the layers that are away, gate and up of only every so many are: their way out has as many layers' time

  auto operator<=>(const Kept&) const = default;
};

// Where states lie.
struct StatesPlace {
  const char* words;
  step::UnitTiers tiers;
  size_t resident;      // units, the first, whose states stay on the device all the same
  Bytes bytes{};
  double compute_seconds = 0, busiest_seconds = 0;  // see Search::learn
};

constexpr int64_t kWhatever = int64_t{1} << 60;  // bytes
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kWaits = 1.002;  // compute that so much more passes than it works waits for copies
constexpr double kFaster = 0.9995, kFasterElsewhere = 0.998;  // what comes later in the search has to be so much faster; where the first states leave the device

class Search {
 public:
  Search(const step::Model& model, const step::Options& options, const Question& q) : model_(model), base_(options), q_(q), L_(model.spec.L), limits_(limits(q)) {
    for (int64_t p = 0; p < base_.exchange_ranks(); ++p)
      if (const ops::Heads h = step::heads_of_rank(model_.spec, base_.exchange_ranks(), p); h.n > heads_.n) heads_ = h;
  }

  Choice run() {
    Choice choice = search();
    // Places leave gaps: where these make it too much, the search is told of less room.
    for (int attempt = 0; attempt < 5 && choice.best.fits; ++attempt) {
      const Bytes over = place(choice);
      if (!is_over(over)) return choice;
      for (size_t t = 0; t < over.size(); ++t)
        if (over[t] > 0) limits_[t] = choice.best.bytes[t] - over[t];
      Choice next = search();
      if (!next.best.fits) break;
      choice = std::move(next);
    }
    limits_ = limits(q_);
    FitTrial trial;
    if (auto least = least_with_places(trial)) {
      choice.best = std::move(least->candidate), choice.price = std::move(least->price);
      choice.best.fits = !is_over(least->over);
    } else {
      place(choice);
    }
    choice.pricings = pricings_;
    return choice;
  }

  // By the ways to keep least, over all ways to place the states.
  std::optional<Candidate> anything_that_fits(FitTrial& trial) {
    const Trials trials = this->trials();
    const std::vector<Kept>& ways = trials.ways;
    const auto fitted = [&](size_t i) {
      Bytes passing{};
      std::optional<Candidate> c = fitting(trials.states(i), trials.kept(i), passing);
      if (c) trial.least = trial.least && i == trial.fitted, trial.fitted = i;
      return c;
    };
    std::optional<Candidate> found;
    if (trial.fitted < trials.size()) found = fitted(trial.fitted);
    for (size_t way = 0; way < ways.size() && !found; ++way) {
      bool may = false;
      for (size_t place = 0; place < trials.places.size() && !found; ++place) {
        may = may || (trials.places[place].bytes[0] <= limits_[0] && least_on_device(trials.places[place], ways[way], L_) <= limits_[0]);
        found = fitted(way * trials.places.size() + place);
      }
      // What has more of the same on the device has no better chance.
      while (!may && way + 1 < ways.size() && ways[way + 1].every == ways[way].every && ways[way + 1].again == ways[way].again) ++way;
    }
    trial.pricings += pricings_;
    return found;
  }

  // Something that fits with its places too; else what has least on the device, and how much that is over. Nothing where nothing fits
  // even without.
  std::optional<PlacedCandidate> least_with_places(FitTrial& trial) {
    const auto placed = [&](std::optional<Candidate> c) -> std::optional<PlacedCandidate> {
      if (!c) return {};
      Price price = price_with_places(model_, c->options, q_.rates);
      ++pricings_;
      const Bytes over = excess(price, q_);
      return PlacedCandidate{std::move(*c), std::move(price), over};
    };
    const Bytes given = limits_;
    auto first = placed(anything_that_fits(trial));
    if (!first || !is_over(first->over) || trial.least) return first;
    // Gaps that make it too much are room that the next may not have.
    for (auto next = first; next && is_over(next->over);) {
      for (size_t t = 0; t < limits_.size(); ++t)
        if (next->over[t] > 0) limits_[t] = next->candidate.bytes[t] - next->over[t];
      next = placed(anything_that_fits(trial));
      if (next && !is_over(next->over)) first = std::move(next);
    }
    limits_ = given;
    if (!first || !is_over(first->over)) return first;
    const int64_t before = pricings_;
    auto least = placed(with_least_on_device(trial));
    limits_ = given;
    trial.pricings += pricings_ - before;
    return least;
  }

  // What has least in a tier and fits into the others; nothing where these alone are too small.
  std::optional<Candidate> with_least(Tier tier, FitTrial& trial) {
    std::optional<Candidate> c = tier == Tier::kDevice ? with_least_on_device(trial) : with_least_away(tier);
    trial.pricings += pricings_;
    return c;
  }

  Candidate price(step::Options o) {
    Candidate c;
    for (const step::Options& one : unlike_ranks(model_.spec, o)) {
      const Priced priced = read_step(model_, one, q_.rates);
      const Price& p = priced.so_far();
      for (size_t t = 0; t < c.bytes.size(); ++t) c.bytes[t] = std::max(c.bytes[t], p.tiers[t].alive());
      double seconds = p.seconds;
      std::array<double, kNumStreams> busy = p.busy;
      ++pricings_;
      if (q_.micro_batches > 1 && knows_time()) {
        const Priced priced_again = read_another(model_, one, q_.rates);
        const Price& again = priced_again.so_far();
        const double times = static_cast<double>(q_.micro_batches - 1);
        seconds += times * again.seconds;
        for (size_t i = 0; i < busy.size(); ++i) busy[i] += times * again.busy[i];
        ++pricings_;
      }
      c.seconds = std::max(c.seconds, seconds);
      c.compute_seconds = std::max(c.compute_seconds, busy[0]);
      c.busiest_seconds = std::max(c.busiest_seconds, *std::max_element(busy.begin() + 1, busy.end()));
    }
    c.options = std::move(o);
    c.fits = true;
    for (size_t t = 0; t < c.bytes.size(); ++t) c.fits = c.fits && c.bytes[t] <= limits_[t];
    return c;
  }

 private:
  bool has(Tier tier) const { return q_.room.of(tier) > 0; }
  bool knows_time() const { return q_.rates.gemm_flops > 0; }  // without it there is nothing to compare: what moves least comes first

  static bool is_over(const Bytes& over) {
    return std::any_of(over.begin(), over.end(), [](int64_t bytes) { return bytes > 0; });
  }

  // Prices the best with places. Returns by how much it is more than there is room for.
  Bytes place(Choice& choice) {
    choice.price = price_with_places(model_, choice.best.options, q_.rates);
    choice.pricings = ++pricings_;
    return excess(choice.price, q_);
  }

  Choice search() {
    Choice choice;
    std::optional<Candidate> best;
    std::vector<StatesPlace> all = places();
    for (StatesPlace& states : all) {
      const double bar = best ? best->seconds * (best->options.tiers.empty() ? kFasterElsewhere : kFaster) : kNever;
      std::optional<Candidate> c = !knows_time() ? first_with(states) : fastest_with(states, q_.thorough ? kNever : bar);
      if (q_.thorough) choice.considered.push_back(c ? *c : too_much(states));
      if (c && (!best || c->seconds < bar)) best = std::move(c);
      if (best && !knows_time()) break;
    }
    choice.best = best ? std::move(*best) : too_much(all.back());
    return choice;
  }

  std::vector<StatesPlace> places() {
    std::vector<StatesPlace> all{{"states on the device", {}, 0}};
    const size_t units = model_.units.size();
    const auto add = [&](const char* words, const step::UnitTiers& tiers) {
      // Updates of the first units have nothing to hide under.
      for (const size_t resident : {units / 2, units / 4, size_t{2}, size_t{0}})
        if (all.back().resident != resident || all.back().words != words) all.push_back({words, tiers, resident});
    };
    if (!base_.optimizer) {
      if (has(Tier::kHost)) all.push_back({"weights on the host", {.weight = Tier::kHost}, 0});
    } else if (has(Tier::kHost)) {
      add("optimizer on the host, updated on the device", {.optimizer = Tier::kHost});
      add("optimizer and gradients on the host, updated there", {.optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true});
      add("optimizer and gradients on the host, updated on the device", {.optimizer = Tier::kHost, .gradient = Tier::kHost});
      add("optimizer, gradients and weights on the host, updated there", {.weight = Tier::kHost, .optimizer = Tier::kHost, .gradient = Tier::kHost, .update_on_host = true});
    }
    if (base_.optimizer && has(Tier::kDisk)) {
      add("optimizer on the disk, updated on the device", {.optimizer = Tier::kDisk});
      if (has(Tier::kHost)) {
        add("optimizer on the disk, gradients on the host, updated on the device", {.optimizer = Tier::kDisk, .gradient = Tier::kHost});
        add("optimizer on the disk, gradients and weights on the host, updated on the device", {.weight = Tier::kHost, .optimizer = Tier::kDisk, .gradient = Tier::kHost});
      }
    }
    for (StatesPlace& states : all) {
      Priced priced({base_.mesh.P, base_.mesh.W}, 0, 0);
      step::make_states(priced, model_.units, with_states(states));
      for (size_t t = 0; t < states.bytes.size(); ++t) states.bytes[t] = priced.so_far().tiers[t].run_bytes;
    }
    resident_bytes_ = all[0].bytes[0];
    return all;
  }

  // --- programs

  step::Options with_states(const StatesPlace& states) const {
    step::Options o = base_;
    o.tiers.assign(model_.units.size(), states.tiers);
    std::fill_n(o.tiers.begin(), std::min(states.resident, o.tiers.size()), step::UnitTiers{});
    if (states.tiers == step::UnitTiers{}) o.tiers.clear();
    return o;
  }

  std::vector<step::LayerKeep> layers(const Kept& kept) const {
    std::vector<step::LayerKeep> all(static_cast<size_t>(L_));
    for (int64_t l = 0; l < L_; ++l) {
      step::LayerKeep& k = all[static_cast<size_t>(l)];
      k.input = l % kept.every == 0;
      k.output = l >= kept.again;
      // The last layers: what they keep waits least.
      const auto level = [&](int64_t of) { return L_ - l <= kept.levels - of * L_; };
      k.level = level(2) ? Keep::kEverything : level(1) ? Keep::kGateUp : level(0) ? Keep::kProjections : Keep::kInput;
    }
    return all;
  }

  step::Options program(const StatesPlace& states, const Kept& kept, std::vector<step::LayerKeep> layers) const {
    step::Options o = with_states(states);
    o.keep = std::move(layers);
    o.rebuilt_inputs = kept.rebuilt;
    o.lean = kept.lean, o.rebuilt_tier = kept.rebuilt_tier;
    return o;
  }

  // Bytes that are kept of a layer, and of these what can be away.
  int64_t bytes_of_layer(const step::LayerKeep& k, bool away) const {
    const models::Spec& m = model_.spec;
    const int64_t element = bytes_of(base_.dtype), s = base_.s, S = base_.S();
    const ops::Heads& h = heads_;
    const auto up = [](int64_t bytes) { return round_up(bytes, ops::place_alignment(Tier::kHost)); };
    int64_t bytes = 0;
    if (k.input) bytes += up(s * m.D * element);
    if (k.output) bytes += up(s * m.query_columns() * element) + up(S * h.n * 4);
    if (k.level >= Keep::kProjections) bytes += up(S * (h.n + 2 * h.k) * h.H * element) + up(s * m.D * element) + (m.qk_norm ? up(s * (m.query_columns() + m.key_columns()) * element) + up(s * (m.N + m.K) * 4) : 0);
    if (k.level >= Keep::kGateUp) bytes += up(2 * s * m.F * element);
    if (k.level == Keep::kEverything && !away) bytes += 2 * up(s * m.D * element) + up(s * m.F * element);
    return bytes;
  }

  // Puts what the first `away` layers keep on the host as far as there is room, the first of them on the disk. Returns the bytes
  // there; nothing where there is no room.
  std::optional<Bytes> send_away(std::vector<step::LayerKeep>& layers, int64_t away, int64_t apart, Bytes room) const {
    Bytes sent{};
    for (int64_t l = away; l-- > 0;) {
      step::LayerKeep& k = layers[static_cast<size_t>(l)];
      if (k.level == Keep::kEverything) k.level = Keep::kGateUp;
      const int64_t bytes = bytes_away(k, l, apart);
      const Tier tier = bytes <= room[1] ? Tier::kHost : Tier::kDisk;
      const size_t t = static_cast<size_t>(tier);
      room[t] -= bytes, sent[t] += bytes;
      if (room[t] < 0) return {};
      k.input_tier = k.output_tier = k.projections_tier = tier;
      if (!gate_up_stays(k, l, apart)) k.gate_up_tier = tier;
    }
    return sent;
  }

  static bool gate_up_stays(const step::LayerKeep& k, int64_t l, int64_t apart) { return k.level >= Keep::kGateUp && l % apart != 0; }

  // Of a layer that is away, what is.
  int64_t bytes_away(step::LayerKeep k, int64_t l, int64_t apart) const {
    if (gate_up_stays(k, l, apart)) k.level = Keep::kProjections;
    return bytes_of_layer(k, true);
  }

  // --- what needs no program of its own

  // Of a program with all states on the device and all that is kept on the host: what it has on either besides, and how long compute
  // works. Wherever things lie it is no less, but for updates.
  struct Known {
    int64_t work_bytes = 0, passing_bytes = 0;
    double compute_seconds = 0;
  };
  Known known(Kept kept) {
    kept.apart = 1;
    // Layers are alike: between the corners compute is on a line, and bytes are no less than at the first.
    if (kept.levels % L_ != 0 || kept.again % L_ != 0) {
      Kept low = kept, high = kept;
      int64_t Kept::*what = kept.levels % L_ != 0 ? &Kept::levels : &Kept::again;
      low.*what = kept.*what / L_ * L_, high.*what = low.*what + L_;
      const Known first = known(low), last = known(high);
      const double part = static_cast<double>(kept.*what % L_) / static_cast<double>(L_);
      return {std::min(first.work_bytes, last.work_bytes), std::min(first.passing_bytes, last.passing_bytes), first.compute_seconds * (1 - part) + last.compute_seconds * part};
    }
    const auto found = known_.find(kept);
    if (found != known_.end()) return found->second;
    const StatesPlace states{"", {}, 0};
    const Rates rates = q_.rates;
    if (rates.shares_cores) q_.rates.to_host_bytes = q_.rates.to_device_bytes = 0;  // no arrangement computes less than one without copies
    // Where nothing is away, what compute repeats is the same.
    std::vector<step::LayerKeep> here = layers(kept), away = here;
    const Bytes sent = *send_away(away, L_, 1, {0, INT64_MAX / 2, 0});
    const Candidate c = price(program(states, kept, away));
    const double compute = kept.levels > 2 * L_ ? price(program(states, kept, here)).compute_seconds : c.compute_seconds;
    q_.rates = rates;
    return known_[kept] = {c.bytes[0] - resident_bytes_, std::max<int64_t>(0, c.bytes[1] - sent[1]), compute};
  }

  // Whether it could fit, by what has to be somewhere.
  bool may_fit(const StatesPlace& states, const Kept& kept) {
    for (size_t t = 0; t < states.bytes.size(); ++t)
      if (states.bytes[t] > limits_[t]) return false;
    if (limits_[0] == INT64_MAX) return true;
    const int64_t away = most_away(states, kept, {});
    return away >= 0 && least_on_device(states, kept, away) <= limits_[0];
  }

  // With so many layers away: when the loss is computed, and at the height of backward, where what is kept of a layer or two is among
  // what the program works on.
  int64_t least_on_device(const StatesPlace& states, const Kept& kept, int64_t away) {
    int64_t here = 0, most = 0;
    const std::vector<step::LayerKeep> all = layers(kept);
    for (int64_t l = 0; l < L_; ++l) {
      const int64_t bytes = bytes_of_layer(all[static_cast<size_t>(l)], true);
      most = std::max(most, bytes);
      here += l >= away ? bytes : bytes - bytes_away(all[static_cast<size_t>(l)], l, kept.apart);
    }
    const int64_t loss = here + 3 * base_.s * model_.spec.D * bytes_of(base_.dtype);
    return states.bytes[0] + std::max(loss, known(kept).work_bytes + std::max<int64_t>(0, here - (kept.lean ? 1 : 2) * most));
  }

  // Fills in what states cost beside the program's own arithmetic.
  void learn(StatesPlace& states) {
    const Candidate c = price(program(states, {}, layers({})));
    states.compute_seconds = c.compute_seconds - known({}).compute_seconds;
    states.busiest_seconds = c.busiest_seconds;
  }

  // No arrangement is faster.
  double bound(const StatesPlace& states, const Kept& kept) { return std::max(known(kept).compute_seconds + states.compute_seconds, states.busiest_seconds); }

  // --- candidates

  // What host and disk can take of layers. `passing`: bytes that pass through them besides, as far as they are known.
  Bytes room_for_layers(const StatesPlace& states, const Kept& kept, const Bytes& passing) {
    const int64_t host = has(Tier::kHost) ? std::max(passing[1], known(kept).passing_bytes) : passing[1];
    return {0, limits_[1] - states.bytes[1] - host, limits_[2] - states.bytes[2] - passing[2]};
  }

  // With so many layers away; adds to what is known to pass. Nothing where host or disk have no room.
  std::optional<Candidate> with_away(const StatesPlace& states, const Kept& kept, int64_t away, Bytes& passing) {
    for (int attempt = 0; attempt < 3; ++attempt) {
      const Bytes room = room_for_layers(states, kept, passing);
      std::vector<step::LayerKeep> all = layers(kept);
      const std::optional<Bytes> sent = room[1] < 0 || room[2] < 0 ? std::nullopt : send_away(all, away, kept.apart, room);
      if (!sent) return {};
      Candidate c = price(program(states, kept, std::move(all)));
      c.words = states.words;
      if (c.bytes[1] <= limits_[1] && c.bytes[2] <= limits_[2]) return c;
      for (size_t t = 1; t < room.size(); ++t) passing[t] = std::max(passing[t], c.bytes[t] - states.bytes[t] - (*sent)[t]);
    }
    return {};
  }

  // As many layers as host and disk take; -1 where they have no room for what passes.
  int64_t most_away(const StatesPlace& states, const Kept& kept, const Bytes& passing) {
    const Bytes room = room_for_layers(states, kept, passing);
    if (room[1] < 0 || room[2] < 0) return -1;
    if (!has(Tier::kHost) && !has(Tier::kDisk)) return 0;
    return largest(L_, [&](int64_t n) {
      std::vector<step::LayerKeep> all = layers(kept);
      return send_away(all, n, kept.apart, room).has_value();
    });
  }

  std::optional<Candidate> with_most_away(const StatesPlace& states, const Kept& kept, Bytes& passing) {
    for (int attempt = 0; attempt < 3; ++attempt) {
      const int64_t most = most_away(states, kept, passing);
      if (most < 0) return {};
      if (auto c = with_away(states, kept, most, passing)) return c;
    }
    return {};
  }

  // With as many layers away, if it fits.
  std::optional<Candidate> fitting(const StatesPlace& states, const Kept& kept, Bytes& passing) {
    if (!may_fit(states, kept)) return {};
    auto c = with_most_away(states, kept, passing);
    return c && c->fits ? c : std::nullopt;
  }
  bool fits(const StatesPlace& states, const Kept& kept, Bytes& passing) { return fitting(states, kept, passing).has_value(); }

  // As `kept` says, with as few layers away as the device allows; nothing where that does not fit.
  std::optional<Candidate> arrange(const StatesPlace& states, const Kept& kept, Bytes& passing) {
    if (!may_fit(states, kept)) return {};
    const std::vector<step::LayerKeep> all = layers(kept);
    const auto bytes = [&](int64_t l) {
      const step::LayerKeep& k = all[static_cast<size_t>(l)];
      return gate_up_stays(k, l, kept.apart) ? bytes_away(k, l, kept.apart) : bytes_of_layer(k, false);
    };
    std::optional<Candidate> found;
    int64_t few = -1, enough = most_away(states, kept, passing) + 1;  // layers away: too few for the device; enough, or too many for the others
    while (limits_[0] < INT64_MAX && few + 1 < enough && least_on_device(states, kept, few + 1) > limits_[0]) ++few;
    int64_t away = few + 1;
    for (int attempt = 0; enough - few > 1; ++attempt) {
      if (attempt > 5) away = few + (enough - few) / 2;
      std::optional<Candidate> c = with_away(states, kept, away, passing);
      if (!c) {
        enough = std::min(away, most_away(states, kept, passing) + 1);
        away = few + (enough - few) / 2;
        continue;
      }
      // From what is too much, or is free, to the next guess.
      int64_t excess = c->bytes[0] - limits_[0];
      if (excess <= 0) {
        found = std::move(c);
        enough = away;
        while (away > few + 1 && -excess >= bytes(away - 1)) excess += bytes(--away);
        if (away == enough) return found;
      } else {
        few = away;
        while (away < enough - 1 && excess > 0) excess -= bytes(away++);
        if (excess > 0) return found;  // not even all that can go
      }
    }
    return found;
  }
  std::optional<Candidate> arrange(const StatesPlace& states, const Kept& kept) {
    Bytes passing{};
    return arrange(states, kept, passing);
  }

  std::optional<Candidate> with_least_on_device(FitTrial& trial) {
    limits_[0] = kWhatever;
    const Trials trials = this->trials();
    std::optional<Candidate> least;
    for (size_t i = 0; i < trials.size(); ++i) {
      const StatesPlace& states = trials.states(i);
      const Kept& kept = trials.kept(i);
      Bytes passing{};
      if (!may_fit(states, kept) || (least && least_on_device(states, kept, most_away(states, kept, passing)) >= least->bytes[0])) continue;
      std::optional<Candidate> c = with_most_away(states, kept, passing);
      if (c && (!least || c->bytes[0] < least->bytes[0])) least = std::move(c), trial.fitted = i, trial.least = true;
    }
    return least;
  }

  // To a percent.
  std::optional<Candidate> with_least_away(Tier tier) {
    std::optional<Candidate> least;
    FitTrial trial;
    const auto fits_in = [&](int64_t room) {
      (tier == Tier::kHost ? q_.room.host_bytes : q_.room.disk_bytes) = room;
      limits_ = limits(q_);
      std::optional<Candidate> c = anything_that_fits(trial);
      const bool fits = c.has_value();
      if (c) least = std::move(c);
      return fits;
    };
    int64_t low = q_.room.of(tier);
    if (!fits_in(kWhatever)) return {};
    for (int64_t high = least->bytes[static_cast<size_t>(tier)]; high - low > high / 100;) {
      const int64_t middle = low + (high - low) / 2;
      if (fits_in(middle)) high = std::min(middle, least->bytes[static_cast<size_t>(tier)]);
      else low = middle;
    }
    return least;
  }

  // Ways to keep less than every layer's input, from those that compute least again; `every` alike come together.
  std::vector<Kept> sparser() const {
    std::vector<Kept> all;
    if (has(Tier::kHost)) all.push_back({.lean = true});
    for (int64_t every = 2; every < 2 * L_; every *= 2) {
      std::set<int64_t, std::greater<>> at_once{1};
      for (const int64_t rebuilt : {int64_t{3}, every - 1})
        if (rebuilt < every) at_once.insert(rebuilt);
      for (const int64_t rebuilt : at_once) all.push_back({.every = std::min(every, L_), .rebuilt = rebuilt});
      if (!has(Tier::kHost)) continue;
      for (const int64_t rebuilt : at_once) all.push_back({.every = std::min(every, L_), .rebuilt = rebuilt, .lean = true});
      all.push_back({.every = std::min(every, L_), .lean = true, .rebuilt_tier = Tier::kHost});
    }
    return all;
  }

  // Of these and of every input, those that have least on the device: for each `every`, that which has least first.
  std::vector<Kept> leanest() const {
    std::vector<Kept> all = sparser();
    std::erase_if(all, [](const Kept& kept) { return kept.rebuilt > 1; });
    all.push_back({});
    const auto leanness = [](const Kept& kept) { return std::pair(kept.every, -static_cast<int>(kept.lean) - static_cast<int>(kept.rebuilt_tier)); };
    std::stable_sort(all.begin(), all.end(), [&](const Kept& a, const Kept& b) { return leanness(a) < leanness(b); });
    return all;
  }

  // What is tried where it only has to fit: the ways that keep least, each with every way to place the states, from those that have
  // fewest on the device.
  struct Trials {
    std::vector<Kept> ways;
    std::vector<StatesPlace> places;

    size_t size() const { return ways.size() * places.size(); }
    const Kept& kept(size_t i) const { return ways[i / places.size()]; }
    const StatesPlace& states(size_t i) const { return places[i % places.size()]; }
  };
  Trials trials() {
    Trials t{.places = places()};
    std::reverse(t.places.begin(), t.places.end());
    for (const int64_t again : {L_, int64_t{0}})
      for (Kept kept : leanest()) t.ways.push_back((kept.again = again, kept));
    return t;
  }

  // The fastest of those below `bar` seconds.
  std::optional<Candidate> fastest_with(StatesPlace& states, double bar) {
    std::optional<Candidate> best;
    const std::vector<Kept> least = leanest();
    if (std::none_of(least.begin(), least.end(), [&](Kept kept) { return kept.again = L_, may_fit(states, kept); })) return best;
    learn(states);
    bool any = false;
    const auto consider = [&](std::optional<Candidate> c) {
      any = any || c;
      if (c && c->seconds < bar) bar = c->seconds, best = std::move(c);
    };
    consider(with_all_inputs(states, bar));
    for (const Kept& kept : sparser()) {
      // The more layers are rebuilt, the longer it takes.
      if (kept.every > 1 && bound(states, {.every = kept.every, .rebuilt = kept.every - 1}) >= bar) break;
      if (bound(states, kept) < bar) consider(arrange(states, kept));
    }
    if (!any)
      for (const Kept& kept : with_attention_again(states)) consider(least_attention_again(states, kept, bar));
    return best;
  }

  // Every layer's input, and of the rest as much as pays.
  std::optional<Candidate> with_all_inputs(const StatesPlace& states, double bar) {
    const int64_t most = (q_.cuda ? 3 : 2) * L_;  // on the CPU memory is worth more than a norm
    const int64_t least = most - largest(most, [&](int64_t n) { return bound(states, {.levels = most - n}) < bar; });
    Bytes passing{};
    if (bound(states, {.levels = least}) >= bar || !fits(states, {.levels = least}, passing)) return {};
    const int64_t top = least + largest(most - least, [&](int64_t n) { return fits(states, {.levels = least + n}, passing); });
    std::optional<Candidate> best;
    std::set<int64_t> seen;
    const auto consider = [&](int64_t levels) {
      if (levels < least || levels > top || !seen.insert(levels).second || bound(states, {.levels = levels}) >= std::min(bar, best ? best->seconds : kNever)) return false;
      std::optional<Candidate> c = arrange(states, {.levels = levels}, passing);
      if (c && q_.cuda && levels > L_ && c->seconds > kWaits * bound(states, {.levels = levels})) {
        std::optional<Candidate> apart = arrange(states, {.levels = levels, .apart = 2}, passing);
        if (apart && apart->seconds < c->seconds) c = std::move(apart);
      }
      if (!c || (best && c->seconds >= best->seconds)) return false;
      best = std::move(c);
      return true;
    };
    // As many levels as fit, or fewer, where moving them takes longer than computing them again.
    consider(top);
    int64_t at = top;
    for (int64_t i = 1; i < 6; ++i)
      if (const int64_t levels = least + (top - least) * i / 6; consider(levels)) at = levels;
    if (consider(least)) at = least;
    for (int64_t step = (top - least) / 12; step > 0; step /= 2) {
      const int64_t middle = at;
      for (const int64_t levels : {middle - step, middle + step})
        if (consider(levels)) at = levels;
    }
    return best;
  }

  // Ways to compute attention again in no fewer layers than it takes to fit, those first that may be fastest.
  std::vector<Kept> with_attention_again(const StatesPlace& states) {
    std::vector<Kept> all, ways = sparser();
    ways.push_back({});
    for (Kept kept : ways) {
      const auto with = [&](int64_t again) { return kept.again = again, kept; };
      if (!may_fit(states, with(L_))) continue;
      all.push_back(with(L_ - largest(L_ - 1, [&](int64_t once) { return may_fit(states, with(L_ - once)); })));
    }
    std::stable_sort(all.begin(), all.end(), [&](const Kept& a, const Kept& b) { return bound(states, a) < bound(states, b); });
    return all;
  }

  // With attention again in as few layers as fit, no fewer than `kept` says.
  std::optional<Candidate> least_attention_again(const StatesPlace& states, Kept kept, double bar) {
    const int64_t least = kept.again;
    const auto with = [&](int64_t again) { return kept.again = again, kept; };
    if (bound(states, with(least)) >= bar) return {};
    const int64_t most = least + largest(L_ - least, [&](int64_t more) { return bound(states, with(least + more)) < bar; });
    Bytes passing{};
    if (!fits(states, with(most), passing)) return {};
    const int64_t again = fits(states, with(least), passing) ? least : most - largest(most - least - 1, [&](int64_t fewer) { return fits(states, with(most - fewer), passing); });
    return arrange(states, with(again), passing);
  }

  // Where time is not known: as much as stays on the device, else the first way that fits.
  std::optional<Candidate> first_with(const StatesPlace& states) {
    if (const auto all_inputs = arrange(states, {})) {
      const auto stays = [&](int64_t levels) { return price(program(states, {.levels = levels}, layers({.levels = levels}))).fits; };
      const int64_t levels = all_inputs->options.keep[0].input_tier == Tier::kDevice ? largest((q_.cuda ? 3 : 2) * L_, stays) : 0;
      return levels > 0 ? arrange(states, {.levels = levels}) : all_inputs;
    }
    for (const Kept& kept : sparser())
      if (auto c = arrange(states, kept)) return c;
    for (const Kept& kept : with_attention_again(states))
      if (auto c = least_attention_again(states, kept, kNever)) return c;
    return {};
  }

  // What comes nearest, though it does not fit; where the states alone are too much, these.
  Candidate too_much(const StatesPlace& states) {
    const auto shortage = [&](const Bytes& bytes) {
      int64_t sum = 0;
      for (size_t t = 0; t < bytes.size(); ++t) sum += std::max<int64_t>(0, bytes[t] - limits_[t]);
      return sum;
    };
    std::optional<Candidate> least;
    for (Kept kept : leanest()) {
      kept.again = L_;
      Bytes passing{};
      std::optional<Candidate> c;
      if (shortage(states.bytes) == 0) c = with_most_away(states, kept, passing);
      if (!c) c.emplace(), c->options = program(states, kept, layers(kept)), c->bytes = states.bytes;
      if (!least || shortage(least->bytes) == 0 || (shortage(c->bytes) > 0 && shortage(c->bytes) < shortage(least->bytes))) least = std::move(c);
      if (!q_.thorough || shortage(states.bytes) > 0) break;
    }
    least->words = states.words;
    least->fits = false;
    return *least;
  }

  const step::Model& model_;
  const step::Options& base_;
  Question q_;
  ops::Heads heads_;  // of the rank that has most
  int64_t L_, resident_bytes_ = 0, pricings_ = 0;  // resident_bytes_: of states that all lie on the device
  Bytes limits_;
  std::map<Kept, Known> known_;
};

}  // namespace

Bytes limits(const Question& q) {
  // Of a GPU a hundredth stays free: nobody else comes there, and what is not kept costs time. On the CPU a twentieth: what is priced
  // beside the program is known to a few percent, and the kernel takes some for page tables.
  const double part = q.cuda ? 0.99 : 0.95;
  return {q.room.device_bytes > 0 ? static_cast<int64_t>(part * static_cast<double>(q.room.device_bytes)) - q.besides_bytes : INT64_MAX, q.room.host_bytes, q.room.disk_bytes};
}

std::vector<step::Options> unlike_ranks(const models::Spec& spec, const step::Options& options) {
  std::set<std::vector<int64_t>> seen;
  std::vector<step::Options> unlike;
  for (int64_t p = 0; p < options.mesh.P; ++p) {
    const ops::Heads h = step::heads_of_rank(spec, options.exchange_ranks(), options.exchange ? p : 0);
    std::vector<int64_t> shape{h.n, h.k};
    for (const ops::HeadSpan& span : ops::head_spans(h, options.attention.kv_heads_at_once)) shape.insert(shape.end(), {span.queries, span.groups});
    if (!seen.insert(std::move(shape)).second) continue;
    unlike.push_back(options);
    unlike.back().mesh.rank = p;
  }
  return unlike;
}

Priced read_step(const step::Model& model, const step::Options& options, const Rates& rates, bool record) {
  Priced priced({options.mesh.P, options.mesh.W}, options.s, ops::document_table_bytes(options.attention, options.S()), rates, record);
  const bool deferred = options.optimizer && options.defers_updates();
  const step::States states = step::make_states(priced, model.units, options);
  step::begin(priced, states);
  step::micro_step(priced, model, options, states, {.update = deferred});
  step::finish_gradients(priced, options, states);
  if (options.optimizer && !deferred) step::update(priced, model, options, states);
  return priced;
}

Priced read_another(const step::Model& model, const step::Options& options, const Rates& rates) {
  Priced priced({options.mesh.P, options.mesh.W}, options.s, ops::document_table_bytes(options.attention, options.S()), rates);
  const step::States states = step::make_states(priced, model.units, options);
  step::micro_step(priced, model, options, states, {.first = false, .last = false, .update = false});
  return priced;
}

Choice choose_places(const step::Model& model, const step::Options& options, const Question& question) { return Search(model, options, question).run(); }

std::optional<Candidate> anything_that_fits(const step::Model& model, const step::Options& options, const Question& question, FitTrial& trial) { return Search(model, options, question).anything_that_fits(trial); }

std::optional<PlacedCandidate> least_with_places(const step::Model& model, const step::Options& options, const Question& question, FitTrial& trial) { return Search(model, options, question).least_with_places(trial); }

std::optional<Candidate> with_least(const step::Model& model, const step::Options& options, const Question& question, Tier tier, FitTrial& trial) { return Search(model, options, question).with_least(tier, trial); }

Price price_with_places(const step::Model& model, const step::Options& options, const Rates& rates) {
  Price most;
  for (const step::Options& o : unlike_ranks(model.spec, options)) {
    Price price = read_step(model, o, rates, true).price();
    if (price.total_bytes() > most.total_bytes()) most = std::move(price);
  }
  return most;
}

Bytes excess(const Price& price, const Question& q) {
  Bytes over{};
  const Bytes most = limits(q);
  for (size_t t = 0; t < over.size(); ++t) over[t] = price.total_bytes(static_cast<Tier>(t)) - most[t];
  return over;
}

Candidate price_candidate(const step::Model& model, step::Options options, const Question& question) { return Search(model, options, question).price(std::move(options)); }

}  // namespace uly::plan
