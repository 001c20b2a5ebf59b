// Qwen3: a norm on each head of q and k; the head size is its own number.
#include "models/families.h"

namespace uly::models {

void qwen3(const Config& config, Spec& spec) {
  read_common(config, {.D = 4096, .F = 22016, .N = 32, .K = 32, .H = 128, .V = 151936, .L = 32, .max_positions = 32768}, spec);
  spec.qk_norm = true;
  spec.qkv_bias = spec.o_bias = config.flag("attention_bias", false);
  if (config.flag("mlp_bias", false)) config.refuse("mlp_bias", "expected false: Qwen3 models have no biases in the MLP");
  spec.sliding_window = qwen_sliding_window(config, spec.L);
}

}  // namespace uly::models
