// One decoder block, forward and backward, as explicit instructions.
#pragma once

#include <functional>
#include <utility>

#include "step/options.h"
#include "step/parked.h"
#include "step/ulysses.h"
#include "step/zero.h"

namespace uly::step {

// What backward needs of one layer: a type, so that pricing sizes it; keeping less is simply a smaller one.
struct Saved {
  Parked x_sD;                                 // LayerKeep::input
  Parked o_sNH, lse_Sn;                        // LayerKeep::output
  Parked qkv_S, raw_qk, rstd_qk, x1_sD;        // Keep::kProjections; raw_qk and rstd_qk with qk_norm only
  Parked gate_up_s2F;                          // Keep::kGateUp
  Parked h1_sD, rstd1_s, h2_sD, rstd2_s, a_sF;  // Keep::kEverything: the normed inputs of attention and MLP, silu(gate) up

  // Waits for what is on its way out of the device.
  void settle();
  // Starts the way back of what the MLP's backward reads, of what attention's does.
  void want_for_mlp();
  void want_for_attention();
};

// The weights of one layer as views of its flat buffer; the same struct names its gradients.
struct LayerViews {
  ops::Buffer norm1_D, qkv_OD, qkv_bias_O, q_norm_H, k_norm_H, o_DO, o_bias_D, norm2_D, gate_up_2FD, gate_up_bias_2F, down_DF, down_bias_D;
};
LayerViews layer_views(const models::Spec& spec, const ops::Buffer& flat);

class Block {
 public:
  Block(ops::Ops& ops, const models::Spec& spec, const Options& options, const Ulysses& ulysses, ops::Buffer rope_table)
      : ops_(ops), spec_(spec), options_(options), ulysses_(ulysses), table_sH_(rope_table) {}

  // Returns y_sD; moves what backward needs into `saved`. Calls `between` once attention's part is done.
  ops::Held forward(const LayerViews& w, ops::Held x_sD, const LayerKeep& keep, Saved& saved, int64_t layer, const std::function<void()>& between) const;

  // Returns y_sD again, from x_sD and what is kept: attention's output, which is computed anew where it is not, and
  // then stays in `saved`.
  ops::Held forward_again(const LayerViews& w, ops::Buffer x_sD, Saved& saved, int64_t layer) const;

  // dy_sD becomes dx_sD; adds to dw, or without `add` writes its matrices. `saved` has x_sD. Calls `between` once the MLP's part
  // is done, or with Options::lean attention's.
  void backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, ops::Held& dy_sD, int64_t layer, const std::function<void()>& between) const;

 private:
  // q, k, v of my tokens: projection, bias, q/k norm, rope. With `raw_qk` and `rstd_qk`, what the gradient of a q/k norm needs goes
  // there.
  ops::Held project(const LayerViews& w, ops::Buffer h_sD, ops::Held* raw_qk, ops::Held* rstd_qk) const;
  // Attention, while q, k, v are on their way; its output is on its way after.
  struct Attended {
    ops::Held o_SnH, lse_Sn;
    ToTokens output;
    ops::Held to_tokens() { return output.finish(std::move(o_SnH)); }  // o_sNH
  };
  // Calls `arrived` once all of qkv_S is there, before the last part is attended.
  Attended attend(ToHeads& qkv, const std::function<void()>& arrived) const;
  // Attention's output, log-sum-exp and all that its backward needs, where they have not been kept.
  void attend_again(const LayerViews& w, ops::Buffer x_sD, Saved& saved) const;
  ops::Held make(int64_t rows, int64_t columns, ops::Kind kind, const char* what, Dtype dtype) const { return ops::Held(ops_, rows, columns, dtype, kind, what); }
  ops::Held make(int64_t rows, int64_t columns, ops::Kind kind, const char* what) const { return make(rows, columns, kind, what, options_.dtype); }
  // Of the part of my heads that needs most.
  int64_t largest_workspace(int64_t (*bytes)(const ops::AttentionSchedule&, const ops::Heads&, int64_t)) const;
  // No buffer for 0 bytes.
  ops::Held workspace(int64_t bytes) const { return bytes > 0 ? make(1, bytes, ops::Kind::kActivations, "attention workspace", Dtype::kU8) : ops::Held(); }
  // Fills h and rstd from x unless they have been kept.
  void normed_again(Parked& h_sD, Parked& rstd_s, ops::Buffer x_sD, ops::Buffer w_D, const char* what) const;
  void output_projection(const LayerViews& w, ops::Buffer y_sD, ops::Buffer o_sNH, ops::Buffer x_sD) const;
  // gate_up_s2F and a_sF: where these are kept whole, or no buffers.
  void mlp_forward(const LayerViews& w, ops::Buffer y_sD, ops::Buffer x1_sD, ops::Buffer h_sD, ops::Buffer gate_up_s2F, ops::Buffer a_sF) const;
  void mlp_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, ops::Buffer dy_sD) const;
  void attention_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, ops::Held& dy_sD, const std::function<void()>& between) const;
  void rope_and_norm_backward(const LayerViews& w, const LayerViews& dw, Saved& saved, ops::Buffer dqkv_s) const;

  ops::Ops& ops_;
  const models::Spec& spec_;
  const Options& options_;
  const Ulysses& ulysses_;
  ops::Buffer table_sH_;
};

}  // namespace uly::step
