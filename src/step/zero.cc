#include "step/zero.h"

#include <algorithm>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::step {

using ops::Buffer;
using ops::Held;
using ops::Tier;

int64_t shard_elements(const models::Unit& unit, int64_t W) { return round_up(ceil_div(unit.elements, W), models::kAlignElements); }

States make_states(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options) {
  States states;
  const auto make = [&](int64_t columns, Dtype dtype, ops::Kind kind, const char* what, Tier tier) { return ops.make(1, columns, dtype, kind, what, ops::Life::kRun, tier); };
  bool on_host = false;
  for (size_t u = 0; u < units.size(); ++u) {
    const int64_t n = shard_elements(units[u], options.mesh.W);
    const UnitTiers tiers = options.tiers_of(u);
    UnitState state;
    // In fp32 training weight and master are one, and lie where the weight has to be.
    state.weight = make(n, options.dtype, ops::Kind::kWeights, "weights", tiers.weight);
    if (options.optimizer) {
      const bool split = options.split_master && options.dtype == Dtype::kBf16;
      state.master = options.dtype == Dtype::kF32 && tiers.weight == tiers.optimizer ? state.weight : make(n, split ? Dtype::kI16 : Dtype::kF32, ops::Kind::kOptimizer, "master weights", tiers.optimizer);
      if (split && tiers.update_on_host && tiers.weight == Tier::kDevice) state.copy = make(n, Dtype::kBf16, ops::Kind::kOptimizer, "master weights, upper half", tiers.optimizer);
      state.m = make(n, Dtype::kF32, ops::Kind::kOptimizer, "first moment", tiers.optimizer);
      state.v = make(n, Dtype::kF32, ops::Kind::kOptimizer, "second moment", tiers.optimizer);
      on_host = on_host || tiers.update_on_host;
    }
    if (options.mesh.node > 1) state.near = make(n * options.mesh.W / options.mesh.node, options.dtype, ops::Kind::kWeights, "weights, the node's copy", Tier::kDevice);
    state.gradient = make(n, Dtype::kF32, ops::Kind::kGradients, "gradients", tiers.gradient);
    states.units.push_back(state);
  }
  const auto scalar = [&](const char* what, Tier tier) { return make(1, Dtype::kF64, ops::Kind::kInputs, what, tier); };
  states.loss_total = scalar("loss", Tier::kDevice);
  states.norm_total = scalar("gradient norm", Tier::kDevice);
  if (options.defers_updates()) {
    states.applied_loss = scalar("loss", Tier::kDevice);
    states.applied_norm = scalar("gradient norm", Tier::kDevice);
  }
  if (on_host) {
    states.host_loss = scalar("loss", Tier::kHost);
    states.host_norm = scalar("gradient norm", Tier::kHost);
  }
  return states;
}

std::vector<ops::UpdateRange> update_ranges(const models::Unit& unit, const Mesh& mesh) {
  const int64_t n = shard_elements(unit, mesh.W), begin = mesh.rank * n, end = begin + n;
  std::vector<ops::UpdateRange> ranges;
  for (size_t i = 0; i < unit.tensors.size(); ++i) {
    // With the gap after it: there all is zero and stays so.
    const models::Tensor& tensor = unit.tensors[i];
    const int64_t first = std::max(tensor.offset, begin), last = i + 1 < unit.tensors.size() ? std::min(unit.tensors[i + 1].offset, end) : end;
    if (first >= last) continue;
    if (!ranges.empty() && ranges.back().decays == tensor.decays && ranges.back().first + ranges.back().count == first - begin) {
      ranges.back().count += last - first;
    } else {
      ranges.push_back({.first = first - begin, .count = last - first, .decays = tensor.decays});
    }
  }
  return ranges;
}

Zero::Zero(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options, const States& states, const Phase& phase)
    : ops_(ops), units_(units), options_(options), states_(states), phase_(phase), near_(units.size(), options.mesh.node > 1 && !phase.first), begun_(units.size()), reduced_(units.size()), brought_(units.size()), arriving_(units.size()), updating_(units.size()), updated_(units.size(), !phase.update) {}

