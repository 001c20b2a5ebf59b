#include "step/block.h"

#include <algorithm>

namespace uly::step {

using ops::Buffer;
using ops::Held;
using ops::Kind;

LayerViews layer_views(const models::Spec& spec, const Buffer& flat) {
  const models::LayerOffsets at = models::layer_offsets(spec);
  const auto view = [&](int64_t offset, int64_t rows, int64_t columns) { return offset < 0 ? Buffer{} : flat.view(offset, rows, columns); };
  LayerViews v;
  v.norm1_D = view(at.norm1_D, 1, spec.D);
  v.qkv_OD = view(at.qkv_OD, spec.qkv_columns(), spec.D);
  v.qkv_bias_O = view(at.qkv_bias_O, 1, spec.qkv_columns());
  v.q_norm_H = view(at.q_norm_H, 1, spec.H);
  v.k_norm_H = view(at.k_norm_H, 1, spec.H);
  v.o_DO = view(at.o_DO, spec.D, spec.query_columns());
  v.o_bias_D = view(at.o_bias_D, 1, spec.D);
  v.norm2_D = view(at.norm2_D, 1, spec.D);
  v.gate_up_2FD = view(at.gate_up_2FD, 2 * spec.F, spec.D);
  v.gate_up_bias_2F = view(at.gate_up_bias_2F, 1, 2 * spec.F);
  v.down_DF = view(at.down_DF, spec.D, spec.F);
  v.down_bias_D = view(at.down_bias_D, 1, spec.D);
  return v;
}

void Saved::settle() {
  for (Parked* p : {&x_sD, &o_sNH, &lse_Sn, &qkv_S, &raw_qk, &rstd_qk, &x1_sD, &gate_up_s2F}) p->settle();
}

void Saved::want_for_mlp() {
  x1_sD.want();
  gate_up_s2F.want();
  if (x1_sD.exists()) return;
  o_sNH.want();  // from these it is rebuilt
  x_sD.want();
}

void Saved::want_for_attention() {
  for (Parked* p : {&x_sD, &o_sNH, &lse_Sn, &qkv_S, &raw_qk, &rstd_qk}) p->want();
}

Held Block::project(const LayerViews& w, Buffer h_sD, Held* raw_qk, Held* rstd_qk) const {
  const int64_t s = options_.s, NH = spec_.query_columns(), KH = spec_.key_columns();
  Held qkv_s = make(s, spec_.qkv_columns(), Kind::kActivations, "q, k, v");
  ops_.linear(qkv_s, h_sD, w.qkv_OD);
  if (w.qkv_bias_O.exists()) ops_.add_bias(qkv_s, w.qkv_bias_O);
  const Buffer qk = (*qkv_s).column_range(0, NH + KH), q = qk.column_range(0, NH), k = qk.column_range(NH, KH);
  if (spec_.qk_norm) {
    Held rstd = make(s, spec_.N + spec_.K, Kind::kSaved, "q/k norm", Dtype::kF32);
    Buffer raw_q, raw_k;
    if (raw_qk) {
      *raw_qk = make(s, NH + KH, Kind::kSaved, "q, k before their norm");
      raw_q = (**raw_qk).column_range(0, NH), raw_k = (**raw_qk).column_range(NH, KH);
    }
    ops_.norm_rope(q, raw_q, (*rstd).column_range(0, spec_.N), w.q_norm_H, table_sH_, spec_.norm_eps);
    ops_.norm_rope(k, raw_k, (*rstd).column_range(spec_.N, spec_.K), w.k_norm_H, table_sH_, spec_.norm_eps);
    if (rstd_qk) *rstd_qk = std::move(rstd);
  } else {
    ops_.rope(qk, table_sH_, +1);
  }
  return qkv_s;
}

void Block::output_projection(const LayerViews& w, Buffer y_sD, Buffer o_sNH, Buffer x_sD) const {
  ops_.linear_add(y_sD, o_sNH, w.o_DO, x_sD);
  if (w.o_bias_D.exists()) ops_.add_bias(y_sD, w.o_bias_D);
}

void Block::mlp_forward(const LayerViews& w, Buffer y_sD, Buffer x1_sD, Buffer h_sD, Buffer gate_up_s2F, Buffer a_sF) const {
  const int64_t s = options_.s, tile = std::min(options_.mlp_tile, s), F = spec_.F;
  Held scratch_t2F, a_tF;
  if (!a_sF.exists()) a_tF = make(tile, F, Kind::kActivations, "MLP activation tile");
  if (!gate_up_s2F.exists()) scratch_t2F = make(tile, 2 * F, Kind::kActivations, "gate and up tile");
  ops_.for_tiles(s, tile, [&](int64_t first, int64_t t) {
    const Buffer gate_up = gate_up_s2F.exists() ? gate_up_s2F.row_range(first, t) : (*scratch_t2F).row_range(0, t);
    const Buffer a = a_sF.exists() ? a_sF.row_range(first, t) : (*a_tF).row_range(0, t), y = y_sD.row_range(first, t);
    ops_.linear(gate_up, h_sD.row_range(first, t), w.gate_up_2FD);
    if (w.gate_up_bias_2F.exists()) ops_.add_bias(gate_up, w.gate_up_bias_2F);
    ops_.swiglu(a, gate_up);
    ops_.linear_add(y, a, w.down_DF, x1_sD.row_range(first, t));
    if (w.down_bias_D.exists()) ops_.add_bias(y, w.down_bias_D);
  });
}

Block::Attended Block::attend(ToHeads& qkv, const std::function<void()>& arrived) const {
  const ops::Heads& heads = ulysses_.heads();
  Attended a{.o_SnH = make(options_.S(), heads.n * heads.H, Kind::kSaved, "attention output"),
             .lse_Sn = make(options_.S(), heads.n, Kind::kSaved, "attention log-sum-exp", Dtype::kF32),
             .output = ulysses_.output_to_tokens()};
  const Held workspace = this->workspace(largest_workspace(ops::attention_workspace_bytes));
  const int64_t parts = ulysses_.num_parts();
  for (int64_t g = 0; g < parts; ++g) {
    const Buffer qkv_part = qkv.wait(g);
    if (g + 1 < parts) qkv.start(g + 1);
    else arrived();
    ops_.attention(ulysses_.output_part(a.o_SnH, g), ulysses_.lse_part(a.lse_Sn, g), qkv_part, workspace, ulysses_.heads(g), options_.attention);
    if (g + 1 < parts) a.output.start(a.o_SnH);  // the last: once qkv_S has made room
  }
  return a;
}

int64_t Block::largest_workspace(int64_t (*bytes)(const ops::AttentionSchedule&, const ops::Heads&, int64_t)) const {
  int64_t most = 0;
  for (int64_t g = 0; g < ulysses_.num_parts(); ++g) most = std::max(most, bytes(options_.attention, ulysses_.heads(g), options_.S()));
  return most;
}

Held Block::forward(const LayerViews& w, Held x, const LayerKeep& keep, Saved& saved, int64_t layer, const std::function<void()>& between) const {
  const int64_t s = options_.s, D = spec_.D;
  const bool projections = keep.level >= Keep::kProjections, everything = keep.level == Keep::kEverything;
  const Kind normed = everything ? Kind::kSaved : Kind::kActivations;
  ops_.mark("attention forward", layer);
  const Buffer x_sD = x;
  if (keep.input) saved.x_sD.keep(ops_, std::move(x), keep.input_tier, "layer input");
  Held o;
  Buffer o_sNH;
  {
    ToHeads qkv;
    Held raw_qk, rstd_qk;
    {
      Held h_sD = make(s, D, normed, "normed input"), rstd_s = make(s, 1, normed, "rstd", Dtype::kF32);
      ops_.rms_norm(h_sD, rstd_s, x_sD, w.norm1_D, spec_.norm_eps);
      qkv = ulysses_.qkv_to_heads(project(w, h_sD, projections ? &raw_qk : nullptr, projections ? &rstd_qk : nullptr));
      qkv.start(0);
      if (everything) saved.h1_sD.keep(ops_, std::move(h_sD), ops::Tier::kDevice, "normed input"), saved.rstd1_s.keep(ops_, std::move(rstd_s), ops::Tier::kDevice, "rstd");
    }
    Attended a = attend(qkv, [&] {
      if (!projections) return;
      saved.qkv_S.keep(ops_, qkv.take(), keep.projections_tier, "q, k, v of my heads");
      if (spec_.qk_norm) saved.raw_qk.keep(ops_, std::move(raw_qk), keep.projections_tier, "q, k before their norm"), saved.rstd_qk.keep(ops_, std::move(rstd_qk), keep.projections_tier, "q/k norm");
    });
    if (keep.output) saved.lse_Sn.keep(ops_, std::move(a.lse_Sn), keep.output_tier, "attention log-sum-exp");
    qkv.reset();
    o = a.to_tokens();
    o_sNH = o;
    if (keep.output) saved.o_sNH.keep(ops_, std::move(o), keep.output_tier, "attention output");
  }
  ops_.mark("MLP forward", layer);
  between();
  Held y_sD = make(s, D, Kind::kSaved, "layer input");
  Held h_sD = make(s, D, normed, "normed MLP input"), rstd_s = make(s, 1, normed, "rstd", Dtype::kF32);
  // Never built in the output's place, though it could be: cuBLAS rounds sums in place otherwise, and what is kept must not
  // change what is computed. Forward has the room: a step's peak is in backward.
  Held x1 = make(s, D, projections ? Kind::kSaved : Kind::kActivations, "MLP input");
  const Buffer x1_sD = x1;
  output_projection(w, x1_sD, o_sNH, x_sD);
  o.reset();
  x.reset();
  if (options_.lean) saved.x_sD.settle();
  if (projections) saved.x1_sD.keep(ops_, std::move(x1), keep.projections_tier, "MLP input");
  ops_.rms_norm(h_sD, rstd_s, x1_sD, w.norm2_D, spec_.norm_eps);
  Held gate_up, a;
  if (keep.level >= Keep::kGateUp) gate_up = make(s, 2 * spec_.F, Kind::kSaved, "gate and up");
  if (everything) a = make(s, spec_.F, Kind::kSaved, "MLP activation");
  mlp_forward(w, y_sD, x1_sD, h_sD, gate_up, a);
  if (gate_up.exists()) saved.gate_up_s2F.keep(ops_, std::move(gate_up), keep.gate_up_tier, "gate and up");
  if (everything) {
    saved.a_sF.keep(ops_, std::move(a), ops::Tier::kDevice, "MLP activation");
    saved.h2_sD.keep(ops_, std::move(h_sD), ops::Tier::kDevice, "normed MLP input"), saved.rstd2_s.keep(ops_, std::move(rstd_s), ops::Tier::kDevice, "rstd");
  }
  return y_sD;
}

void Block::attend_again(const LayerViews& w, Buffer x_sD, Saved& saved) const {
  if (saved.o_sNH.exists()) return;
  ToHeads qkv;
  {
    const Held h_sD = make(options_.s, spec_.D, Kind::kActivations, "normed input"), rstd_s = make(options_.s, 1, Kind::kActivations, "rstd", Dtype::kF32);
    ops_.rms_norm(h_sD, rstd_s, x_sD, w.norm1_D, spec_.norm_eps);
    qkv = ulysses_.qkv_to_heads(project(w, h_sD, nullptr, nullptr));
    qkv.start(0);
  }
  Attended a = attend(qkv, [] {});
  qkv.reset();
  const ops::Tier tier = options_.rebuilt_tier;
  saved.lse_Sn.keep(ops_, std::move(a.lse_Sn), tier, "attention log-sum-exp");
  saved.o_sNH.keep(ops_, a.to_tokens(), tier, "attention output");
}

Held Block::forward_again(const LayerViews& w, Buffer x_sD, Saved& saved, int64_t layer) const {
  const int64_t s = options_.s, D = spec_.D;
  ops_.mark("forward again", layer);
  attend_again(w, x_sD, saved);
  Held y_sD = make(s, D, Kind::kActivations, "layer input, rebuilt");
  const Held x1_sD = make(s, D, Kind::kActivations, "MLP input, rebuilt"), h_sD = make(s, D, Kind::kActivations, "normed MLP input"), rstd_s = make(s, 1, Kind::kActivations, "rstd", Dtype::kF32);
  output_projection(w, x1_sD, saved.o_sNH.device(), x_sD);
  saved.o_sNH.drop();
  ops_.rms_norm(h_sD, rstd_s, x1_sD, w.norm2_D, spec_.norm_eps);
  mlp_forward(w, y_sD, x1_sD, h_sD, {}, {});
  return y_sD;
}

void Block::normed_again(Parked& h_sD, Parked& rstd_s, Buffer x_sD, Buffer w_D, const char* what) const {
  if (h_sD.exists()) return;
  Held h = make(options_.s, spec_.D, Kind::kActivations, what), rstd = make(options_.s, 1, Kind::kActivations, "rstd", Dtype::kF32);
  ops_.rms_norm(h, rstd, x_sD, w_D, spec_.norm_eps);
  h_sD.keep(ops_, std::move(h), ops::Tier::kDevice, what);
  rstd_s.keep(ops_, std::move(rstd), ops::Tier::kDevice, "rstd");
}

void Block::mlp_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, Buffer dy_sD) const {
  const int64_t s = options_.s, tile = std::min(options_.mlp_tile, s), D = spec_.D, F = spec_.F;
  if (!saved.x1_sD.exists()) {
    attend_again(w, saved.x_sD.device(), saved);
    Held x1_sD = make(s, D, Kind::kActivations, "MLP input, rebuilt");
    output_projection(w, x1_sD, saved.o_sNH.device(), saved.x_sD.device());
    saved.x1_sD.keep(ops_, std::move(x1_sD), ops::Tier::kDevice, "MLP input");
    if (options_.lean) saved.x_sD.drop(), saved.o_sNH.drop();
  }
  const Buffer x1_sD = saved.x1_sD.device();
  normed_again(saved.h2_sD, saved.rstd2_s, x1_sD, w.norm2_D, "normed MLP input");
  const Buffer h_sD = saved.h2_sD.device();
  Held dh_sD = make(s, D, Kind::kActivations, "gradient of the normed MLP input");
  Held scratch_t2F, a_tF, da_tF = make(tile, F, Kind::kActivations, "MLP gradient tile");
  const bool activation = saved.a_sF.exists();
  if (!activation) a_tF = make(tile, F, Kind::kActivations, "MLP activation tile");
  const bool kept = saved.gate_up_s2F.exists();
  const Buffer gate_up_s2F = kept ? saved.gate_up_s2F.device() : Buffer{}, a_sF = activation ? saved.a_sF.device() : Buffer{};
  if (!kept) scratch_t2F = make(tile, 2 * F, Kind::kActivations, "gate and up tile");
  ops_.for_tiles(s, tile, [&](int64_t first, int64_t t) {
    const Buffer gate_up = kept ? gate_up_s2F.row_range(first, t) : (*scratch_t2F).row_range(0, t);
    const Buffer h = h_sD.row_range(first, t), a = activation ? a_sF.row_range(first, t) : (*a_tF).row_range(0, t), da = (*da_tF).row_range(0, t), dy = dy_sD.row_range(first, t);
    if (!kept) {
      ops_.linear(gate_up, h, w.gate_up_2FD);
      if (w.gate_up_bias_2F.exists()) ops_.add_bias(gate_up, w.gate_up_bias_2F);
    }
    ops_.linear_dx(da, dy, w.down_DF);
    ops_.swiglu_grad(gate_up, activation ? Buffer{} : a, da);
    ops_.linear_dw(dw.down_DF, dy, a, add || first > 0);
    ops_.linear_dw(dw.gate_up_2FD, gate_up, h, add || first > 0);
    if (dw.gate_up_bias_2F.exists()) ops_.bias_grad(dw.gate_up_bias_2F, gate_up);
    ops_.linear_dx((*dh_sD).row_range(first, t), gate_up, w.gate_up_2FD);
  });
  saved.gate_up_s2F.reset();
  saved.a_sF.reset();
  saved.h2_sD.reset();
  if (dw.down_bias_D.exists()) ops_.bias_grad(dw.down_bias_D, dy_sD);
  ops_.rms_norm_grad(dy_sD, dw.norm2_D, dh_sD, x1_sD, saved.rstd2_s.device(), w.norm2_D);
  saved.x1_sD.reset();
  saved.rstd2_s.reset();
}

