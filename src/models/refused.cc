// Settings that other models of the same lineage have and that would change what a step computes. Each must be absent,
// null, false or empty, or have the neutral value.
#include <cmath>
#include <limits>

#include "base/check.h"
#include "models/config.h"

namespace uly::models {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();  // no number is neutral

struct Row {
  const char* key;
  double neutral;
};
constexpr Row kRows[] = {
    // scales
    {"attention_multiplier", kNone},
    {"embedding_multiplier", 1},
    {"logit_scale", 1},
    {"logits_scaling", 1},
    {"query_pre_attn_scalar", kNone},
    {"residual_multiplier", 1},
    {"scale_depth", kNone},
    {"scale_emb", 1},
    {"dim_model_base", kNone},
    {"attn_temperature_tuning", 0},
    // bounds
    {"clip_qkv", kNone},
    {"attn_logit_softcapping", kNone},
    {"final_logit_softcapping", kNone},
    // dropout
    {"attention_dropout", 0},
    {"attn_pdrop", 0},
    {"dropout", 0},
    {"embd_pdrop", 0},
    {"hidden_dropout", 0},
    {"resid_pdrop", 0},
    {"residual_dropout", 0},
    // rotary embedding on some layers or some columns
    {"alibi", kNone},
    {"no_rope_layers", kNone},
    {"partial_rotary_factor", 1},
    {"rope_interleave", kNone},
    {"rope_interleaved", kNone},
    {"rotary_pct", 1},
    {"use_mrope", kNone},
    // other blocks
    {"add_cross_attention", kNone},
    {"attention_chunk_size", kNone},
    {"hidden_activation", kNone},
    {"is_encoder_decoder", kNone},
    {"kv_lora_rank", kNone},
    {"n_routed_experts", 0},
    {"num_experts", 0},
    {"num_local_experts", 0},
    {"num_nextn_predict_layers", 0},
    {"per_layer_config", kNone},
    {"qk_layernorm", kNone},
    {"use_bias", kNone},
    {"use_parallel_residual", kNone},
    {"use_qk_norm", kNone},
    // other inputs and other weights
    {"audio_config", kNone},
    {"pretraining_tp", 1},
    {"quantization_config", kNone},
    {"text_config", kNone},
    {"vision_config", kNone},
};

bool is_neutral(const Json& value, double neutral) {
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value.get<double>() == neutral;
  return (value.is_array() || value.is_object()) && value.empty();
}

}  // namespace

void refuse_other_mathematics(const Config& config) {
  for (const Row& row : kRows) {
    const Json* value = config.find(row.key);
    if (value == nullptr || is_neutral(*value, row.neutral)) continue;
    config.refuse(row.key, std::isnan(row.neutral) ? "not supported: expected none" : fmt::format("not supported: expected {} or none", row.neutral));
  }
}

}  // namespace uly::models