Zero::~Zero() = default;

// --- weights

void Zero::prefetch(size_t u) {
  if (u >= units_.size()) return;
  if (!updated_[u]) {
    start_update(u);
    finish_update(u);
    start_updates_after(u);
  }
  const Buffer shard = states_.units[u].weight;
  if (brought_[u] || (options_.mesh.W == 1 && shard.tier == Tier::kDevice)) return;
  Brought b;
  Buffer on_device = shard;
  if (shard.tier != Tier::kDevice) {
    b.shard = Held(ops_, 1, shard.columns, shard.dtype, ops::Kind::kWeights, "weights");
    if (!near_[u]) b.event = ops_.move(b.shard, shard);  // it is made anyway: programs of a step's micro-batches make the same buffers
    on_device = b.shard;
  }
  if (options_.mesh.W > 1) {
    arrive(u);
    b.whole = Held(ops_, 1, shard.columns * options_.mesh.W, shard.dtype, ops::Kind::kWeights, "gathered weights");
    if (b.shard.exists()) ops_.wait(b.event);
    b.event = near_[u] ? ops_.all_gather(b.whole, states_.units[u].near, ops::Group::kNode) : ops_.all_gather(b.whole, on_device, ops::Group::kWorld);
  }
  brought_[u] = std::move(b);
}

Buffer Zero::weights(size_t u) {
  prefetch(u);
  if (!brought_[u]) {
    arrive(u);
    return states_.units[u].weight;
  }
  Brought& b = *brought_[u];
  if (!b.arrived) {
    ops_.wait(b.event);
    if (b.whole.exists()) b.shard.reset();
    if (options_.mesh.node > 1 && !near_[u]) {
      const Buffer near = states_.units[u].near;
      ops_.copy(near, (*b.whole).column_range(options_.mesh.rank % options_.mesh.node * near.columns, near.columns));
      near_[u] = true;
    }
  }
  b.arrived = true;
  return b.whole.exists() ? b.whole : b.shard;
}

// An updated weight that is on its way from the host.
void Zero::arrive(size_t u) {
  if (!arriving_[u]) return;
  ops_.wait(arriving_[u]->event);
  arriving_[u].reset();
}

void Zero::release(size_t u) { brought_[u].reset(); }

// --- gradients

Buffer Zero::gradient(size_t u) {
  Buffer gradient = states_.units[u].gradient;
  if (options_.mesh.W > 1) {
    gradient_ = Held(ops_, 1, gradient.columns * options_.mesh.W, Dtype::kF32, ops::Kind::kGradients, "gradient of one unit");
  } else if (gradient.tier != Tier::kDevice) {
    gradient_ = Held(ops_, 1, gradient.columns, Dtype::kF32, ops::Kind::kGradients, "gradient of one unit");
    if (begun_[u] || !phase_.first) {
      settle_gradient();  // it may be this one that leaves
      ops_.wait(ops_.move(gradient_, gradient));
    }
  }
  if (gradient_.exists()) gradient = gradient_;
  if (begun_[u]) {
    if (options_.mesh.W > 1) ops_.zero(gradient);
  } else if (!products_add()) {
    zero_all_but_products(u, gradient);
  }
  begun_[u] = true;
  return gradient;
}

// Norms, biases, the gaps between, and an embedding that is no output projection.
void Zero::zero_all_but_products(size_t u, const Buffer& gradient) {
  int64_t from = 0;
  const auto zero_to = [&](int64_t to) {
    if (to > from) ops_.zero(gradient.column_range(from, to - from));
  };
  for (const models::Tensor& tensor : units_[u].tensors) {
    if (!tensor.is_product) continue;
    zero_to(tensor.offset);
    from = tensor.offset + tensor.elements();
  }
  zero_to(gradient.columns);
}

