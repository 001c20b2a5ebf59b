// Mistral: Llama without biases, and with a sliding window in every layer of the early models.
#include "models/families.h"

namespace uly::models {

void mistral(const Config& config, Spec& spec) {
  read_common(config, {.D = 4096, .F = 14336, .N = 32, .K = 8, .V = 32000, .L = 32, .max_positions = 131072}, spec);
  if (config.flag("attention_bias", false)) config.refuse("attention_bias", "expected false: Mistral models have no biases");
  if (config.flag("mlp_bias", false)) config.refuse("mlp_bias", "expected false: Mistral models have no biases");
  // An absent key means the class's 4096; only null switches the window off.
  const bool absent = !config.json().contains("sliding_window");
  spec.sliding_window = config.count("sliding_window", absent ? 4096 : 0);
  if (spec.sliding_window == 0 && any_sliding_layer(config, spec.L, false))
    config.refuse("layer_types", "expected no sliding_attention where sliding_window is null");
}

}  // namespace uly::models
