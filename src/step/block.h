// One decoder block, forward and backward, as explicit instructions.
#pragma once

#include "step/options.h"
#include "step/ulysses.h"
#include "step/zero.h"

namespace uly::step {

// What backward needs of one layer: a type, so that pricing sizes it; keeping less is simply a smaller one.
struct Saved {
  ops::Held x_sD, o_sNH, lse_Sn;               // always
  ops::Held qkv_S, raw_qk, rstd_qk, x1_sD;     // Keep::kProjections; raw_qk and rstd_qk with qk_norm only
  ops::Held gate_up_s2F;                       // Keep::kGateUp
  ops::Held h1_sD, rstd1_s, h2_sD, rstd2_s, a_sF;  // Keep::kEverything: the normed inputs of attention and MLP, silu(gate) up
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

  // Returns y_sD; moves what backward needs into `saved`.
  ops::Held forward(const LayerViews& w, ops::Held x_sD, Keep keep, Saved& saved, int64_t layer) const;

  // dy_sD becomes dx_sD; adds to dw, or without `add` writes its matrices.
  void backward(const LayerViews& w, const LayerViews& dw, bool add, Saved saved, ops::Buffer dy_sD, int64_t layer) const;

 private:
  // q, k, v of my tokens: projection, bias, q/k norm, rope. With `keep`, what the gradient of a q/k norm needs goes there.
  ops::Held project(const LayerViews& w, ops::Buffer h_sD, Saved* keep) const;
  ops::Held make(int64_t rows, int64_t columns, ops::Kind kind, const char* what, Dtype dtype) const { return ops::Held(ops_, rows, columns, dtype, kind, what); }
  ops::Held make(int64_t rows, int64_t columns, ops::Kind kind, const char* what) const { return make(rows, columns, kind, what, options_.dtype); }
  // No buffer for 0 bytes.
  ops::Held workspace(int64_t bytes) const { return bytes > 0 ? make(1, bytes, ops::Kind::kActivations, "attention workspace", Dtype::kU8) : ops::Held(); }
  // Fills h and rstd from x unless they have been kept.
  void normed_again(ops::Held& h_sD, ops::Held& rstd_s, ops::Buffer x_sD, ops::Buffer w_D, const char* what) const;
  void output_projection(const LayerViews& w, ops::Buffer y_sD, ops::Buffer o_sNH, ops::Buffer x_sD) const;
  void mlp_forward(const LayerViews& w, ops::Buffer y_sD, ops::Buffer x1_sD, ops::Buffer h_sD, const Saved& saved) const;
  void mlp_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, ops::Buffer dy_sD) const;
  void attention_backward(const LayerViews& w, const LayerViews& dw, bool add, Saved& saved, ops::Buffer dy_sD) const;
  void rope_and_norm_backward(const LayerViews& w, const LayerViews& dw, const Saved& saved, ops::Buffer dqkv_s) const;

  ops::Ops& ops_;
  const models::Spec& spec_;
  const Options& options_;
  const Ulysses& ulysses_;
  ops::Buffer table_sH_;
};

}  // namespace uly::step
