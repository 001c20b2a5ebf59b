// Qwen2 and Qwen2.5: Llama with biases on q, k and v, always.
#include "models/families.h"

namespace uly::models {

int64_t qwen_sliding_window(const Config& config, int64_t L) {
  const bool used = config.flag("use_sliding_window", false);
  const bool absent = !config.json().contains("sliding_window");
  const int64_t window = config.count("sliding_window", absent ? 4096 : 0);
  const Json* full_layers = config.find("max_window_layers");
  if (full_layers != nullptr && (!full_layers->is_number_integer() || full_layers->get<int64_t>() < 0))
    config.refuse("max_window_layers", "expected a whole number of at least 0");
  const bool on = used && window > 0;
  const bool sliding = any_sliding_layer(config, L, on && (full_layers == nullptr ? 28 : full_layers->get<int64_t>()) < L);
  if (sliding && !on) config.refuse("layer_types", "expected no sliding_attention where use_sliding_window is false");
  return sliding ? window : 0;
}

void qwen2(const Config& config, Spec& spec) {
  read_common(config, {.D = 4096, .F = 22016, .N = 32, .K = 32, .V = 151936, .L = 32, .max_positions = 32768}, spec);
  spec.qkv_bias = true;
  if (config.flag("mlp_bias", false)) config.refuse("mlp_bias", "expected false: Qwen2 models have no biases in the MLP");
  spec.sliding_window = qwen_sliding_window(config, spec.L);
}

}  // namespace uly::models
