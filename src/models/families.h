// The table of families: which configurations can be trained.
#pragma once

#include <string>
#include <vector>

#include "models/config.h"
#include "models/spec.h"

namespace uly::models {

struct Family {
  const char* model_type;
  const char* architecture;
  void (*read)(const Config& config, Spec& spec);  // dimensions and the mathematics that differs
};
const std::vector<Family>& families();

void llama(const Config& config, Spec& spec);
void mistral(const Config& config, Spec& spec);
void qwen2(const Config& config, Spec& spec);
void qwen3(const Config& config, Spec& spec);

// Returns the window that use_sliding_window, sliding_window, max_window_layers and layer_types ask for; 0: none. Shared
// by the Qwen families.
int64_t qwen_sliding_window(const Config& config, int64_t L);

// Reads layer_types: whether some layer is of sliding attention, `absent` where there is no such key. Throws UserError for
// a kind of layer other than full_attention and sliding_attention, and for a list that is not one entry a layer.
bool any_sliding_layer(const Config& config, int64_t L, bool absent);

}  // namespace uly::models
