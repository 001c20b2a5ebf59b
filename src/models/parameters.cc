// The table of parameters: what lies where in each unit, under its Hugging Face name.
#include <fmt/format.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "base/shapes.h"
#include "models/spec.h"

namespace uly::models {
namespace {

enum class Role { kMatrix, kNorm, kBias };

// Lays weights one after the other; `align` closes a group whose tensors are one view together.
class Layout {
 public:
  Layout() = default;  // for offsets alone: a plan asks for them thousands of times
  explicit Layout(std::string prefix) : prefix_(std::move(prefix)) {}

  // Returns where the tensor starts.
  int64_t add(Role role, const char* name, std::initializer_list<int64_t> shape) {
    const int64_t offset = end_;
    for (int64_t n = 1; const int64_t size : shape) end_ = offset + (n *= size);
    if (!prefix_) return offset;
    Tensor tensor{.name = *prefix_ + name, .shape = shape, .offset = offset};
    tensor.is_norm = role == Role::kNorm;
    tensor.is_bias = role == Role::kBias;
    tensor.decays = tensor.is_product = role == Role::kMatrix;
    tensors_.push_back(std::move(tensor));
    return offset;
  }
  int64_t add_aligned(Role role, const char* name, std::initializer_list<int64_t> shape) {
    const int64_t offset = add(role, name, shape);
    align();
    return offset;
  }
  void align() { end_ = round_up(end_, kAlignElements); }

  Unit unit(std::string name) {
    align();
    return {.name = std::move(name), .tensors = std::move(tensors_), .elements = end_};
  }

 private:
  std::optional<std::string> prefix_;
  std::vector<Tensor> tensors_;
  int64_t end_ = 0;
};

void add_attention(const Spec& spec, Layout& layout, LayerOffsets& at) {
  const int64_t q = spec.query_columns(), k = spec.key_columns();
  at.norm1_D = layout.add_aligned(Role::kNorm, "input_layernorm.weight", {spec.D});
  at.qkv_OD = layout.add(Role::kMatrix, "self_attn.q_proj.weight", {q, spec.D});
  layout.add(Role::kMatrix, "self_attn.k_proj.weight", {k, spec.D});
  layout.add_aligned(Role::kMatrix, "self_attn.v_proj.weight", {k, spec.D});
  if (spec.qkv_bias) {
    at.qkv_bias_O = layout.add(Role::kBias, "self_attn.q_proj.bias", {q});
    layout.add(Role::kBias, "self_attn.k_proj.bias", {k});
    layout.add_aligned(Role::kBias, "self_attn.v_proj.bias", {k});
  }
  if (spec.qk_norm) {
    at.q_norm_H = layout.add_aligned(Role::kNorm, "self_attn.q_norm.weight", {spec.H});
    at.k_norm_H = layout.add_aligned(Role::kNorm, "self_attn.k_norm.weight", {spec.H});
  }
  at.o_DO = layout.add_aligned(Role::kMatrix, "self_attn.o_proj.weight", {spec.D, q});
  if (spec.o_bias) at.o_bias_D = layout.add_aligned(Role::kBias, "self_attn.o_proj.bias", {spec.D});
}

void add_mlp(const Spec& spec, Layout& layout, LayerOffsets& at) {
  at.norm2_D = layout.add_aligned(Role::kNorm, "post_attention_layernorm.weight", {spec.D});
  at.gate_up_2FD = layout.add(Role::kMatrix, "mlp.gate_proj.weight", {spec.F, spec.D});
  layout.add_aligned(Role::kMatrix, "mlp.up_proj.weight", {spec.F, spec.D});
  if (spec.mlp_bias) {
    at.gate_up_bias_2F = layout.add(Role::kBias, "mlp.gate_proj.bias", {spec.F});
    layout.add_aligned(Role::kBias, "mlp.up_proj.bias", {spec.F});
  }
  at.down_DF = layout.add_aligned(Role::kMatrix, "mlp.down_proj.weight", {spec.D, spec.F});
  if (spec.mlp_bias) at.down_bias_D = layout.add_aligned(Role::kBias, "mlp.down_proj.bias", {spec.D});
}

LayerOffsets lay(const Spec& spec, Layout& layout) {
  LayerOffsets at;
  add_attention(spec, layout, at);
  add_mlp(spec, layout, at);
  return at;
}

Unit layer(const Spec& spec, int64_t index) {
  Layout layout(fmt::format("model.layers.{}.", index));
  lay(spec, layout);
  return layout.unit(fmt::format("layer {}", index));
}

}  // namespace

int64_t Tensor::elements() const {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

LayerOffsets layer_offsets(const Spec& spec) {
  Layout layout;
  return lay(spec, layout);
}

std::vector<Unit> units(const Spec& spec) {
  std::vector<Unit> all;
  Layout embedding("model.");
  embedding.add(Role::kMatrix, "embed_tokens.weight", {spec.V, spec.D});
  all.push_back(embedding.unit("embedding"));
  all[0].tensors[0].is_product = spec.tied_embeddings;
  for (int64_t i = 0; i < spec.L; ++i) all.push_back(layer(spec, i));
  Layout head("");
  head.add_aligned(Role::kNorm, "model.norm.weight", {spec.D});
  if (!spec.tied_embeddings) head.add(Role::kMatrix, "lm_head.weight", {spec.V, spec.D});
  all.push_back(head.unit("head"));
  return all;
}

int64_t num_parameters(const Spec& spec) {
  int64_t total = 0;
  for (const Unit& unit : units(spec))
    for (const Tensor& tensor : unit.tensors) total += tensor.elements();
  return total;
}

}  // namespace uly::models
