// Llama: biases on all projections of the attention, or of the MLP, where the configuration asks for them.
#include "models/families.h"

namespace uly::models {

void llama(const Config& config, Spec& spec) {
  read_common(config, {.D = 4096, .F = 11008, .N = 32, .V = 32000, .L = 32, .max_positions = 2048}, spec);
  spec.qkv_bias = spec.o_bias = config.flag("attention_bias", false);
  spec.mlp_bias = config.flag("mlp_bias", false);
  if (any_sliding_layer(config, spec.L, false)) config.refuse("layer_types", "expected full_attention in every layer of a Llama model");
}

}  // namespace uly::models
