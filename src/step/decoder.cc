#include "step/decoder.h"

#include <algorithm>

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

// Loss head: final norm, then tiles of logits that become their own gradient. Returns dx_sD.
Held loss_head(ops::Ops& ops, const Model& m, const Options& o, Zero& zero, const States& states, Held x_sD) {
  const models::Spec& spec = m.spec;
  const Schedule units(m);
  const int64_t s = o.s, D = spec.D, tile = std::min(o.loss_tile, s);
  ops.mark("loss head", -1);
  Held h_sD(ops, s, D, o.dtype, Kind::kActivations, "final normed input"), rstd_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "rstd");
  const Buffer norm_D = zero.weights(units.head).view(0, 1, D);
  ops.rms_norm(h_sD, rstd_s, x_sD, norm_D, spec.norm_eps);

  // Untied, the projection follows the norm in the head's unit; tied, it is the embedding's.
  const int64_t at = spec.tied_embeddings ? 0 : m.units[units.head].tensors.back().offset;
  const Buffer table_VD = zero.weights(units.table).view(at, spec.V, D);
  Buffer gradient = zero.gradient(units.table);
  {
    Held dh_sD(ops, s, D, o.dtype, Kind::kActivations, "gradient of the final normed input");
    {
      Held logits_tV(ops, tile, spec.V, o.dtype, Kind::kActivations, "logits tile"), loss_s(ops, s, 1, Dtype::kF32, Kind::kActivations, "loss of each token");
      const Buffer labels_s = ops.input(ops::Input::kLabels_s);
      for (int64_t first = 0; first < s; first += tile) {
        const int64_t t = std::min(tile, s - first);
        const Buffer logits = (*logits_tV).row_range(0, t), h = (*h_sD).row_range(first, t);
        ops.linear(logits, h, table_VD);
        ops.cross_entropy(logits, (*loss_s).row_range(first, t), labels_s.row_range(first, t));
        ops.linear_dx((*dh_sD).row_range(first, t), logits, table_VD);
        ops.linear_dw(gradient.view(at, spec.V, D), logits, h, zero.products_add() || first > 0);
      }
      ops.sum_loss(states.loss_total, loss_s);
    }
    if (spec.tied_embeddings) {
      zero.reduce(units.table);
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

}  // namespace

void begin(ops::Ops& ops, const States& states) { ops.zero(states.loss_total); }

void micro_step(ops::Ops& ops, const Model& m, const Options& o, const States& states, bool first) {
  const models::Spec& spec = m.spec;
  const Schedule units(m);
  const size_t L = static_cast<size_t>(spec.L);
  Zero zero(ops, m.units, o, states, first);
  const Ulysses ulysses(ops, spec, o);

  ops.mark("embedding", -1);
  const Buffer ids_s = ops.input(ops::Input::kIds_s);
  Held table_sH(ops, o.s, spec.H, Dtype::kF32, Kind::kActivations, "cos and sin");
  ops.rope_table(table_sH);
  const Block block(ops, spec, o, ulysses, table_sH);

  zero.prefetch(units.embedding);
  Held x_sD(ops, o.s, spec.D, o.dtype, Kind::kSaved, "layer input");
  const Buffer embedding = zero.weights(units.embedding).view(0, spec.V, spec.D);
  zero.prefetch(1);
  ops.embed(x_sD, embedding, ids_s);
  zero.release(units.embedding);

  std::vector<Saved> saved(L);
  for (size_t l = 0; l < L; ++l) {
    const LayerViews w = layer_views(spec, zero.weights(l + 1));
    zero.prefetch(l + 2);  // after the last layer: the head
    x_sD = block.forward(w, std::move(x_sD), o.keep[l], saved[l], static_cast<int64_t>(l));
    zero.release(l + 1);
  }
  Held dx_sD = loss_head(ops, m, o, zero, states, std::move(x_sD));
  for (size_t l = L; l-- > 0;) {
    const LayerViews w = layer_views(spec, zero.weights(l + 1));
    if (l > 0) zero.prefetch(l);
    const LayerViews dw = layer_views(spec, zero.gradient(l + 1));
    block.backward(w, dw, zero.products_add(), std::move(saved[l]), dx_sD, static_cast<int64_t>(l));
    zero.reduce(l + 1);
    zero.release(l + 1);
  }
  ops.mark("embedding backward", -1);
  ops.embed_grad(zero.gradient(units.embedding).view(0, spec.V, spec.D), dx_sD, ids_s);
  zero.reduce(units.embedding);
  zero.flush();
}

void finish_gradients(ops::Ops& ops, const Options& o, const States& states) {
  ops.mark("gradient norm", -1);
  ops.zero(states.norm_total);
  for (const UnitState& unit : states.units) ops.squared_norm(states.norm_total, unit.gradient);
  if (o.mesh.W == 1) return;
  ops.wait(ops.all_reduce(states.norm_total, ops::Group::kWorld));
  ops.wait(ops.all_reduce(states.loss_total, ops::Group::kWorld));
}

std::vector<ops::UpdateRange> update_ranges(const models::Unit& unit, const Mesh& mesh) {
  const int64_t n = shard_elements(unit, mesh.W), begin = mesh.rank * n, end = begin + n;
  std::vector<ops::UpdateRange> ranges;
  for (const models::Tensor& tensor : unit.tensors) {
    const int64_t first = std::max(tensor.offset, begin), last = std::min(tensor.offset + tensor.elements(), end);
    if (first >= last) continue;
    if (!ranges.empty() && ranges.back().decays == tensor.decays && ranges.back().first + ranges.back().count == first - begin) {
      ranges.back().count += last - first;
    } else {
      ranges.push_back({.first = first - begin, .count = last - first, .decays = tensor.decays});
    }
  }
  return ranges;
}

void update(ops::Ops& ops, const Model& m, const Options& o, const States& states) {
  ops.mark("optimizer", -1);
  for (size_t u = 0; u < m.units.size(); ++u) {
    const UnitState& s = states.units[u];
    for (const ops::UpdateRange& range : update_ranges(m.units[u], o.mesh)) ops.adamw(s.weight, s.master, s.m, s.v, s.gradient, states.norm_total, states.loss_total, range);
  }
}

}  // namespace uly::step