void Block::rope_and_norm_backward(const LayerViews& w, const LayerViews& dw, Saved& saved, Buffer dqkv_s) const {
  const int64_t NH = spec_.query_columns(), KH = spec_.key_columns();
  const Buffer dqk = dqkv_s.column_range(0, NH + KH);
  if (!spec_.qk_norm) {
    ops_.rope(dqk, table_sH_, -1);
    return;
  }
  const Buffer raw = saved.raw_qk.device(), rstd = saved.rstd_qk.device();
  ops_.norm_rope_grad(dqk.column_range(0, NH), dw.q_norm_H, raw.column_range(0, NH), rstd.column_range(0, spec_.N), w.q_norm_H, table_sH_);
  ops_.norm_rope_grad(dqk.column_range(NH, KH), dw.k_norm_H, raw.column_range(NH, KH), rstd.column_range(spec_.N, spec_.K), w.k_norm_H, table_sH_);
}

void Block::attention_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, Held& dy, const std::function<void()>& between) const {
  const int64_t s = options_.s;
  const ops::Heads& heads = ulysses_.heads();
  const bool lean = options_.lean;
  if (!lean) between();
  if (!saved.qkv_S.exists() || !lean) normed_again(saved.h1_sD, saved.rstd1_s, saved.x_sD.device(), w.norm1_D, "normed input");
  const bool again = !saved.qkv_S.exists();
  ToHeads qkv;  // on its way, where it was not kept
  if (again) {
    Held raw_qk, rstd_qk;
    qkv = ulysses_.qkv_to_heads(project(w, saved.h1_sD.device(), &raw_qk, &rstd_qk));
    qkv.start(0);
    if (spec_.qk_norm) saved.raw_qk.keep(ops_, std::move(raw_qk), ops::Tier::kDevice, "q, k before their norm"), saved.rstd_qk.keep(ops_, std::move(rstd_qk), ops::Tier::kDevice, "q/k norm");
  }
  if (lean) {
    saved.h1_sD.reset(), saved.rstd1_s.reset();
    saved.x_sD.leave(ops::Tier::kHost, "layer input"), saved.x_sD.settle();
  }
  const Buffer o_sNH = saved.o_sNH.device();
  ops_.linear_dw(dw.o_DO, dy, o_sNH, add);
  if (dw.o_bias_D.exists()) ops_.bias_grad(dw.o_bias_D, dy);
  Held do_sNH = make(s, spec_.query_columns(), Kind::kActivations, "gradient of the attention output");
  ops_.linear_dx(do_sNH, dy, w.o_DO);
  ToHeads d_o = ulysses_.output_to_heads(std::move(do_sNH));
  d_o.start(0);
  Parked waiting;  // dy, where it makes room
  if (lean) waiting.keep(ops_, std::move(dy), ops::Tier::kHost, "gradient of the residual stream"), waiting.settle();
  ToHeads o = ulysses_.output_to_heads(saved.o_sNH.take());
  o.start(0);
  saved.o_sNH.reset();
  Held dqkv_S = make(options_.S(), (heads.n + 2 * heads.k) * heads.H, Kind::kActivations, "gradient of q, k, v of my heads");
  ToTokens gradient = ulysses_.qkv_grad_to_tokens();
  {
    const Held workspace = this->workspace(largest_workspace(ops::attention_grad_workspace_bytes));
    const int64_t parts = ulysses_.num_parts();
    for (int64_t g = 0; g < parts; ++g) {
      const Buffer qkv_part = again ? qkv.wait(g) : ulysses_.qkv_part(saved.qkv_S.device(), g), do_part = d_o.wait(g), o_part = o.wait(g);
      if (g + 1 < parts) {
        if (again) qkv.start(g + 1);
        d_o.start(g + 1), o.start(g + 1);
      }
      ops_.attention_grad(ulysses_.qkv_part(dqkv_S, g), do_part, qkv_part, o_part, ulysses_.lse_part(saved.lse_Sn.device(), g), workspace, ulysses_.heads(g), options_.attention);
      if (g + 1 < parts) gradient.start(dqkv_S);
    }
  }
  qkv.reset();
  saved.qkv_S.reset();
  saved.lse_Sn.reset();
  d_o.reset();
  o.reset();
  if (lean) {
    saved.x_sD.want(), waiting.want();
    between();
  }

  const Held dqkv_s = gradient.finish(std::move(dqkv_S));
  rope_and_norm_backward(w, dw, saved, dqkv_s);
  normed_again(saved.h1_sD, saved.rstd1_s, saved.x_sD.device(), w.norm1_D, "normed input");
  const Buffer h_sD = saved.h1_sD.device();
  ops_.linear_dw(dw.qkv_OD, dqkv_s, h_sD, add);
  if (dw.qkv_bias_O.exists()) ops_.bias_grad(dw.qkv_bias_O, dqkv_s);
  ops_.linear_dx(h_sD, dqkv_s, w.qkv_OD);
  if (lean) dy = waiting.take();
  ops_.rms_norm_grad(dy, dw.norm1_D, h_sD, saved.x_sD.device(), saved.rstd1_s.device(), w.norm1_D);
  saved = {};
}

void Block::backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, Held& dy_sD, int64_t layer, const std::function<void()>& between) const {
  ops_.mark("MLP backward", layer);
  saved.want_for_mlp();
  if (!options_.lean) saved.want_for_attention();
  mlp_backward(w, dw, add, saved, dy_sD);
  ops_.mark("attention backward", layer);
  if (options_.lean) saved.want_for_attention();
  attention_backward(w, dw, add, saved, dy_sD, between);
}

}  // namespace uly::step
