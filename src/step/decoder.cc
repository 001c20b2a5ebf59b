#include "step/decoder.h"

#include <algorithm>
#include <optional>

#include "base/shapes.h"

namespace uly::step {
namespace {

using ops::Buffer;
using ops::Held;
using ops::Kind;

// The order in which units are used, so that each is gathered one ahead.
struct Schedule {
  size_t embedding = 0, head, table;  // table: the unit that holds the output projection
  explicit Schedule(const Model& m) : head(m.units.size() - 1), table(m.spec.tied_embeddings ? 0 : head) {}
};

// The output projection's place in the unit that holds it: untied, it follows the norm in the head's; tied, it is the embedding's.
int64_t table_offset(const Model& m) { return m.spec.tied_embeddings ? 0 : m.units[Schedule(m).head].tensors.back().offset; }

// Loss head: final norm, then tiles of logits that become their own gradient. Returns dx_sD.
Held loss_head(ops::Ops& ops, const Model& m, const Options& o, Zero& zero, const States& states, Held x_sD) {
  const models::Spec& spec = m.spec;
  const Schedule units(m);
  const int64_t s = o.s, D = spec.D, tile = std::min(o.loss_tile, s);
  ops.mark("loss head", -1);
  Held h_sD(ops, s, D, o.dtype, Kind::kActivations, "final normed input"), rstd_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "rstd");
  const Buffer norm_D = zero.weights(units.head).view(0, 1, D);
  ops.rms_norm(h_sD, rstd_s, x_sD, norm_D, spec.norm_eps);

  const int64_t at = table_offset(m);
  const Buffer table_VD = zero.weights(units.table).view(at, spec.V, D);
  Buffer gradient = zero.gradient(units.table);
  {
    Held dh_sD(ops, s, D, o.dtype, Kind::kActivations, "gradient of the final normed input");
    {
      Held logits_tV(ops, tile, spec.V, o.dtype, Kind::kActivations, "logits tile"), loss_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "loss of each token");
      const Buffer labels_s = ops.input(ops::Input::kLabels_s);
      ops.for_tiles(s, tile, [&](int64_t first, int64_t t) {
        const Buffer logits = (*logits_tV).row_range(0, t), h = (*h_sD).row_range(first, t);
        ops.linear(logits, h, table_VD);
        ops.cross_entropy(logits, (*loss_s).row_range(first, t), labels_s.row_range(first, t));
        ops.linear_dx((*dh_sD).row_range(first, t), logits, table_VD);
        ops.linear_dw(gradient.view(at, spec.V, D), logits, h, zero.products_add() || first > 0);
      });
      ops.sum_loss(states.loss_total, loss_s);
    }
    if (spec.tied_embeddings) {
      zero.reduce(units.table, false);
      zero.release(units.table);
      gradient = zero.gradient(units.head);
    }
    h_sD.reset();
    Held dx_sD(ops, s, D, o.dtype, Kind::kActivations, "gradient of the residual stream");
    ops.zero(dx_sD);
    ops.rms_norm_grad(dx_sD, gradient.view(0, 1, D), dh_sD, x_sD, rstd_s, norm_D);
    zero.reduce(units.head);
    zero.release(units.head);
    return dx_sD;
  }
}

// The same without gradients.
void loss_alone(ops::Ops& ops, const Model& m, const Options& o, Zero& zero, const States& states, Held x_sD, const Look& look) {
  const models::Spec& spec = m.spec;
  const Schedule units(m);
  const int64_t s = o.s, D = spec.D, tile = std::min(o.loss_tile, s);
  ops.mark("loss head", -1);
  Held h_sD(ops, s, D, o.dtype, Kind::kActivations, "final normed input");
  {
    const Held rstd_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "rstd");
    ops.rms_norm(h_sD, rstd_s, x_sD, zero.weights(units.head).view(0, 1, D), spec.norm_eps);
  }
  x_sD.reset();
  const Buffer table_VD = zero.weights(units.table).view(table_offset(m), spec.V, D), labels_s = ops.input(ops::Input::kLabels_s);
  const Held logits_tV(ops, tile, spec.V, o.dtype, Kind::kActivations, "logits tile"), loss_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "loss of each token");
  ops.for_tiles(s, tile, [&](int64_t first, int64_t t) {
    const Buffer logits = (*logits_tV).row_range(0, t);
    ops.linear(logits, (*h_sD).row_range(first, t), table_VD);
    ops.cross_entropy(logits, (*loss_s).row_range(first, t), labels_s.row_range(first, t));
  });
  ops.sum_loss(states.loss_total, loss_s);
  if (look) look(units.head, loss_s);
  if (spec.tied_embeddings) zero.release(units.table);
  zero.release(units.head);
}

}  // namespace

