#include "step/zero.h"

#include "base/check.h"
#include "base/shapes.h"

namespace uly::step {

int64_t shard_elements(const models::Unit& unit, int64_t W) { return round_up(ceil_div(unit.elements, W), models::kAlignElements); }

States make_states(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options) {
  States states;
  const auto make = [&](int64_t columns, Dtype dtype, ops::Kind kind, const char* what) { return ops.make(1, columns, dtype, kind, what, ops::Life::kRun); };
  for (const models::Unit& unit : units) {
    const int64_t n = shard_elements(unit, options.mesh.W);
    UnitState state;
    state.weight = make(n, options.dtype, ops::Kind::kWeights, "weights");
    if (options.optimizer) {
      state.master = options.dtype == Dtype::kF32 ? state.weight : make(n, options.split_master ? Dtype::kI16 : Dtype::kF32, ops::Kind::kOptimizer, "master weights");
      state.m = make(n, Dtype::kF32, ops::Kind::kOptimizer, "first moment");
      state.v = make(n, Dtype::kF32, ops::Kind::kOptimizer, "second moment");
    }
    state.gradient = make(n, Dtype::kF32, ops::Kind::kGradients, "gradients");
    states.units.push_back(state);
  }
  states.loss_total = make(1, Dtype::kF64, ops::Kind::kInputs, "loss");
  states.norm_total = make(1, Dtype::kF64, ops::Kind::kInputs, "gradient norm");
  return states;
}

Zero::Zero(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options, const States& states, bool first)
    : ops_(ops), units_(units), options_(options), states_(states), first_(first), begun_(units.size()), reduced_(units.size()), gathered_(units.size()) {}

Zero::~Zero() = default;

void Zero::prefetch(size_t u) {
  if (options_.mesh.W == 1 || u >= units_.size() || gathered_[u]) return;
  const ops::Buffer shard = states_.units[u].weight;
  Gathered g;
  g.whole = ops::Held(ops_, 1, shard.columns * options_.mesh.W, shard.dtype, ops::Kind::kWeights, "gathered weights");
  g.event = ops_.all_gather(g.whole, shard, ops::Group::kWorld);
  gathered_[u] = std::move(g);
}

ops::Buffer Zero::weights(size_t u) {
  if (options_.mesh.W == 1) return states_.units[u].weight;
  prefetch(u);
  Gathered& g = *gathered_[u];
  if (!g.arrived) ops_.wait(g.event);
  g.arrived = true;
  return g.whole;
}

void Zero::release(size_t u) { gathered_[u].reset(); }

ops::Buffer Zero::gradient(size_t u) {
  ops::Buffer gradient = states_.units[u].gradient;
  if (options_.mesh.W > 1) {
    gradient_ = ops::Held(ops_, 1, states_.units[u].weight.columns * options_.mesh.W, Dtype::kF32, ops::Kind::kGradients, "gradient of one unit");
    gradient = gradient_;
  }
  if (begun_[u]) {
    if (options_.mesh.W > 1) ops_.zero(gradient);
  } else if (!products_add()) {
    zero_all_but_products(u, gradient);
  }
  begun_[u] = true;
  return gradient;
}

// Norms, biases, the gaps between, and an embedding that is no output projection.
void Zero::zero_all_but_products(size_t u, const ops::Buffer& gradient) {
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

void Zero::reduce(size_t u) {
  if (options_.mesh.W == 1) return;
  flush();
  Reducing r;
  r.unit = u;
  const int64_t elements = (*gradient_).columns;
  if (options_.wire == Dtype::kF32) {
    r.sent = std::move(gradient_);
  } else {
    r.sent = ops::Held(ops_, 1, elements, options_.wire, ops::Kind::kCommunication, "gradient on its way");
    ops_.copy(r.sent, gradient_);
    gradient_.reset();
  }
  r.received = ops::Held(ops_, 1, elements, options_.wire, ops::Kind::kCommunication, "gradient pieces");
  r.event = ops_.scatter(r.received, r.sent, ops::Group::kWorld);
  reducing_ = std::move(r);
}

void Zero::flush() {
  if (!reducing_) return;
  ops_.wait(reducing_->event);
  const ops::Buffer shard = states_.units[reducing_->unit].gradient;
  if (first_ && !reduced_[reducing_->unit]) ops_.zero(shard);
  reduced_[reducing_->unit] = true;
  ops_.sum_pieces(shard, reducing_->received, options_.mesh.W);
  reducing_.reset();
}

}  // namespace uly::step