void Zero::reduce(size_t u, bool final) {
  if (options_.mesh.W == 1) {
    const Buffer gradient = gradient_.exists() ? Buffer(gradient_) : states_.units[u].gradient;
    leave(u, final, std::move(gradient_), gradient);
    return;
  }
  flush();
  Reducing r;
  r.unit = u;
  r.final = final;
  const int64_t elements = (*gradient_).columns;
  if (options_.wire == Dtype::kF32) {
    r.sent = std::move(gradient_);
  } else {
    r.sent = Held(ops_, 1, elements, options_.wire, ops::Kind::kCommunication, "gradient on its way");
    ops_.copy(r.sent, gradient_);
    gradient_.reset();
  }
  r.received = Held(ops_, 1, elements, options_.wire, ops::Kind::kCommunication, "gradient pieces");
  r.event = ops_.scatter(r.received, r.sent, ops::Group::kWorld);
  reducing_ = std::move(r);
}

void Zero::flush() {
  if (reducing_) {
    Reducing r = std::move(*reducing_);
    reducing_.reset();
    ops_.wait(r.event);
    r.sent.reset();
    Buffer shard = states_.units[r.unit].gradient;
    Held on_device;
    const bool fresh = phase_.first && !reduced_[r.unit];
    if (shard.tier != Tier::kDevice) {
      on_device = Held(ops_, 1, shard.columns, Dtype::kF32, ops::Kind::kGradients, "gradient of one unit");
      if (!fresh) {
        settle_gradient();
        ops_.wait(ops_.move(on_device, shard));
      }
      shard = on_device;
    }
    if (fresh) ops_.zero(shard);
    reduced_[r.unit] = true;
    ops_.sum_pieces(shard, r.received, options_.mesh.W);
    r.received.reset();
    leave(r.unit, r.final, std::move(on_device), shard);
  }
  settle_gradient();
}

void Zero::leave(size_t u, bool final, Held on_device, Buffer gradient) {
  if (final && phase_.last) ops_.squared_norm(states_.norm_total, gradient);
  if (!on_device.exists()) return;
  settle_gradient();
  leaving_.emplace();
  leaving_->event = ops_.move(states_.units[u].gradient, on_device);
  leaving_->gradient = std::move(on_device);
}

void Zero::settle_gradient() {
  if (!leaving_) return;
  ops_.wait(leaving_->event);
  leaving_.reset();
}

// --- updates

void Zero::start_update(size_t u) {
  if (updated_[u] || updating_[u]) return;
  Updating& g = updating_[u].emplace();
  const UnitState& s = states_.units[u];
  const UnitTiers tiers = options_.tiers_of(u);
  if (tiers.optimizer == Tier::kDevice) return;
  if (!tiers.update_on_host) {
    for (int64_t at = 0; at < s.m.columns; at += options_.update_piece) g.pieces.push_back({.first = at, .count = std::min(options_.update_piece, s.m.columns - at)});
    start_pieces(u, 2);
    return;
  }
  // The new weight is made where it stays, in the copy of its upper half, or on its way to the device.
  Buffer weight = s.copy.exists() ? s.copy : s.weight;
  if (weight.tier == Tier::kDevice) {
    g.weight = Held(ops_, 1, weight.columns, weight.dtype, ops::Kind::kWeights, "updated weights", Tier::kHost);
    weight = g.weight;
  }
  for (const ops::UpdateRange& range : update_ranges(units_[u], options_.mesh)) g.events.push_back(ops_.adamw(weight, s.master, s.m, s.v, s.gradient, states_.host_norm, states_.host_loss, range));
}

// So many that neither the host nor the link waits for the next layer.
void Zero::start_updates_after(size_t u) {
  constexpr size_t kAheadOnHost = 3;
  for (size_t next = u + 1; next < std::min(units_.size(), u + 1 + kAheadOnHost); ++next)
    if (next == u + 1 || options_.tiers_of(next).update_on_host) start_update(next);
}