void begin(ops::Ops& ops, const States& states) {
  ops.zero(states.loss_total);
  ops.zero(states.norm_total);
}

namespace {

// One micro-batch on its way through the layers and back.
class Micro {
 public:
  Micro(ops::Ops& ops, const Model& m, const Options& o, const States& states, const Phase& phase)
      : ops_(ops), m_(m), o_(o), states_(states), units_(m), zero_(ops, m.units, o, states, phase), ulysses_(ops, m.spec, o), saved_(static_cast<size_t>(m.spec.L)) {
    ops_.mark("embedding", -1);
    table_sH_ = Held(ops_, o_.s, m_.spec.H, Dtype::kF32, Kind::kActivations, "cos and sin");
    ops_.rope_table(table_sH_);
    block_.emplace(ops_, m_.spec, o_, ulysses_, table_sH_);
  }

  void evaluate(const Look& look) {
    const std::vector<LayerKeep> nothing(saved_.size(), {.input = false, .output = false});
    loss_alone(ops_, m_, o_, zero_, states_, forward(nothing, look), look);
  }

  void run() {
    Held dx_sD = loss_head(ops_, m_, o_, zero_, states_, forward(o_.keep));
    for (Saved& saved : saved_) saved.settle();
    backward(dx_sD);
    ops_.mark("embedding backward", -1);
    ops_.embed_grad(zero_.gradient(units_.embedding).view(0, m_.spec.V, m_.spec.D), dx_sD, ops_.input(ops::Input::kIds_s));
    zero_.reduce(units_.embedding);
    zero_.flush();
  }

 private:
  LayerViews weights(size_t l) { return layer_views(m_.spec, zero_.weights(l + 1)); }

  Held forward(const std::vector<LayerKeep>& keep, const Look& look = nullptr) {
    const models::Spec& spec = m_.spec;
    zero_.prefetch(units_.embedding);
    Held x_sD(ops_, o_.s, spec.D, o_.dtype, Kind::kSaved, "layer input");
    const Buffer embedding = zero_.weights(units_.embedding).view(0, spec.V, spec.D);
    zero_.prefetch(1);
    ops_.embed(x_sD, embedding, ops_.input(ops::Input::kIds_s));
    zero_.release(units_.embedding);
    if (look) look(units_.embedding, x_sD);
    for (size_t l = 0; l < saved_.size(); ++l) {
      const LayerViews w = weights(l);
      zero_.prefetch(l + 2);  // after the last layer: the head
      if (l + 1 == saved_.size() && o_.mesh.W > 1) zero_.prefetch(units_.table);
      // What the layer before sends away has this layer's time, or with little room its attention's.
      const auto settle = [&] {
        if (l > 0) saved_[l - 1].settle();
      };
      x_sD = block_->forward(w, std::move(x_sD), keep[l], saved_[l], static_cast<int64_t>(l), [&] {
        if (o_.lean) settle();
      });
      settle();
      if (look) look(l + 1, x_sD);
      if (!is_next_in_backward(l)) zero_.release(l + 1);
    }
    if (o_.mesh.W > 1) zero_.prefetch(first_of_backward() + 1);  // under the loss head
    zero_.updates_done();
    return x_sD;
  }

  // The layer whose weights backward wants first: the last, or that from which the last one's input is rebuilt.
  size_t first_of_backward() const {
    size_t l = saved_.size() - 1;
    while (!o_.keep[l].input) --l;
    return l;
  }
  // Gathered weights that stay: they would be gathered again at once.
  bool is_next_in_backward(size_t l) const { return o_.mesh.W > 1 && l + 1 == saved_.size() && first_of_backward() == l; }

  // From the last layer to the first, by runs of layers that begin with one whose input is kept.
  void backward(Held& dx_sD) {
    for (size_t end = saved_.size(); end > 0;) {
      size_t begin = end - 1;
      while (!o_.keep[begin].input) --begin;
      backward_run(begin, end, dx_sD);
      end = begin;
    }
  }

