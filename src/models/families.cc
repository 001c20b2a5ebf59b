#include "models/families.h"

#include "base/check.h"

namespace uly::models {

const std::vector<Family>& families() {
  static const std::vector<Family> kFamilies = {
      {"llama", "LlamaForCausalLM", llama},
      {"qwen2", "Qwen2ForCausalLM", qwen2},
      {"qwen3", "Qwen3ForCausalLM", qwen3},
      {"mistral", "MistralForCausalLM", mistral},
  };
  return kFamilies;
}

namespace {

std::string supported() {
  std::string list;
  for (const Family& family : families()) list += (list.empty() ? "" : ", ") + std::string(family.architecture);
  return list;
}

// Finds the row by model_type, by architecture where that is absent; they must agree where both are there.
const Family& family_of(const Config& config) {
  const std::string type = config.text("model_type", "");
  std::string architecture;
  if (const Json* list = config.find("architectures")) {
    if (!list->is_array() || list->size() > 1 || (list->size() == 1 && !(*list)[0].is_string())) config.refuse("architectures", "expected a list of one name");
    if (list->size() == 1) architecture = (*list)[0].get<std::string>();
  }
  for (const Family& family : families())
    if (type.empty() ? architecture == family.architecture : type == family.model_type && (architecture.empty() || architecture == family.architecture))
      return family;
  user_error("{}: architecture not supported: expected one of {}, found {}{}", config.where(), supported(),
             architecture.empty() && type.empty() ? "neither architectures nor model_type" : architecture, type.empty() ? "" : " (model_type " + type + ")");
}

}  // namespace

Spec read_spec(const Config& config) {
  const Family& family = family_of(config);
  Spec spec;
  spec.family = family.model_type;
  spec.architecture = family.architecture;
  family.read(config, spec);
  spec.config = config.json();
  return spec;
}

Spec spec_from_config(const Json& config, const std::string& where) { return read_spec(Config(config, where)); }

bool any_sliding_layer(const Config& config, int64_t L, bool absent) {
  const Json* kinds = config.find("layer_types");
  if (kinds == nullptr) return absent;
  if (!kinds->is_array() || static_cast<int64_t>(kinds->size()) != L)
    config.refuse("layer_types", fmt::format("expected a list of {} entries, one a layer", L));
  bool sliding = false;
  for (const Json& kind : *kinds) {
    if (kind != "full_attention" && kind != "sliding_attention")
      config.refuse("layer_types", "not supported: expected full_attention and sliding_attention only");
    sliding = sliding || kind == "sliding_attention";
  }
  return sliding;
}

}  // namespace uly::models