void Zero::start_pieces(size_t u, size_t until) {
  Updating& g = *updating_[u];
  const UnitState& s = states_.units[u];
  for (; g.started < std::min(until, g.pieces.size()); ++g.started) {
    Piece& p = g.pieces[g.started];
    const auto bring = [&](Held& here, const Buffer& there, ops::Kind kind, bool values = true) {
      if (there.tier == Tier::kDevice) return;
      here = Held(ops_, 1, p.count, there.dtype, kind, "states of a piece of a unit");
      if (values) p.coming.push_back(ops_.move(here, there.column_range(p.first, p.count)));
    };
    const bool one = s.master.id == s.weight.id;
    bring(p.gradient, s.gradient, ops::Kind::kGradients);
    bring(p.weight, s.weight, ops::Kind::kWeights, one || s.master.dtype == Dtype::kI16);
    if (!one) bring(p.master, s.master, ops::Kind::kOptimizer);
    bring(p.m, s.m, ops::Kind::kOptimizer);
    bring(p.v, s.v, ops::Kind::kOptimizer);
  }
}

void Zero::settle(Piece& piece) {
  for (const ops::Event e : piece.going) ops_.wait(e);
  piece = {};
}

void Zero::settle_pieces() {
  for (Piece& piece : settling_) settle(piece);
  settling_.clear();
}

void Zero::finish_update(size_t u) {
  Updating g = std::move(*updating_[u]);
  updating_[u].emplace();
  updated_[u] = true;
  const UnitState& s = states_.units[u];
  const UnitTiers tiers = options_.tiers_of(u);
  const std::vector<ops::UpdateRange> ranges = update_ranges(units_[u], options_.mesh);
  if (tiers.optimizer == Tier::kDevice) {
    const bool deferred = states_.applied_norm.exists();
    for (const ops::UpdateRange& range : ranges) ops_.adamw(s.weight, s.master, s.m, s.v, s.gradient, deferred ? states_.applied_norm : states_.norm_total, deferred ? states_.applied_loss : states_.loss_total, range);
    return;
  }
  if (tiers.update_on_host) {
    for (const ops::Event e : g.events) ops_.wait(e);
    const Buffer from = s.copy.exists() ? s.copy : Buffer(g.weight);
    if (!from.exists()) return;
    arriving_[u].emplace();
    arriving_[u]->event = ops_.move(s.weight, from);
    arriving_[u]->weight = std::move(g.weight);
    return;
  }
  updating_[u] = std::move(g);
  for (size_t i = 0; i < updating_[u]->pieces.size(); ++i) {
    Piece& p = updating_[u]->pieces[i];
    for (const ops::Event e : p.coming) ops_.wait(e);
    const auto part = [&](const Held& here, const Buffer& there) { return here.exists() ? Buffer(here) : there.column_range(p.first, p.count); };
    for (const ops::UpdateRange& range : ranges) {
      const int64_t first = std::max(range.first, p.first), last = std::min(range.first + range.count, p.first + p.count);
      if (first >= last) continue;
      const Buffer weight = part(p.weight, s.weight);
      ops_.adamw(weight, s.master.id == s.weight.id ? weight : part(p.master, s.master), part(p.m, s.m), part(p.v, s.v), part(p.gradient, s.gradient), states_.applied_norm, states_.applied_loss,
                 {.first = first - p.first, .count = last - first, .decays = range.decays});
    }
    const auto send = [&](const Held& here, const Buffer& there) {
      if (here.exists()) p.going.push_back(ops_.move(there.column_range(p.first, p.count), here));
    };
    send(p.weight, s.weight), send(p.master, s.master), send(p.m, s.m), send(p.v, s.v);
    p.gradient.reset();
    // Two pieces under way home at most.
    settling_.push_back(std::move(p));
    while (settling_.size() > 2) settle(settling_.front()), settling_.erase(settling_.begin());
    start_pieces(u, i + 3);
  }
  updating_[u].emplace();
  if (s.weight.tier != Tier::kDevice) settle_pieces();  // it is fetched next
}

void Zero::update_all() {
  for (size_t u = 0; u < units_.size(); ++u) {
    if (updated_[u]) continue;
    start_update(u);
    start_updates_after(u);
    finish_update(u);
    arrive(u);
  }
  updates_done();
}

void Zero::updates_done() {
  for (size_t u = 0; u < units_.size(); ++u) arrive(u);
  settle_pieces();
}

}  // namespace uly::step