  // Layers [begin, end); the input of `begin` is kept. Where the others' are too many to be there at once, those of the second
  // half are rebuilt first, from the input in the middle.
  void backward_run(size_t begin, size_t end, Held& dx_sD) {
    const size_t rebuilt = end - begin - 1;
    if (static_cast<int64_t>(rebuilt) > std::max<int64_t>(1, o_.rebuilt_inputs)) {
      const size_t middle = begin + (end - begin) / 2;
      rebuild(begin, middle, true);
      backward_run(middle, end, dx_sD);
      end = middle;
      if (end > begin) backward_run(begin, end, dx_sD);
      return;
    }
    rebuild(begin, end - 1, false);
    for (size_t l = end; l-- > begin;) backward_layer(l, dx_sD);
  }

  // Inputs of the layers after `begin` up to `last`; with `only_last` those between do not stay.
  void rebuild(size_t begin, size_t last, bool only_last) {
    for (size_t l = begin; l < last; ++l) {
      const LayerViews w = weights(l);
      zero_.prefetch(l + 2);
      saved_[l + 1].o_sNH.want();
      Held y_sD = block_->forward_again(w, saved_[l].x_sD.device(), saved_[l], static_cast<int64_t>(l));
      zero_.release(l + 1);
      if (l == begin || only_last) {
        if (l > begin) saved_[l].x_sD.reset();
        else if (o_.rebuilt_tier != ops::Tier::kDevice) saved_[l].x_sD.leave(o_.rebuilt_tier, "layer input, rebuilt"), saved_[l].x_sD.settle();
        else saved_[l].x_sD.drop();
        if (only_last && !o_.keep[l].output) saved_[l].o_sNH.reset(), saved_[l].lse_Sn.reset();
      }
      saved_[l + 1].x_sD.keep(ops_, std::move(y_sD), ops::Tier::kDevice, "layer input, rebuilt");
    }
  }

  // What the layer before l needs first; where its input is not kept, what that is rebuilt from.
  void want_before(size_t l) {
    size_t begin = l - 1;
    while (!saved_[begin].x_sD.exists()) --begin;
    if (begin == l - 1) return saved_[begin].want_for_mlp();
    saved_[begin].x_sD.want();
    saved_[begin].o_sNH.want();
  }

  void backward_layer(size_t l, Held& dx_sD) {
    const LayerViews w = weights(l);
    if (l > 0) zero_.prefetch(l);
    const LayerViews dw = layer_views(m_.spec, zero_.gradient(l + 1));
    // What the layer before keeps elsewhere comes while this one works.
    block_->backward(w, dw, zero_.products_add(), saved_[l], dx_sD, static_cast<int64_t>(l), [&] {
      if (l > 0) want_before(l);
    });
    zero_.reduce(l + 1);
    zero_.release(l + 1);
  }

  ops::Ops& ops_;
  const Model& m_;
  const Options& o_;
  const States& states_;
  const Schedule units_;
  Zero zero_;
  const Ulysses ulysses_;
  Held table_sH_;
  std::optional<Block> block_;
  std::vector<Saved> saved_;
};

}  // namespace

void micro_step(ops::Ops& ops, const Model& m, const Options& o, const States& states, const Phase& phase) { Micro(ops, m, o, states, phase).run(); }

void evaluate(ops::Ops& ops, const Model& m, const Options& o, const States& states, const Look& look) { Micro(ops, m, o, states, {.first = false, .last = false, .update = false}).evaluate(look); }

void finish_evaluation(ops::Ops& ops, const Options& o, const States& states) {
  if (o.mesh.W > 1) ops.wait(ops.all_reduce(states.loss_total, ops::Group::kWorld));
}

void finish_gradients(ops::Ops& ops, const Options& o, const States& states) {
  ops.mark("gradient norm", -1);
  if (o.mesh.W > 1) {
    ops.wait(ops.all_reduce(states.norm_total, ops::Group::kWorld));
    ops.wait(ops.all_reduce(states.loss_total, ops::Group::kWorld));
  }
  if (states.applied_norm.exists()) {
    ops.copy(states.applied_norm, states.norm_total);
    ops.copy(states.applied_loss, states.loss_total);
  }
  if (states.host_norm.exists()) {
    ops.wait(ops.move(states.host_norm, states.norm_total));
    ops.wait(ops.move(states.host_loss, states.loss_total));
  }
}

void update(ops::Ops& ops, const Model& m, const Options& o, const States& states) {
  ops.mark("optimizer", -1);
  Zero(ops, m.units, o, states, {.first = false, .last = false, .update = true}).update_all();
}

}  // namespace uly::step
