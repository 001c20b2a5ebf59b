// What a model family is, as data: dimensions, the mathematics that differs, and the table of parameters.
//
// A model here is a decoder of L equal blocks: x += o(attention(rope(qk_norm(qkv(norm(x)))))); x += down(silu(gate) * up).
// What a configuration asks beyond that is refused by name when the Spec is made.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"

namespace uly::models {

// Rotary embedding; rope_table() turns it into H/2 numbers. Source: Transformers' modeling_rope_utils.
struct Rope {
  enum class Type { kDefault, kLinear, kLlama3, kYarn, kDynamic };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn
  double attention_factor = 0.0;                         // yarn: 0 = by formula
  double mscale = 0.0, mscale_all_dim = 0.0;             // yarn: 0 = absent
  bool truncate = true;                                  // yarn
  int64_t original_max_positions = 0;

  bool operator==(const Rope&) const = default;
};

struct Spec {
  std::string name;     // what the recipe called it
  std::string folder;   // where its files lie; empty if only its shape is known
  std::string family;   // model_type: llama, qwen2, qwen3, mistral
  std::string architecture;  // class name, e.g. LlamaForCausalLM
  int64_t D = 0, F = 0, N = 0, K = 0, H = 0, V = 0, L = 0;
  double norm_eps = 1e-6;
  double initializer_range = 0.02;
  bool tied_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;
  Rope rope;
  int64_t max_positions = 0;
  int64_t sliding_window = 0;  // 0 = none; where on, no longer sequence is accepted
  int64_t padding_token = -1;  // pad_token_id: its embedding starts at zero and gets no gradient; -1 = none
  Json config;                 // config.json after hf_config_kwargs
  bool randomly_initialized = false;

  int64_t query_columns() const { return N * H; }
  int64_t key_columns() const { return K * H; }
  int64_t qkv_columns() const { return (N + 2 * K) * H; }
};

// Offsets in elements of each weight within one layer's flat buffer; -1 where the family has none. q|k|v and gate|up
// lie one after the other, so that the fused matrix is a view. Every offset is a multiple of kAlignElements.
inline constexpr int64_t kAlignElements = 64;
struct LayerOffsets {
  int64_t norm1_D = -1, qkv_OD = -1, qkv_bias_O = -1, q_norm_H = -1, k_norm_H = -1, o_DO = -1, o_bias_D = -1;
  int64_t norm2_D = -1, gate_up_2FD = -1, gate_up_bias_2F = -1, down_DF = -1, down_bias_D = -1;
};
LayerOffsets layer_offsets(const Spec& spec);

// One Hugging Face tensor's place.
struct Tensor {
  std::string name;              // model.layers.3.self_attn.q_proj.weight
  std::vector<int64_t> shape;
  int64_t offset = 0;            // elements, within its unit
  bool decays = true;            // weight decay: not for biases and norms (spec of the reference, 1.8)
  bool is_norm = false;          // initialised to one; biases to zero; matrices to N(0, initializer_range)
  bool is_bias = false;
  bool is_product = false;       // a linear map's: its gradient is a matrix product
  int64_t elements() const;
};

// What is gathered, reduced and updated at once: embedding | layer 0 .. L-1 | head (final norm, and lm_head if untied).
struct Unit {
  std::string name;
  std::vector<Tensor> tensors;   // in order of offset
  int64_t elements = 0;          // end of the last tensor, rounded up to kAlignElements
};
std::vector<Unit> units(const Spec& spec);   // L + 2 of them

int64_t num_parameters(const Spec& spec);    // as Transformers counts: tied weights once, no padding

// Makes a Spec from config.json's content: both spellings (Transformers 4.x: rope_theta, rope_scaling, torch_dtype;
// 5.x: rope_parameters, dtype). Throws UserError for an architecture that is not known and for every setting that would
// change the mathematics, by name. `where` is the file as messages show it.
Spec spec_from_config(const Json& config, const std::string& where);

// Finds `name_or_path`: a folder with config.json, then the Hugging Face cache (HF_HUB_CACHE, HF_HOME), then the table of
// well-known shapes (known.cc). `cache` is the hub cache folder. Applies hf_config_kwargs (a changed num_hidden_layers
// means random initialisation). Returns a Spec with an empty folder when only the table knew it. Throws UserError if
// nothing knows it, naming the places that were looked at.
Spec find(const std::string& name_or_path, const std::string& hub_cache, const Json& hf_config_kwargs);

// Where the hub's snapshot of `repository` lies in `hub_cache`; empty if it is not there.
std::string cached_snapshot(const std::string& repository, const std::string& hub_cache);

// Inverse frequencies [H/2], fp32 like Transformers', and the factor on cos and sin. `length` matters to kDynamic only.
struct RopeTable {
  std::vector<float> inverse_frequencies;
  float attention_factor = 1.0f;
};
RopeTable rope_table(const Spec& spec, int64_t length);

}  // namespace uly::models
